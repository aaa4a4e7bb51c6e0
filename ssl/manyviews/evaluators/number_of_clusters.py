"""The number of clusters: by silhouettes, or by a threshold at which merging ends."""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import silhouette_score
from torch import Tensor

from manyviews.data import sample_ids
from manyviews.engine import directions
from manyviews.evaluators.distance import Nearness
from manyviews.evaluators.k_means import k_means

Linkage = Literal["average", "complete"]
SAMPLE = 2_000
"""Images that silhouettes are computed of: the time grows with the square of their number."""
FEWEST = 2
STARTS = 3
"""Starts of k-means for each number that is tried, at most."""
STEP = 1.17
"""Ratio of two numbers that are tried, above 7: the silhouette changes slowly there."""
MOST_MERGED = 10_000
"""Images that are merged at most: the distances of all pairs of them take 400 MB."""


def numbers_to_try(largest: int) -> list[int]:
    """Returns the numbers of clusters that are tried: 2 to 8, then every sixth or so.

    Examples:
        >>> numbers_to_try(20)
        [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20]
    """
    numbers = [FEWEST]
    while numbers[-1] < largest:
        numbers.append(min(max(numbers[-1] + 1, int(numbers[-1] * STEP)), largest))
    return numbers


def choose_k(
    rows: Float[Tensor, "images dim"], largest: int, *, restarts: int = STARTS, seed: int = 0
) -> dict[int, float]:
    """Returns the mean silhouette (Rousseeuw 1987) of k-means for each number of clusters tried.

    At most 2,000 images, drawn by the seed, are clustered. A number is left out if as many different rows do not exist.

    Raises:
        ValueError: if there are not 3 images, or all have the same features.

    Examples:
        >>> points = torch.tensor([[0.0], [0.1], [5.0], [5.1], [9.0], [9.1]])
        >>> values = choose_k(points, 5)
        >>> max(values, key=values.get)
        3
    """
    ids = sample_ids(len(rows), SAMPLE, seed=seed)
    some = rows[ids.to(rows.device)]
    host = some.cpu().numpy()
    values: dict[int, float] = {}
    for k in numbers_to_try(min(largest, len(some) - 1)) if len(some) > FEWEST else []:
        groups = k_means(some, k, restarts=min(restarts, STARTS), seed=seed)
        if len(groups.unique()) == k:
            values[k] = float(silhouette_score(host, groups.numpy()))
    if not values:
        raise ValueError(
            f"no number of clusters can be chosen for {len(rows):,} images: 3 with different features are needed"
        )
    return values


def agglomerate(
    rows: Float[Tensor, "images dim"], threshold: float, linkage: Linkage, nearness: Nearness
) -> Int64[Tensor, " images"]:
    """Merges the two nearest clusters until they are farther apart than a threshold.

    The agglomerative clustering by which Schroff et al. 2015, section 5.8, cluster faces; they name no linkage.
    `threshold` is a cosine, or a Euclidean distance; the mean of 1 − cosine over the pairs of two clusters is then half
    the mean of their squared distances. It is computed by scikit-learn, on the CPU.

    Examples:
        >>> agglomerate(torch.tensor([[0.0], [1.0], [9.0]]), 2.0, "average", "euclidean").tolist()
        [0, 0, 1]
    """
    # A zero row has no cosine: all of them coincide, at right angles to the others.
    points = directions(rows) if nearness == "cosine" else rows
    distance = 1 - threshold if nearness == "cosine" else threshold
    # At the threshold itself two clusters are still merged.
    above = torch.tensor(distance, dtype=torch.float64).nextafter(torch.tensor(torch.inf, dtype=torch.float64)).item()
    merged = AgglomerativeClustering(
        None, metric=nearness, linkage=linkage, distance_threshold=max(above, 0.0)
    ).fit_predict(points.double().cpu().numpy())
    return torch.from_numpy(merged).long()
