"""Distances of points that are uniform on the unit sphere: their density, and weights by its inverse."""

import torch
from jaxtyping import Float
from torch import Tensor


def log_weights(cosines: Float[Tensor, "*pairs"], dim: int, cutoff: float) -> Float[Tensor, "*pairs"]:
    """Log of min(λ, 1 / q(d)), up to a constant, from cosines (Wu et al. 2017, section 4.1).

    q(d) ∝ d^(n−2) (1 − d²/4)^((n−3)/2) is the density of the distance of two points that are uniform on the sphere in n
    dimensions. λ is given as a distance, as in the authors' code: pairs nearer than `cutoff` weigh as those at it. With
    d² = 2 − 2s the factors are powers of 1 − s and of 1 + s. Where the second one is singular, in two dimensions at
    opposite points, these count as a little less far apart.
    """
    least = torch.finfo(cosines.dtype).eps
    cosines = cosines.clamp(least - 1, 1 - cutoff**2 / 2)
    near, far = (1 - cosines).log_(), (1 + cosines).log_()
    return near.mul_(1 - dim / 2).add_(far, alpha=(3 - dim) / 2)


def density(distances: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
    """Density q(d) of the distance of two points that are uniform on the unit sphere (Wu et al. 2017, section 4.1).

    q(d) = (d/2)^(n−2) (1 − d²/4)^((n−3)/2) / B((n−1)/2, (n−1)/2) for 0 < d < 2, which integrates to 1: d²/4 has the
    distribution Beta((n−1)/2, (n−1)/2). The paper leaves the constant B out. In many dimensions it is nearly the normal
    distribution around √2 with variance 1/(2n).

    Raises:
        ValueError: in fewer than two dimensions.

    Examples:
        >>> density(torch.tensor([0.5, 1.0, 1.5]), 3).tolist()  # in three dimensions d / 2
        [0.25, 0.5, 0.75]
    """
    if dim < 2:
        raise ValueError(f"dim {dim}: the unit sphere has distances between 0 and 2 in two dimensions or more")
    half = (distances / 2).clamp(torch.finfo(distances.dtype).tiny, 1 - torch.finfo(distances.dtype).eps)
    shape = torch.tensor((dim - 1) / 2, dtype=torch.float64)
    constant = (2 * shape.lgamma() - (2 * shape).lgamma()).item()
    inside = (distances > 0) & (distances < 2)
    powers = (dim - 2) * half.log() + (dim - 3) / 2 * torch.log1p(-half.square())
    return (powers - constant).exp().where(inside, 0)
