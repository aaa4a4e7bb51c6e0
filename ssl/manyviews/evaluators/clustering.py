"""Clustering: agreement of k-means clusters of the features with the classes."""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from pydantic import Field
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import Tensor

from manyviews.config import Settings
from manyviews.evaluators.distance import Nearness


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
    groups = k_means(features, classes, settings, nearness=nearness, seed=seed).cpu().numpy()
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

    Examples:
        >>> first, second, third = k_means(torch.eye(2)[[0, 0, 1]], 2).tolist()
        >>> first == second, first == third
        (True, False)
    """
    settings = settings or ClusteringSettings()
    rows = F.normalize(features, dim=1, eps=1e-6) if nearness == "cosine" else features
    method = KMeans if len(rows) <= settings.most else MiniBatchKMeans
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters leave some empty, which the scores show.
        warnings.simplefilter("ignore", ConvergenceWarning)
        groups = method(clusters, n_init=settings.restarts, random_state=seed).fit_predict(rows.cpu().numpy())
    return torch.from_numpy(groups).long()
