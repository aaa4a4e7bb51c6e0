"""Triplet loss: an anchor is to be nearer to its positive than to a negative, by a margin."""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from manyviews.engine import sum_over_tiles
from manyviews.objectives.cost import Cost, Distance, Sizes, all_pairs
from manyviews.objectives.losses import (
    distances,
    float32_island,
    share_of_mean,
    softplus,
    squared_distances,
    with_gradient,
)
from manyviews.objectives.mining import Sampling, SemiHard, batch_of, choose, hardness, refuse_off_sphere, shares
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Stateless
from manyviews.objectives.query_losses import excess, logistic, ordered_pairs
from manyviews.objectives.relations import Lists, list_batch
from manyviews.objectives.settings import ObjectiveSettings, Population, Traits
from manyviews.system import distributed

FEW = 32
"""Positives of a row up to which a pass over the row for each is faster than a search among them."""


class Triplet(ObjectiveSettings):
    """Triplet loss (Schroff et al. 2015, FaceNet), with negatives from all ranks' batches.

    The defaults are FaceNet's: squared distances on the unit sphere, a margin of 0.2, semi-hard negatives for all
    positives. Batch-hard (Hermans et al. 2017) is sampling.name=hardest with squared=false, and soft=true for its soft
    margin.
    """

    name: Literal["triplet"] = "triplet"
    margin: float = Field(0.2, ge=0, le=1e4)
    """How much nearer the positive is to be, in distance or in squared distance; a soft margin has none."""
    squared: bool = True
    """Compare squared distances (FaceNet) or plain ones."""
    soft: bool = False
    """log(1 + e^x) of the difference of the distances in place of max(0, x + margin) (Hermans et al. 2017)."""
    normalized: bool = True
    """Compare points on the unit sphere; else the embeddings as they are."""
    average: Literal["active", "all"] = "active"
    """The mean over the triplets that violate the margin, or over all that were sampled."""
    sampling: Sampling = SemiHard()
    """Which triplets; of given ones, all."""

    @model_validator(mode="after")
    def _on_the_sphere(self) -> "Triplet":
        refuse_off_sphere(self.sampling, self.normalized)
        return self

    @property
    def traits(self) -> Traits:
        """On the unit sphere the cosine orders as the Euclidean distance does."""
        distance: Distance = "cosine" if self.normalized else "euclidean"
        return Traits(relations=("triplets", "ranked"), compares_embeddings=True, distance=distance)

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every embedding against all of the batch."""
        return all_pairs(sizes, self.traits.distance)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective; it has no state, and draws triplets by `seed`."""
        alike, keys, lists = population.alike, population.keys, population.lists
        if lists is not None:
            return Stateless(lambda z, ids, _: triplet_loss_of_lists(z, ids, lists, self, keys=keys), lists)
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
    """Mean over triplets of [d(a, p) − d(a, n) + margin]₊, with d² instead of d if `squared`.

    Anchors are all embeddings of this rank, positives the other embeddings of the anchor's id and negatives those of
    other ids, on all ranks. The mean is over the triplets whose loss is above zero (as Hermans et al. 2017 recommend),
    or over all that were sampled (FaceNet's equation 3 is their sum); with a soft margin all are above. Without any
    triplet the loss and its gradient are zero.

    With `all` the triplets are summed without being listed: for each positive the negatives within its margin, by a
    pass over the row, or by a search among the row's sorted positives where they are many. A soft margin, which every
    triplet exceeds, always takes the passes.

    Examples:
        >>> views = torch.eye(2).expand(2, 2, 2)  # two views of two images, at right angles
        >>> triplet_loss(views, torch.arange(2), Triplet(margin=3.0), seed=0, step=0).total.item()
        1.0
    """
    normalized = settings.normalized
    batch = batch_of(embeddings, ids, normalized=normalized, seed=seed, step=step, alike=alike, keys=keys)
    read = batch.squared_distances if settings.squared else batch.distances
    margin = None if settings.soft else settings.margin

    def term(rows: slice, products: Tensor) -> tuple[Tensor, Tensor]:
        triples = choose(settings.sampling, batch, rows, products)
        if triples.negatives is None:
            total, active = all_triplets(read(products), triples.positives, triples.chosen, batch.mates(rows), margin)
            counts = hardness(triples, batch, rows, products, torch.zeros_like(products, dtype=torch.bool))
            # Not listed one by one, the easy triples are those that are neither active nor hard.
            counts[2] = counts[0] - active.maximum(counts[1])
        else:
            compared = products.gather(1, torch.cat([triples.positives, triples.negatives], 1))
            positive, negative = read(compared).tensor_split(2, 1)
            losses = _excess(positive - negative, margin).where(triples.chosen, 0)
            total, active = losses.sum(), (losses > 0).sum()
            counts = hardness(triples, batch, rows, products, losses == 0)
        return total, torch.cat([active.to(products.dtype)[None], triples.figures, counts])

    total, figures = sum_over_tiles(batch.anchors, batch.candidates, term)
    figures = distributed.total(figures)
    active, count = figures[0], figures[4]
    terms = batch.terms() | {"active": active / count.clamp(min=1)} | shares(settings.sampling, figures[1:])
    compared = count if settings.average == "all" or settings.soft else active
    return Loss(total * distributed.world_size() / compared.clamp(min=1), terms)


