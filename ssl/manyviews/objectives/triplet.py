"""Triplet loss: an anchor is to be nearer to its positive than to a negative, by a margin."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from manyviews.engine import sum_over_tiles
from manyviews.objectives.cost import Cost, Distance, Sizes, all_pairs
from manyviews.objectives.losses import float32_island, softplus, with_gradient
from manyviews.objectives.mining import (
    Sampling,
    SemiHard,
    batch_of,
    choose,
    hardness,
    of_objective,
    refuse_no_margin,
    refuse_off_sphere,
    shares,
)
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Stateless
from manyviews.objectives.settings import ObjectiveSettings, Population, Traits, renamed
from manyviews.system import distributed

FEW = 32
"""Positives of a row up to which a pass over the row for each is faster than a search among them."""


Form = Literal["hinge", "soft", "softmax", "ratio"]


class Triplet(ObjectiveSettings):
    """Triplet loss (Schroff et al. 2015, FaceNet), with negatives from all ranks' batches.

    The defaults are FaceNet's: squared distances on the unit sphere, a margin of 0.2, semi-hard negatives for all
    positives. Batch-hard (Hermans et al. 2017) is sampling.name=hardest with squared=false, and form=soft for its soft
    margin. The triplet network (Hoffer and Ailon 2015) is form=softmax with squared=false and normalized=false.
    """

    name: Literal["triplet"] = "triplet"
    margin: float = Field(0.2, ge=0, le=1e4)
    """How much nearer the positive is to be, in distance or in squared distance; form=soft and softmax have none."""
    squared: bool = True
    """Compare squared distances (FaceNet) or plain ones."""
    form: Form = "hinge"
    """The loss of the distances p and n of positive and negative: [p − n + margin]₊; soft: log(1 + e^(p − n)) (Hermans
    et al. 2017); softmax: the square of e^p / (e^p + e^n) (Hoffer and Ailon 2015); ratio: [1 − n / (p + margin)]₊
    (Wohlhart and Lepetit 2015)."""
    normalized: bool = True
    """Compare points on the unit sphere; else the embeddings as they are."""
    average: Literal["active", "all"] = "active"
    """The mean over the triplets that violate the margin, or over all that were sampled."""
    sampling: Sampling = SemiHard()
    """Which triplets."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, values: Any) -> Any:
        return renamed(values, "soft", "form", {True: "soft", False: "hinge"})

    @model_validator(mode="after")
    def _on_the_sphere(self) -> "Triplet":
        refuse_off_sphere(self.sampling, self.normalized)
        return self

    @model_validator(mode="after")
    def _with_a_margin(self) -> "Triplet":
        refuse_no_margin(self.sampling, self.margin)
        if self.form == "ratio" and not self.margin:
            raise ValueError("form=ratio divides by the positive's distance plus the margin; set margin above 0")
        return self

    @property
    def traits(self) -> Traits:
        """On the unit sphere the cosine orders as the Euclidean distance does."""
        distance: Distance = "cosine" if self.normalized else "euclidean"
        return Traits(compares_embeddings=True, distance=distance, sampling=self.sampler)

    @property
    def sampler(self) -> Sampling:
        """The sampling, with this margin if it needs one and has none of its own."""
        return of_objective(self.sampling, self.margin, squared=self.squared)

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every embedding against all of the batch."""
        return all_pairs(sizes, self.traits.distance)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective; it has no state, and draws triplets by `seed`."""
        alike, keys = population.alike, population.keys
        return Stateless(lambda z, ids, step: triplet_loss(z, ids, self, seed=seed, step=step, alike=alike, keys=keys))


@float32_island
def triplet_loss(
    embeddings: Embeddings,
    ids: Ids,
    settings: Triplet,
    *,
    seed: int,
    step: int,
    alike: int | None = None,
    keys: int | None = None,
) -> Loss:
    """Mean over triplets of [d(a, p) − d(a, n) + margin]₊, with d² instead of d if `squared`; or another form.

    `softmax` is the loss of Hoffer and Ailon 2015, section 3: the squared error of the softmax of both distances, which
    is to be (0, 1). Both errors are equal, and this is one of them: the mean, as in the authors' code, where the paper
    has the sum. `ratio` is equation 2 of Wohlhart and Lepetit 2015: with the hinge's margin and below 1, for it is the
    hinge divided by d(a, p) + margin.

    Anchors are all embeddings of this rank, positives the other embeddings of the anchor's id and negatives those of
    other ids, on all ranks. The mean is over the triplets whose loss is above zero (as Hermans et al. 2017 recommend),
    or over all that were sampled (FaceNet's equation 3 is their sum); with `soft` and `softmax` all are above. Without
    any triplet the loss and its gradient are zero.

    With `all` the triplets are summed without being listed: for each positive the negatives within its margin, by a
    pass over the row, or by a search among the row's sorted positives where they are many. Other forms than the hinge,
    which are not linear, always take the passes.

    Examples:
        >>> views = torch.eye(2).expand(2, 2, 2)  # two views of two images, at right angles
        >>> triplet_loss(views, torch.arange(2), Triplet(margin=3.0), seed=0, step=0).total.item()
        1.0
    """
    normalized = settings.normalized
    batch = batch_of(embeddings, ids, normalized=normalized, seed=seed, step=step, alike=alike, keys=keys)
    read = batch.squared_distances if settings.squared else batch.distances
    form, margin, sampling = settings.form, settings.margin, settings.sampler

    def term(rows: slice, products: Tensor) -> tuple[Tensor, Tensor]:
        triples = choose(sampling, batch, rows, products)
        if triples.negatives is None:
            lists = triples.positives, triples.chosen, batch.mates(rows)
            total, active = all_triplets(read(products), *lists, form, margin)
            counts = hardness(triples, batch, rows, products, torch.zeros_like(products, dtype=torch.bool))
            # Not listed one by one, the easy triples are those that are neither active nor hard.
            counts[2] = counts[0] - active.maximum(counts[1])
        else:
            compared = products.gather(1, torch.cat([triples.positives, triples.negatives], 1))
            positive, negative = read(compared).tensor_split(2, 1)
            losses = penalties(positive, negative, form, margin).losses.where(triples.chosen, 0)
            total, active = losses.sum(), (losses > 0).sum()
            counts = hardness(triples, batch, rows, products, losses == 0)
        return total, torch.cat([active.to(products.dtype)[None], triples.figures, counts])

    total, figures = sum_over_tiles(batch.anchors, batch.candidates, term)
    figures = distributed.total(figures)
    active, count = figures[0], figures[4]
    terms = batch.terms() | {"active": active / count.clamp(min=1)} | shares(sampling, figures[1:])
    compared = count if settings.average == "all" or form in ("soft", "softmax") else active
    return Loss(total * distributed.world_size() / compared.clamp(min=1), terms)


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
    mask `there`, `mates` the indices that are no negatives. A margin of None is the soft one.
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
