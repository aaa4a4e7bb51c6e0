"""Features as points in the plane, by principal components, t-SNE or UMAP."""

import importlib
import warnings
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

Method = Literal["pca", "tsne", "umap"]

DIRECTIONS = 50
"""Principal components that t-SNE and UMAP get, to save noise and cost (van der Maaten & Hinton 2008, section 4.2, take
30)."""
STEPS = 500
"""Steps of t-SNE, half of scikit-learn's default: the neighbours of a few thousand points are in place by then."""


@torch.no_grad()
def flat_map(features: Float[Tensor, "images dim"], method: Method, *, seed: int) -> Float[Tensor, "images 2"]:
    """Maps features to float32 points in the plane; deterministic for a seed.

    Principal components keep large distances; t-SNE and UMAP keep neighbours, and their distances and sizes of groups
    mean little. Both start from the first two components.

    Raises:
        ValueError: if there are fewer than 3 images, numbers that are not finite, or umap-learn is not installed.

    Examples:
        >>> flat_map(torch.eye(6), "pca", seed=0).shape
        torch.Size([6, 2])
    """
    if len(features) < 3:
        raise ValueError(f"a map takes 3 images or more, and there are {len(features)}")
    if not torch.isfinite(features).all():
        raise ValueError("a map takes finite features, and some are not")
    if method == "pca":
        return principal_components(features, 2).float()
    components = principal_components(features, DIRECTIONS)
    start = components[:, :2] / components[:, 0].std().clamp(min=1e-12)
    points = _tsne(components, start, seed) if method == "tsne" else _umap(components, start, seed)
    return torch.as_tensor(points, dtype=torch.float32)


def principal_components(features: Float[Tensor, "images dim"], count: int) -> Float[Tensor, "images count"]:
    """Computes the first principal components, float64 on the CPU, padded with zeros.

    The largest weight of each component is positive, which fixes the sign.
    """
    rows = features.cpu().double().numpy()
    present = min(count, *rows.shape)
    # The faster of the two: by the covariance of the dimensions, or by singular values of few images.
    solver: Literal["covariance_eigh", "full"] = "covariance_eigh" if len(rows) >= rows.shape[1] else "full"
    with np.errstate(invalid="ignore", divide="ignore"):
        # For equal images the shares of the variance are 0 / 0.
        points = PCA(present, svd_solver=solver).fit_transform(rows)
    return F.pad(torch.from_numpy(points), (0, count - present))


def _tsne(components: Tensor, start: Tensor, seed: int) -> Any:
    # scikit-learn's own start, with fixed signs. It sums over threads in any order, and idle threads spin: one thread
    # is deterministic, and no slower on a busy machine.
    perplexity = min(30.0, (len(components) - 1) / 3)
    model = TSNE(perplexity=perplexity, init=(1e-4 * start).float().numpy(), random_state=seed, max_iter=STEPS)
    with threadpool_limits(1, "openmp"):
        return model.fit_transform(components.float().numpy())


def _umap(components: Tensor, start: Tensor, seed: int) -> Any:
    with warnings.catch_warnings():
        # umap-learn warns about its own dependencies, and that a seed leaves it one thread.
        warnings.simplefilter("ignore")
        try:
            umap = importlib.import_module("umap")
        except ImportError as problem:
            raise ValueError(
                "a map by UMAP needs umap-learn, which is not installed: pip install 'manyviews[umap]', or take "
                "t-SNE or PCA"
            ) from problem
        # It divides by the width of its start, which may be 0.
        start = start + 1e-3 * torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        neighbours = min(15, len(components) - 1)
        model = umap.UMAP(n_neighbors=neighbours, init=start.float().numpy(), random_state=seed, n_jobs=1)
        return model.fit_transform(components.float().numpy())
