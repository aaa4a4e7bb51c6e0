"""Choice of the triples of anchor, positive and negative of a batch by a sampler."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyviews.objectives.mining.batch import Batch
from manyviews.objectives.mining.samplers import (
    All,
    DistanceWeighted,
    Easiest,
    Hard,
    Hardest,
    Sampling,
    SemiHard,
    Which,
    WithinMargin,
)
from manyviews.objectives.mining.sphere import log_weights
from manyviews.system.keyed_random import uniform

FEW = 32
"""Positives of a row up to which a pass over the row for each is faster than sorting the row once."""
POSITIVES, NEGATIVES = 0, 1
"""Two streams of random numbers."""
EXCLUDED = 1e30
"""Subtracted from the log-weights of non-candidates: their weights are exactly 0."""


class Triples(NamedTuple):
    """Indices of the positives and negatives of some anchors."""

    positives: Int[Tensor, "rows positives"]
    negatives: Int[Tensor, "rows positives"] | None
    """One for each positive; None: all."""
    chosen: Bool[Tensor, "rows positives"]
    """Mask of the triples that exist: anchors may have fewer positives, and positives no negative."""
    figures: Float[Tensor, "3"]
    """Numbers of positive pairs, of those without a negative, and of those whose negative is a fallback."""

    def pairs(
        self, batch: Batch, rows: slice, products: Float[Tensor, "rows all"], push: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, "rows positives"], Float[Tensor, "rows negatives"], Int[Tensor, ""]]:
        """Products of positive pairs, `push` of those of negative pairs, number of negative pairs.

        Each pair of the triples counts once; pairs that are not in the triples are pushed by 0.
        """
        if self.negatives is None:
            compared = self.chosen.any(1)
            pushes = push(products).scatter(1, batch.mates(rows), 0) * compared[:, None]
            return products.gather(1, self.positives), pushes, (batch.negatives(rows) * compared).sum()
        near, far = products.gather(1, torch.cat([self.positives, self.negatives], 1)).tensor_split(2, 1)
        return near, push(far).where(self.chosen, 0), self.chosen.sum()


@torch.no_grad()
def choose(sampling: Sampling, batch: Batch, rows: slice, products: Float[Tensor, "rows all"]) -> Triples:
    """Samples the triples of some anchors from their products with all candidates; no gradient.

    Random draws depend only on the seed, the step and the indices of anchor and positive in the whole batch.
    """
    nearness = batch.nearness(products)
    positives, there = _positives(sampling.positives, batch, rows, nearness)
    negatives, available, fallback = _negatives(sampling, batch, rows, nearness, positives)
    chosen = there & available
    figures = [there.sum(), (there & ~available).sum(), (chosen & fallback).sum()]
    return Triples(positives, negatives, chosen, torch.stack(figures).to(products.dtype))


def draw(
    sampling: DistanceWeighted,
    cosines: Float[Tensor, "rows all"],
    mates: Int[Tensor, "rows members"],
    shares: Float[Tensor, "rows positives"],
    dim: int,
) -> tuple[Int[Tensor, "rows positives"], Bool[Tensor, "rows positives"]]:
    """Draws indices for each row by its weights, with a mask: false if a row has no candidate.

    Candidates are all but the row's `mates`, nearer than `farthest`. The weights are divided by the largest of the
    row's candidates: by the largest of all rows, as in the authors' code, a row whose candidates are far would have
    only zeros. A draw is the index at which the cumulated weights first exceed a uniform share of their sum.
    """
    bound = -math.inf if sampling.farthest is None else 1 - sampling.farthest**2 / 2
    # In floating point: comparisons and masks take many times as long on a CPU.
    candidates = (cosines - bound).relu_().sign_().scatter_(1, mates, 0)
    weights = log_weights(cosines, dim, sampling.cutoff).mul_(candidates).add_(candidates - 1, alpha=EXCLUDED)
    highest = weights.amax(1, keepdim=True)
    weights.sub_(highest).exp_()
    cumulated = weights.cumsum(1)
    sums = cumulated[:, -1:]
    targets = (shares.to(sums.dtype) * sums).minimum(torch.nextafter(sums, torch.zeros_like(sums)))
    drawn = torch.searchsorted(cumulated, targets, right=True).clamp(max=cosines.shape[1] - 1)
    # A device that adds in parallel may cumulate a little of what has no weight: that is no candidate either.
    return drawn, (weights.gather(1, drawn) > 0) & (highest > -EXCLUDED / 2)


def _positives(which: Which, batch: Batch, rows: slice, nearness: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the positives, and a mask of those that exist."""
    positives, there = batch.positives(rows)
    if which == "all" or not positives.numel():
        return positives, there
    if which == "random":
        shares = uniform(batch.indices[rows, None], *batch.key, POSITIVES)
        count = batch.positive_counts(rows)[:, None]
        column = (shares.double() * count).long().minimum((count - 1).clamp(min=0))
    else:
        sign = 1 if which == "easy" else -1
        column = (sign * nearness.gather(1, positives)).masked_fill_(~there, -math.inf).argmax(1, keepdim=True)
    return positives.gather(1, column), there.gather(1, column)