@float32_island
def triplet_loss_of_lists(
    embeddings: Embeddings, ids: Ids, lists: Lists, settings: Triplet, *, keys: int | None = None
) -> Loss:
    """Mean over given triplets of [d(a, p) − d(a, n) + margin]₊, as in `triplet_loss`.

    They are those of the file, or all of a query and two items of its list, p more relevant than n. Where the batch's
    other images are items too, they are further n. Nothing is sampled.

    Examples:
        >>> from manyviews.objectives.relations import Relations
        >>> lists = Lists(Relations("triplets", torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 0.0]]), size=3))
        >>> views = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])  # squared distances of 2 and 4
        >>> triplet_loss_of_lists(views, torch.arange(3), lists, Triplet(margin=3.0)).total.item()
        1.0
    """
    normalized = settings.normalized
    batch = list_batch(embeddings, ids, lists, "cosine" if normalized else "squared_distance", keys=keys)
    loss = logistic if settings.soft else partial(excess, margin=settings.margin)
    most = batch.items.shape[1]

    def term(some: slice, products: Tensor, relevances: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        squares = squared_distances(products, normalized=normalized)
        scores = -squares if settings.squared else -distances(squares)
        triplets = ordered_pairs(scores, relevances, loss, there, most, detailed=True)
        return triplets.sum().sum(), triplets.counts.sum(0)

    total, (count, active, hard) = batch.sum(term)
    shares = {
        "active": active,
        "easy": count - active.maximum(hard),
        "semi_hard": active - active.minimum(hard),
        "hard": hard,
    }
    compared = count if settings.average == "all" or settings.soft else active
    terms = {name: share_of_mean(figure, count) for name, figure in shares.items()}
    return Loss(share_of_mean(total, compared), batch.terms(count) | terms)


def all_triplets(
    distances: Float[Tensor, "rows all"],
    positives: Int[Tensor, "rows positives"],
    there: Bool[Tensor, "rows positives"],
    mates: Int[Tensor, "rows members"],
    margin: float | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum of [d(a, p) − d(a, n) + margin]₊ over all triplets of some rows, and number above 0.

    `distances` are those of the anchors from all candidates, `positives` the indices of each row's positives with their
    mask `there`, `mates` the indices that are no negatives. A margin of None is the soft one.
    """
    with torch.no_grad():
        # A positive at −∞ and a negative at ∞ are in no triplet that costs anything.
        own = distances.gather(1, positives).masked_fill_(~there, -torch.inf)
        others = distances.scatter(1, mates, torch.inf)
        if margin is not None and own.shape[1] > FEW:
            total, own_weights, weights = _by_search(own + margin, others)
            active = own_weights.sum()
        else:
            total, active, own_weights, weights = _by_passes(own, others, margin)
        weights.scatter_add_(1, positives, own_weights)
    # Autograd would keep a tile for each positive.
    return with_gradient(distances, total, weights), active


def _excess(difference: Tensor, margin: float | None) -> Tensor:
    return softplus(difference) if margin is None else (difference + margin).relu()


def _by_passes(own: Tensor, others: Tensor, margin: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, number of active triplets, and derivatives in the positives and in the negatives."""
    totals, counts = torch.zeros_like(own), torch.zeros_like(own)
    own_weights, weights = torch.zeros_like(own), torch.zeros_like(others)
    for column in range(own.shape[1]):
        difference = own[:, column, None] - others
        losses = _excess(difference, margin)
        slopes = difference.sigmoid_() if margin is None else losses.sign()
        totals[:, column], own_weights[:, column] = losses.sum(1), slopes.sum(1)
        counts[:, column] = own_weights[:, column] if margin is not None else losses.sign_().sum(1)
        weights -= slopes
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
