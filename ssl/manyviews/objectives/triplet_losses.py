"""Losses of triplets from the distances of positive and negative, and their sum over all triplets."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyviews.objectives.losses import softplus, with_gradient

Form = Literal["hinge", "soft", "softmax", "ratio"]

FEW = 32
"""Positives of a row up to which a pass over the row for each is faster than a search among them."""


def all_triplets(
    distances: Float[Tensor, "rows all"],
    positives: Int[Tensor, "rows positives"],
    there: Bool[Tensor, "rows positives"],
    mates: Int[Tensor, "rows members"],
    form: Form,
    margin: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum of the losses of all triplets of some rows, and number of those above 0.

    `distances` are those of the anchors from all candidates, `positives` the indices of each row's positives with their
    mask `there`, `mates` the indices that are no negatives.
    """
    with torch.no_grad():
        # A positive at −∞ and a negative at ∞ are in no triplet that costs anything.
        own = distances.gather(1, positives).masked_fill_(~there, -torch.inf)
        others = distances.scatter(1, mates, torch.inf)
        if form == "hinge" and own.shape[1] > FEW:
            total, own_weights, weights = _by_search(own + margin, others)
            active = own_weights.sum()
        else:
            total, active, own_weights, weights = _by_passes(own, others, form, margin)
        weights.scatter_add_(1, positives, own_weights)
    # Autograd would keep a tile for each positive.
    return with_gradient(distances, total, weights), active


class Penalties(NamedTuple):
    """Losses of triplets, and how fast they grow."""

    losses: Float[Tensor, "*triplets"]
    by_positive: Float[Tensor, "*triplets"]
    """Derivatives in the distance of the positive."""
    by_negative: Float[Tensor, "*triplets"]
    """Derivatives in the distance of the negative, times −1: how fast the loss falls."""


def penalties(
    positive: Float[Tensor, "*#triplets"], negative: Float[Tensor, "*#triplets"], form: Form, margin: float
) -> Penalties:
    """Losses of triplets from the distances of positives and negatives; 0 at −∞ of the first or ∞ of the second."""
    difference = positive - negative
    match form:
        case "hinge":
            losses = (difference + margin).relu()
            slopes = losses.sign()
            return Penalties(losses, slopes, slopes)
        case "soft":
            slopes = difference.sigmoid()
            return Penalties(softplus(difference), slopes, slopes)
        case "softmax":
            share = difference.sigmoid()
            slopes = 2 * share.square() * (1 - share)
            return Penalties(share.square(), slopes, slopes)
        case "ratio":
            # A squared distance may be a rounding error below 0.
            least = positive.clamp(min=0) + margin
            losses = (difference + margin).relu() / least
            slopes = losses.sign() / least
            return Penalties(losses, (1 - losses) * slopes, slopes)


def _by_passes(own: Tensor, others: Tensor, form: Form, margin: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, number of active triplets, and derivatives in the positives and in the negatives."""
    totals, counts = torch.zeros_like(own), torch.zeros_like(own)
    own_weights, weights = torch.zeros_like(own), torch.zeros_like(others)
    for column in range(own.shape[1]):
        losses, rises, falls = penalties(own[:, column, None], others, form, margin)
        totals[:, column], own_weights[:, column] = losses.sum(1), rises.sum(1)
        counts[:, column] = own_weights[:, column] if form == "hinge" else losses.sign().sum(1)
        weights -= falls
    return totals.sum(), counts.sum(), own_weights, weights


def _by_search(limits: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, and derivatives in the positives (counts of negatives) and in the negatives.

    A negative at d is in an active triplet with each positive whose limit, its distance plus the margin, is above d.
    A search in the sorted limits finds the first of them: their number and, by cumulated sums from the end, the sum of
    their limits give the loss of all triplets of the negative at once.
    """
    ordered, order = limits.sort(1)
    count = ordered.shape[1]
    firsts = torch.searchsorted(ordered, others, right=True)
    # From each index to the end; 0 past the end. Limits of −∞ come first and are above nothing.
    sums = F.pad(ordered.flip(1).cumsum(1).flip(1), (0, 1))
    weights = (count - firsts).to(others.dtype)
    total = (sums.gather(1, firsts) - weights * others.where(firsts < count, 0)).sum()
    counts = torch.zeros_like(sums).scatter_add_(1, firsts, torch.ones_like(others))
    own_weights = torch.zeros_like(limits).scatter_(1, order, counts.cumsum(1)[:, :-1])
    return total, own_weights, weights.neg_()
