"""Settings of the samplers of triples, chosen by name."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from manyviews.config import Settings

Which = Literal["all", "random", "easy", "hard"]


class Sampler(Settings):
    """What all samplers have in common."""

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


class WithinMargin(Sampler):
    """For each positive one of the negatives that are farther, but within the margin, all equally likely.

    FaceNet's semi-hard negatives as its section 3.2 describes them (Schroff et al. 2015): d(a, p) < d(a, n) < d(a, p) +
    α, so that the triplet has a loss. The paper does not say which of them; like its best-known implementation (D.
    Sandberg's), this draws one. pytorch-metric-learning takes them all, so that positives with many weigh more.
    Positives without such a negative are left out, and counted.
    """

    name: Literal["within_margin"] = "within_margin"
    margin: float | None = Field(None, gt=0, le=1e4)
    """How much farther the negative may be; null: the margin of the objective."""
    squared: bool | None = None
    """Whether the margin is of squared distances; null: if the objective compares these."""


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


Sampling = Annotated[
    All | Random | Easiest | SemiHard | WithinMargin | Hard | Hardest | DistanceWeighted, Field(discriminator="name")
]


def of_objective(sampling: Sampling, margin: float, *, squared: bool) -> Sampling:
    """Completes a sampling by the objective's margin, of squared distances or of plain ones, where it needs one."""
    if not isinstance(sampling, WithinMargin):
        return sampling
    known = {"margin": margin, "squared": squared}
    return sampling.model_copy(update={key: value for key, value in known.items() if getattr(sampling, key) is None})


def refuse_off_sphere(sampling: Sampling, normalized: bool) -> None:
    """Raises ValueError for distance-weighted sampling of points off the unit sphere."""
    if isinstance(sampling, DistanceWeighted) and not normalized:
        raise ValueError(
            "sampling=distance_weighted needs the density of distances on the unit sphere; set normalized=true, or use "
            "another sampling"
        )


def refuse_no_margin(sampling: Sampling, margin: float) -> None:
    """Raises ValueError for negatives within a margin of 0: there are none."""
    if isinstance(sampling, WithinMargin) and not (margin if sampling.margin is None else sampling.margin):
        raise ValueError("sampling=within_margin needs a margin above 0; set margin, or sampling.margin")