def _negatives(
    sampling: Sampling, batch: Batch, rows: slice, nearness: Tensor, positives: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Index of a negative for each positive (None: all), masks of existing ones and fallbacks."""
    available = (batch.negatives(rows)[:, None] > 0).expand_as(positives)
    none = torch.zeros_like(positives, dtype=torch.bool)
    if isinstance(sampling, All) or not positives.numel():
        return None, available, none
    mates = batch.mates(rows)
    match sampling:
        case Easiest():
            return _easiest(nearness, mates).expand_as(positives), available, none
        case Hardest():
            return _hardest(nearness, mates).expand_as(positives), available, none
        case Hard():
            nearest = _hardest(nearness, mates).expand_as(positives)
            return nearest, available & (nearness.gather(1, nearest) > nearness.gather(1, positives)), none
        case SemiHard():
            own, others = nearness.gather(1, positives), nearness.scatter(1, mates, -math.inf)
            negatives = _next_farther(others, own)
            value = others.gather(1, negatives)
            farther = (value < own) & (value > -math.inf)
            if sampling.fallback is None:
                return negatives, farther, none
            fallback = (_easiest if sampling.fallback == "easiest" else _hardest)(nearness, mates)
            return negatives.where(farther, fallback), available, ~farther
    shares = uniform(batch.indices[rows, None] * nearness.shape[1] + positives, *batch.key, NEGATIVES)
    if isinstance(sampling, WithinMargin):
        if sampling.margin is None or sampling.squared is None:
            raise ValueError(
                "sampling=within_margin has no margin; complete it by `of_objective`, or set both its keys"
            )
        own, others = nearness.gather(1, positives), nearness.scatter(1, mates, math.inf)
        negatives, within = _between(others, batch.moved(own, sampling.margin, squared=sampling.squared), own, shares)
        return negatives, available & within, none
    anywhere = batch.negative_at(rows, shares)
    if not isinstance(sampling, DistanceWeighted):
        return anywhere, available, none
    drawn, candidates = draw(sampling, nearness, mates, shares, batch.dim)
    return drawn.where(candidates, anywhere), available, ~candidates


def _easiest(nearness: Tensor, mates: Tensor) -> Tensor:
    """Index of each row's farthest negative, as a column."""
    return nearness.scatter(1, mates, math.inf).argmin(1, keepdim=True)


def _hardest(nearness: Tensor, mates: Tensor) -> Tensor:
    """Index of each row's nearest negative, as a column."""
    return nearness.scatter(1, mates, -math.inf).argmax(1, keepdim=True)


def _next_farther(others: Tensor, own: Tensor) -> Tensor:
    """Index of the largest of the others below each of a row's own numbers, if there is one."""
    if own.shape[1] <= FEW:
        # A threshold in place of a mask: a mask takes thirty times as long on a CPU.
        gaps = (F.threshold(own[:, column, None] - others, 0, math.inf) for column in range(own.shape[1]))
        return torch.stack([gap.argmin(1) for gap in gaps], 1)
    ordered, order = others.sort(1)
    return order.gather(1, (torch.searchsorted(ordered, own) - 1).clamp(min=0))


def _between(
    others: Float[Tensor, "rows all"],
    lows: Float[Tensor, "rows positives"],
    highs: Float[Tensor, "rows positives"],
    shares: Float[Tensor, "rows positives"],
) -> tuple[Int[Tensor, "rows positives"], Bool[Tensor, "rows positives"]]:
    """Index at these shares of each row's numbers strictly between two bounds, and whether there is one."""
    ordered, order = others.sort(dim=1, stable=True)
    first = torch.searchsorted(ordered, lows, right=True)
    count = torch.searchsorted(ordered, highs) - first
    # In float64: float32 has fewer numbers than a large batch has negatives.
    number = (shares.double() * count).long().minimum(count - 1).clamp(min=0)
    return order.gather(1, (first + number).clamp(max=others.shape[1] - 1)), count > 0
