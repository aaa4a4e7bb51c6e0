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
