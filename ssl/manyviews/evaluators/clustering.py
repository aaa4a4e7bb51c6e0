"""Clustering: groups of images by their features, compared with the classes if there are any."""

from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from pydantic import Field
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score, silhouette_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from manyviews.config import Settings
from manyviews.data import sample_ids
from manyviews.evaluators.distance import Nearness
from manyviews.evaluators.k_means import MOST, k_means
from manyviews.evaluators.number_of_clusters import FEWEST, MOST_MERGED, SAMPLE, Linkage, agglomerate, choose_k
from manyviews.evaluators.results.measurement import Measurement
from manyviews.system.plural import plural


class ClusteringSettings(Settings):
    """The number of clusters, and how they are computed."""

    k: Annotated[int, Field(ge=2, le=1_000_000)] | Literal["auto", "threshold"] | None = None
    """Number of clusters of k-means; auto: the one with the largest silhouette among 2 to largest_k, on a sample of
    2,000 images; threshold: as many as remain when the two nearest clusters are merged until they are farther apart
    than the threshold, as for identities. Null: as many as classes, or auto without labels."""
    largest_k: int = Field(50, ge=2, le=10_000)
    """Largest number of clusters that k=auto tries."""
    threshold: float | None = Field(None, gt=-1, le=1e18)
    """For k=threshold, the mean cosine (or Euclidean distance) of two clusters at which merging ends; null: the
    threshold that tasks=verification has put into evaluation.json."""
    linkage: Linkage = "average"
    """For k=threshold, the distance of two clusters: the mean over their pairs of images, or that of the farthest pair
    (complete)."""
    restarts: int = Field(10, ge=1, le=10_000)
    """Starts of k-means (k-means++); the one with the least squared distances counts."""
    most: int = Field(MOST, ge=1, le=10_000_000)
    """Number of images above which k-means uses mini-batches, which are faster and a little worse."""


class ClusteringResult(NamedTuple):
    """Clusters of images, and their agreement with classes; None without labels."""

    groups: Int64[Tensor, " images"]
    """The cluster of each image, from 0, the largest first."""
    distances: Float[Tensor, " images"]
    """Euclidean distance of each image to the mean of its cluster; for the cosine, of features of length 1."""
    silhouette: float | None
    """Mean of (b − a) / max(a, b), with a an image's mean distance to its own cluster and b to the nearest other one
    (Rousseeuw 1987), on at most 2,000 images; None if there is one cluster, or one for each image."""
    nmi: float | None
    """Normalised mutual information, 2 I / (H(clusters) + H(classes)); above 0 by chance, more so for many clusters."""
    ami: float | None
    """Adjusted mutual information (Vinh et al. 2010): 0 for random clusters, 1 for perfect ones."""
    purity: float | None
    """Share of images of the most frequent class of their cluster; 1 if each image is a cluster."""
    b_cubed: float | None
    """Harmonic mean of B-cubed precision and recall (Amigó et al. 2009), which also counts classes that are split."""
    tried: dict[int, float]
    """For k=auto, the silhouette of each number of clusters."""


def clustering(
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"] | None,
    settings: ClusteringSettings | None = None,
    *,
    nearness: Nearness = "cosine",
    threshold: float | None = None,
    seed: int = 0,
) -> ClusteringResult:
    """Clusters the images, by default into as many groups as classes, and compares the two.

    Features are normalised for the cosine. Images labelled −1 are left out. `threshold` is that of k=threshold where
    the settings have none.

    Raises:
        ValueError: if there are fewer images than clusters, fewer than 2 classes to count, too many images for
            k=threshold, or no threshold.

    Examples:
        >>> clustering(torch.eye(2)[[0, 0, 1]], None, ClusteringSettings(k=2)).groups.tolist()
        [0, 0, 1]
    """
    settings = settings or ClusteringSettings()
    if labels is not None:
        features, labels = features[labels >= 0], labels[labels >= 0].cpu()
    rows = F.normalize(features, dim=1, eps=1e-6) if nearness == "cosine" else features
    if problem := cannot_cluster(settings, len(rows), threshold):
        raise ValueError(problem)
    tried: dict[int, float] = {}
    if settings.k == "threshold":
        threshold = threshold if settings.threshold is None else settings.threshold
        assert threshold is not None
        groups = agglomerate(rows, threshold, settings.linkage, nearness)
    else:
        if isinstance(settings.k, int):
            k = settings.k
        elif settings.k is None and labels is not None:
            k = len(labels.unique())
            if k < FEWEST:
                raise ValueError(f"images of {plural(k, 'class', 'classes')} cannot be clustered; give 2 or more")
        else:
            tried = choose_k(rows, settings.largest_k, restarts=settings.restarts, seed=seed)
            k = max(tried, key=lambda number: tried[number])
        groups = k_means(rows, k, restarts=settings.restarts, most=settings.most, seed=seed)
    groups = by_size(groups)
    distances = distances_to_centres(rows, groups)
    nmi, ami, purity, b_cubed = (None, None, None, None) if labels is None else agreement_of(groups, labels)
    return ClusteringResult(groups, distances, silhouette(rows, groups, seed=seed), nmi, ami, purity, b_cubed, tried)


