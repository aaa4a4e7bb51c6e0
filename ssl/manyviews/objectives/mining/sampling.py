"""The ways to sample, chosen by name, and the triples of anchor, positive and negative that they give."""

import math
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from manyviews.config import Settings
from manyviews.objectives.mining.batch import Batch
from manyviews.objectives.mining.distance_weighted import draw
from manyviews.system.keyed_random import uniform

FEW = 32
"""Positives of a row up to which a pass over the row for each is faster than sorting the row once."""
POSITIVES, NEGATIVES = 0, 1
"""Two streams of random numbers."""

Which = Literal["all", "random", "easy", "hard"]


class Sampler(Settings):
    """What all ways to sample have in common."""

    positives: Which = "all"
    """Of each anchor: all, one at random, the nearest (easy) or the farthest (hard)."""


class All(Sampler):
    """Every positive with every negative."""

    name: Literal["all"] = "all"


class Random(Sampler):
    """For each positive one negative, all equally likely."""

    name: Literal["random"] = "random"


class Easiest(Sampler):
    """The farthest negative: what is left to learn is little."""

    name: Literal["easiest"] = "easiest"


class SemiHard(Sampler):
    """For each positive the nearest of the negatives that are farther (FaceNet: Schroff et al. 2015, equation 4).

    Where no negative is farther than the positive there is none, and the paper does not say what then. By default the
    farthest negative is used, as by TensorFlow's `triplet_semihard_loss`; the term `fallback` says how often.
    pytorch-metric-learning leaves such positives out (fallback=null).
    """

    name: Literal["semi_hard"] = "semi_hard"
    fallback: Literal["easiest", "hardest"] | None = "easiest"
    """The negative of a positive that is farther than all negatives: the farthest (easiest), which is the nearest to
    being semi-hard, or the nearest (hardest), with the largest loss; null: such positives are left out."""


class Hard(Sampler):
    """For each positive the nearest negative, if it is nearer than the positive: d(a, n) < d(a, p).

    Positives that are nearer than all negatives are left out, and counted: no negative is hard for them.
    """

    name: Literal["hard"] = "hard"


class Hardest(Sampler):
    """The nearest negative; by default with the farthest positive: batch-hard (Hermans et al. 2017, equation 5).

    The nearest negative need not be nearer than the positive. With the nearest positive (positives=easy) it is what
    Xuan et al. 2020 propose.
    """

    name: Literal["hardest"] = "hardest"
    positives: Which = "hard"
    """Of each anchor: all, one at random, the nearest (easy) or the farthest (hard)."""


class DistanceWeighted(Sampler):
    """For each positive one negative, as likely as its distance is rare on the sphere (Wu et al. 2017, section 4.1).

    Where a row has no candidate, one of its negatives is drawn, all equally likely: the authors' code then draws from
    the whole batch, the anchor's own class included.
    """

    name: Literal["distance_weighted"] = "distance_weighted"
    cutoff: float = Field(0.5, gt=0, lt=2)
    """Distance below which negatives weigh as much as at it; bounds the variance of the gradient."""
    farthest: float | None = Field(1.4, gt=0, le=1e4)
    """Distance from which negatives are no candidates, for the loss ignores them; null: all are candidates."""

    @model_validator(mode="after")
    def _room_for_candidates(self) -> "DistanceWeighted":
        if self.farthest is not None and self.farthest <= self.cutoff:
            raise ValueError(
                f"farthest {self.farthest} must be beyond cutoff {self.cutoff}; set farthest=null for no bound"
            )
        return self


Sampling = Annotated[All | Random | Easiest | SemiHard | Hard | Hardest | DistanceWeighted, Field(discriminator="name")]


class Triples(NamedTuple):
    """The places of the positives and negatives that some anchors are compared with."""

    positives: Int[Tensor, "rows positives"]
    negatives: Int[Tensor, "rows positives"] | None
    """One for each positive; None: all."""
    chosen: Bool[Tensor, "rows positives"]
    """Which of them there are: not every anchor has as many positives, and not each of these a negative."""
    figures: Float[Tensor, "3"]
    """Positive pairs; those without a negative; those whose negative is no candidate of the sampling (a fallback)."""


