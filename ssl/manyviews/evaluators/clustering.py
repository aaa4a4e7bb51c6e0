"""Clustering: agreement of k-means clusters of the features with the classes."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from pydantic import Field
from sklearn.cluster import KMeans, MiniBatchKMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import Tensor

from manyviews.config import Settings
from manyviews.evaluators.distance import Nearness

STEPS, SHIFT = 300, 1e-4
"""Steps of k-means at most, and the squared shift of all centres, in mean variances, that ends it; scikit-learn's."""


class ClusteringSettings(Settings):
    """Settings of k-means."""

    restarts: int = Field(10, ge=1, le=10_000)
    """Starts of k-means (k-means++); the one with the least squared distances counts."""
    most: int = Field(50_000, ge=1, le=10_000_000)
    """Number of images above which k-means uses mini-batches, which are faster and a little worse."""


class ClusteringResult(NamedTuple):
    """Mutual information of clusters and classes."""

    nmi: float
    """Normalised mutual information, 2 I / (H(clusters) + H(classes)); above 0 by chance, more so for many clusters."""
    ami: float
    """Adjusted mutual information (Vinh et al. 2010): 0 for random clusters, 1 for perfect ones."""


def clustering(
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"],
    settings: ClusteringSettings | None = None,
    *,
    nearness: Nearness = "cosine",
    seed: int = 0,
) -> ClusteringResult:
    """Clusters the images into as many groups as classes, and compares the two.

    Features are normalised for the cosine. Images labelled −1 are left out.

    Raises:
        ValueError: if the images have fewer than 2 classes.
    """
    features, labels = features[labels >= 0], labels[labels >= 0]
    classes = len(labels.unique())
    if classes < 2:
        raise ValueError(f"images of {classes} class{'' if classes == 1 else 'es'} cannot be clustered; give 2 or more")
    groups = k_means(features, classes, settings, nearness=nearness, seed=seed).numpy()
    truth = labels.cpu().numpy()
    nmi, ami = (score(truth, groups) for score in (normalized_mutual_info_score, adjusted_mutual_info_score))
    return ClusteringResult(float(nmi), float(ami))


def k_means(
    features: Float[Tensor, "images dim"],
    clusters: int,
    settings: ClusteringSettings | None = None,
    *,
    nearness: Nearness = "cosine",
    seed: int = 0,
) -> Int64[Tensor, " images"]:
    """Returns the cluster of each image by scikit-learn's k-means, deterministic for a seed.

    On a GPU its steps are computed there, from the same starts; mini-batches are scikit-learn's own. The result is on
    the CPU.

    Examples:
        >>> first, second, third = k_means(torch.eye(2)[[0, 0, 1]], 2).tolist()
        >>> first == second, first == third
        (True, False)
    """
    settings = settings or ClusteringSettings()
    rows = F.normalize(features, dim=1, eps=1e-6) if nearness == "cosine" else features
    if rows.device.type == "cuda" and len(rows) <= settings.most:
        return _on_gpu(rows, clusters, settings.restarts, seed).cpu()
    method = KMeans if len(rows) <= settings.most else MiniBatchKMeans
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters leave some empty, which the scores show.
        warnings.simplefilter("ignore", ConvergenceWarning)
        groups = method(clusters, n_init=settings.restarts, random_state=seed).fit_predict(rows.cpu().numpy())
    return torch.from_numpy(groups).long()


def _on_gpu(rows: Tensor, clusters: int, restarts: int, seed: int) -> Tensor:
    """The cluster of each row by the start with the least squared distances; Lloyd's algorithm."""
    rows = rows - rows.mean(0)
    host, draws = rows.cpu().numpy(), np.random.RandomState(seed)
    least, best = torch.full((), torch.inf, device=rows.device), torch.empty(0)
    bound = SHIFT * rows.var(0, correction=0).mean()
    squares = rows.square().sum(1)
    for _ in range(restarts):
        centres = torch.from_numpy(kmeans_plusplus(host, clusters, random_state=draws)[0]).to(rows)
        groups = torch.full((len(rows),), -1, device=rows.device)
        for _ in range(STEPS):
            previous, (groups, distances) = groups, _nearest(rows, squares, centres)
            members = F.one_hot(groups, clusters).to(rows.dtype).T
            sizes, before = members.sum(1, keepdim=True), centres
            centres = (members @ rows) / sizes.clamp(min=1)
            # Empty clusters move to the rows that are farthest from their centres.
            farthest = rows[distances.topk(min(clusters, len(rows))).indices]
            place = ((sizes == 0).cumsum(0) - 1).clamp(0, len(farthest) - 1)
            centres = torch.where(sizes == 0, farthest[place.squeeze(1)], centres)
            if bool((groups == previous).all() | ((centres - before).square().sum() <= bound)):
                break
        groups, distances = _nearest(rows, squares, centres)
        total = distances.sum()
        best = torch.where(total < least, groups, best) if len(best) else groups
        least = torch.minimum(total, least)
    return best


def _nearest(rows: Tensor, squares: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, and its squared distance."""
    distances = torch.addmm(centres.square().sum(1), rows, centres.T, alpha=-2)
    nearest = distances.min(1)
    return nearest.indices, (nearest.values + squares).clamp(min=0)