def cannot_cluster(settings: ClusteringSettings, images: int, threshold: float | None) -> str:
    """Returns why so many images cannot be clustered by these settings; empty if they can."""
    if settings.k != "threshold":
        fewest = settings.k if isinstance(settings.k, int) else 2
        return f"{images:,} images cannot be {fewest:,} clusters" * (images < fewest)
    if settings.threshold is None and threshold is None:
        return (
            "protocol.clustering.k=threshold needs the threshold at which images are of one class, and evaluation.json "
            "has none for these weights: measure it by tasks=verification first, or give "
            "protocol.clustering.threshold=…"
        )
    if images > MOST_MERGED:
        return (
            f"protocol.clustering.k=threshold compares all pairs of images, and takes {MOST_MERGED:,} of them at most, "
            f"not {images:,}; name some classes by classes=…, or give protocol.clustering.k a number"
        )
    return ""


def measure_clusters(
    kind: str,
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"] | None,
    settings: ClusteringSettings,
    *,
    nearness: Nearness,
    distance: str,
    threshold: float | None,
    seed: int,
) -> tuple[tuple[Measurement, ...], ClusteringResult]:
    """Clusters one kind of features; returns the measurements and the clusters.

    Raises:
        ValueError: as `clustering` does.
    """
    result = clustering(features, labels, settings, nearness=nearness, threshold=threshold, seed=seed)
    sizes = result.groups.bincount()
    figures = {
        "NMI": result.nmi,
        "AMI": result.ami,
        "purity": result.purity,
        "B-cubed F": result.b_cubed,
        "silhouette": result.silhouette,
        "clusters": float(len(sizes)),
        "largest": int(sizes.max()) / len(features),
    }
    details: dict[str, Any] = {"k": settings.k or ("auto" if labels is None else "classes")}
    if labels is None:
        details["leading"] = "silhouette"
    if settings.k == "threshold":
        details |= {"threshold": settings.threshold if settings.threshold is not None else threshold}
        details |= {"linkage": settings.linkage}
    if result.tried:
        details["silhouettes"] = {str(k): round(value, 6) for k, value in result.tried.items()}
    about: dict[str, Any] = {"n": len(features), "dim": features.shape[1], "distance": distance, "details": details}
    rows = [
        Measurement("clustering", kind, name, value, **about) for name, value in figures.items() if value is not None
    ]
    return tuple(rows), result


def by_size(groups: Int64[Tensor, " images"]) -> Int64[Tensor, " images"]:
    """Numbers clusters by their size, the largest first, equal ones by their first image.

    Examples:
        >>> by_size(torch.tensor([7, 2, 2])).tolist()
        [1, 0, 0]
    """
    _, first, inverse, counts = np.unique(
        groups.cpu().numpy(), return_index=True, return_inverse=True, return_counts=True
    )
    numbers = np.empty_like(counts)
    numbers[np.lexsort((first, -counts))] = np.arange(len(counts))
    return torch.from_numpy(numbers[inverse]).long()


def distances_to_centres(
    rows: Float[Tensor, "images dim"], groups: Int64[Tensor, " images"]
) -> Float[Tensor, " images"]:
    """Computes the Euclidean distance of each row to the mean of its group, on the CPU."""
    groups = groups.to(rows.device)
    sums = rows.new_zeros(int(groups.max()) + 1, rows.shape[1]).index_add_(0, groups, rows)
    centres = sums / groups.bincount().unsqueeze(1)
    pieces = [(part - centres[own]).norm(dim=1) for part, own in zip(rows.split(8192), groups.split(8192), strict=True)]
    return torch.cat(pieces).cpu()


def silhouette(rows: Float[Tensor, "images dim"], groups: Int64[Tensor, " images"], *, seed: int = 0) -> float | None:
    """Computes the mean silhouette of at most 2,000 images by scikit-learn; None if there is none."""
    ids = sample_ids(len(rows), SAMPLE, seed=seed)
    own = groups[ids]
    if not FEWEST <= len(own.unique()) < len(own):
        return None
    return float(silhouette_score(rows[ids.to(rows.device)].cpu().numpy(), own.numpy()))


def agreement_of(groups: Int64[Tensor, " images"], labels: Int[Tensor, " images"]) -> tuple[float, float, float, float]:
    """Computes NMI, AMI, purity and the B-cubed F of clusters and classes.

    B-cubed precision is the mean over images of the share of their cluster that has their class, recall that of the
    share of their class that is in their cluster.

    Examples:
        >>> [round(value, 2) for value in agreement_of(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]))]
        [0.34, 0.0, 0.75, 0.71]
    """
    truth, clusters = labels.cpu().numpy(), groups.cpu().numpy()
    nmi, ami = (score(truth, clusters) for score in (normalized_mutual_info_score, adjusted_mutual_info_score))
    table = contingency_matrix(clusters, truth, sparse=True).tocoo().astype(np.float64)
    sizes, totals = np.asarray(table.sum(1)).ravel(), np.asarray(table.sum(0)).ravel()
    squares = table.data**2
    precision = float((squares / sizes[table.row]).sum() / len(truth))
    recall = float((squares / totals[table.col]).sum() / len(truth))
    purity = float(table.max(axis=1).sum() / len(truth))
    return float(nmi), float(ami), purity, 2 * precision * recall / (precision + recall)