def choose(sampling: Sampling, batch: Batch, rows: slice, products: Float[Tensor, "rows all"]) -> Triples:
    """The triples of some anchors, from their products with all candidates: a pure function, without gradient.

    What is random depends on the seed, the step and the places of anchor and positive in the whole batch alone.
    """
    with torch.no_grad():
        classes, nearness = batch.classes, batch.nearness(products)
        positives, there = _positives(sampling.positives, batch, rows, nearness)
        some = classes.negatives(rows)[:, None] > 0
        found, drawn = some.expand_as(there), torch.zeros_like(there)
        negatives: Tensor | None = None
        if positives.numel():
            negatives, found, drawn = _negatives(sampling, batch, rows, nearness, positives, found, drawn)
        chosen = there & found
        figures = [there.sum(), (there & ~found).sum(), (chosen & drawn).sum()]
        return Triples(positives, negatives, chosen, torch.stack(figures).to(products.dtype))


def refuse_off_sphere(sampling: Sampling, normalized: bool) -> None:
    """Raises ValueError for distance-weighted sampling of points that are not on the unit sphere."""
    if isinstance(sampling, DistanceWeighted) and not normalized:
        raise ValueError(
            "sampling=distance_weighted knows how distances are spread on the unit sphere only; set normalized=true, "
            "or use another sampling"
        )


def _positives(which: Which, batch: Batch, rows: slice, nearness: Tensor) -> tuple[Tensor, Tensor]:
    classes = batch.classes
    positives, there = classes.positives(rows)
    if which == "all" or not positives.numel():
        return positives, there
    if which == "random":
        shares = uniform(classes.places[rows, None], *batch.key, POSITIVES)
        count = classes.members[rows, None] - 1
        column = (shares.double() * count).long().minimum((count - 1).clamp(min=0))
    else:
        sign = 1 if which == "easy" else -1
        column = (sign * nearness.gather(1, positives)).masked_fill_(~there, -math.inf).argmax(1, keepdim=True)
    return positives.gather(1, column), there.gather(1, column)


def _negatives(
    sampling: Sampling,
    batch: Batch,
    rows: slice,
    nearness: Tensor,
    positives: Tensor,
    found: Tensor,
    drawn: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """A negative for each positive, whether there is one, and whether it is a fallback for want of candidates."""
    classes = batch.classes
    match sampling:
        case All():
            return None, found, drawn
        case Easiest():
            return _easiest(nearness, classes.mates(rows)).expand_as(positives), found, drawn
        case Hardest():
            return _hardest(nearness, classes.mates(rows)).expand_as(positives), found, drawn
        case Hard():
            nearest = _hardest(nearness, classes.mates(rows)).expand_as(positives)
            return nearest, found & (nearness.gather(1, nearest) > nearness.gather(1, positives)), drawn
        case SemiHard():
            mates, own = classes.mates(rows), nearness.gather(1, positives)
            others = nearness.scatter(1, mates, -math.inf)
            negatives = _next_farther(others, own)
            value = others.gather(1, negatives)
            farther = (value < own) & (value > -math.inf)
            if sampling.fallback is None:
                return negatives, farther, drawn
            fallback = (_easiest if sampling.fallback == "easiest" else _hardest)(nearness, mates)
            return negatives.where(farther, fallback), found, ~farther
    shares = uniform(classes.places[rows, None] * nearness.shape[1] + positives, *batch.key, NEGATIVES)
    anywhere = classes.negative_at(rows, shares)
    if isinstance(sampling, Random):
        return anywhere, found, drawn
    mates = classes.mates(rows)
    places, candidates = draw(nearness, mates, shares, batch.dim, sampling.cutoff, sampling.farthest)
    return places.where(candidates, anywhere), found, ~candidates


def _easiest(nearness: Tensor, mates: Tensor) -> Tensor:
    """The place of each row's farthest negative, as a column."""
    return nearness.scatter(1, mates, math.inf).argmin(1, keepdim=True)


def _hardest(nearness: Tensor, mates: Tensor) -> Tensor:
    """The place of each row's nearest negative, as a column."""
    return nearness.scatter(1, mates, -math.inf).argmax(1, keepdim=True)


def _next_farther(others: Tensor, own: Tensor) -> Tensor:
    """For each of a row's own numbers the place of the largest of the others that is below it, where there is one."""
    if own.shape[1] <= FEW:
        # A threshold in place of a mask: a mask takes thirty times as long on a CPU.
        gaps = (F.threshold(own[:, [column]] - others, 0, math.inf) for column in range(own.shape[1]))
        return torch.stack([gap.argmin(1) for gap in gaps], 1)
    ordered, order = others.sort(1)
    return order.gather(1, (torch.searchsorted(ordered, own) - 1).clamp(min=0))
