"""Distance-weighted sampling: negatives as likely at each distance as the sphere makes such distances rare."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EXCLUDED = 1e30
"""Subtracted from the logarithm of the weight of what must not be drawn: its exponential is exactly 0."""


def log_weights(cosines: Float[Tensor, "*pairs"], dim: int, cutoff: float) -> Float[Tensor, "*pairs"]:
    """The logarithm of min(λ, 1 / q(d)), up to a constant, from cosines of unit vectors (Wu et al. 2017, section 4.1).

    q(d) ∝ d^(n−2) (1 − d²/4)^((n−3)/2) is the density of the distance of two points that are uniform on the sphere in
    n dimensions. λ is given as a distance, as in the authors' code: pairs nearer than `cutoff` weigh as those at it.
    With d² = 2 − 2s both factors are powers: of 1 − s and of 1 + s. In two and three dimensions the second one's
    exponent is negative or zero, which needs nothing special; two opposite points, where it is singular, count as
    being a little less far apart.
    """
    least = torch.finfo(cosines.dtype).eps
    cosines = cosines.clamp(least - 1, 1 - cutoff**2 / 2)
    near, far = (1 - cosines).log_(), (1 + cosines).log_()
    return near.mul_(1 - dim / 2).add_(far, alpha=(3 - dim) / 2)


def draw(
    cosines: Float[Tensor, "rows all"],
    mates: Int[Tensor, "rows members"],
    uniform: Float[Tensor, "rows positives"],
    dim: int,
    cutoff: float,
    farthest: float | None,
) -> tuple[Int[Tensor, "rows positives"], Bool[Tensor, "rows positives"]]:
    """The places drawn for each row by its weights, and whether they are candidates: false where a row has none.

    Candidates are all but the row's `mates`, nearer than `farthest`. The weights are divided by the largest of the
    row's candidates: by the largest of all rows, as in the authors' code, a row whose candidates are far would have
    only zeros. A draw is the place at which the cumulated weights first exceed a uniform share of their sum.
    """
    bound = -math.inf if farthest is None else 1 - farthest**2 / 2
    # In floating point: comparisons and masks take many times as long on a CPU.
    candidates = (cosines - bound).relu_().sign_().scatter_(1, mates, 0)
    weights = log_weights(cosines, dim, cutoff).mul_(candidates).add_(candidates - 1, alpha=EXCLUDED)
    highest = weights.amax(1, keepdim=True)
    weights.sub_(highest).exp_()
    cumulated = weights.cumsum(1)
    sums = cumulated[:, -1:]
    below = torch.nextafter(sums, torch.zeros_like(sums))
    shares = (uniform.to(sums.dtype) * sums).minimum(below)
    places = torch.searchsorted(cumulated, shares, right=True).clamp(max=cosines.shape[1] - 1)
    # A device that adds in parallel may cumulate a little of what weighs nothing: that is no candidate either.
    return places, (weights.gather(1, places) > 0) & (highest > -EXCLUDED / 2)
