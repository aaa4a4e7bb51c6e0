"""k-means by scikit-learn, or on a GPU from the same starts."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from sklearn.cluster import KMeans, MiniBatchKMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

STEPS, SHIFT = 300, 1e-4
"""Steps of k-means at most, and the squared shift of all centres, in mean variances, that ends it; scikit-learn's."""
MOST = 50_000
"""Number of images above which k-means uses mini-batches, by default."""


def k_means(
    features: Float[Tensor, "images dim"],
    clusters: int,
    *,
    restarts: int = 10,
    most: int = MOST,
    seed: int = 0,
) -> Int64[Tensor, " images"]:
    """Returns the cluster of each image by scikit-learn's k-means, deterministic for a seed.

    Of `restarts` starts (k-means++), the one with the least squared distances counts; above `most` images, mini-batches
    are used. On a GPU the steps are computed there, from the same starts; mini-batches are scikit-learn's own. The
    result is on the CPU.

    Examples:
        >>> first, second, third = k_means(torch.eye(2)[[0, 0, 1]], 2).tolist()
        >>> first == second, first == third
        (True, False)
    """
    if features.device.type == "cuda" and len(features) <= most:
        return _on_gpu(features, clusters, restarts, seed).cpu()
    method = KMeans if len(features) <= most else MiniBatchKMeans
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters leave some empty, which the scores show.
        warnings.simplefilter("ignore", ConvergenceWarning)
        groups = method(clusters, n_init=restarts, random_state=seed).fit_predict(features.cpu().numpy())
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
