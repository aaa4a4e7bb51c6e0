"""Margin-based loss: positives nearer than a learned boundary, negatives farther."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from manyviews.engine import sum_over_tiles
from manyviews.objectives.cost import Cost, Sizes, all_pairs
from manyviews.objectives.losses import distances, float32_island, share_of_mean, squared_distances
from manyviews.objectives.mining import (
    DistanceWeighted,
    Sampling,
    batch_of,
    choose,
    hardness,
    of_objective,
    refuse_no_margin,
    shares,
)
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Targets
from manyviews.objectives.relations import Lists, list_batch
from manyviews.objectives.settings import ObjectiveSettings, Population, Traits
from manyviews.system import distributed


class Margin(ObjectiveSettings):
    """Margin-based loss with distance-weighted sampling (Wu et al. 2017, Sampling Matters).

    The defaults are the paper's. The boundary β between same and different is learned with the weights, by the same
    optimizer: one for all, or one for each id, which with ids=images is each image.
    """

    name: Literal["margin"] = "margin"
    margin: float = Field(0.2, ge=0, le=1e4)
    """Distance on either side of the boundary within which pairs still cost something: the paper's α."""
    beta: float = Field(1.2, gt=0, le=1e4)
    """The boundary at the start: pairs nearer than it are to be the same."""
    beta_per: Literal["all", "class"] = "all"
    """One boundary for all anchors, or one for each id."""
    nu: float = Field(0.0, ge=0, le=1e4)
    """Weight of the anchors' boundaries themselves: the larger, the smaller the boundaries."""
    sampling: Sampling = DistanceWeighted()
    """Which pairs; of given ones, all."""

    @model_validator(mode="after")
    def _with_a_margin(self) -> "Margin":
        refuse_no_margin(self.sampling, self.margin)
        return self

    @property
    def traits(self) -> Traits:
        """Unit embeddings are compared."""
        return Traits(relations=("pairs", "triplets"), compares_embeddings=True, sampling=self.sampler)

    @property
    def sampler(self) -> Sampling:
        """The sampling, with this margin if it needs one and has none of its own."""
        return of_objective(self.sampling, self.margin, squared=False)

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every embedding against all of the batch."""
        return all_pairs(sizes, "cosine")

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective, with its boundaries; pairs are drawn by `seed`."""
        return MarginObjective(self, population, seed)


class MarginObjective(Objective):
    """Margin-based loss with its boundaries, which are learned and equal on all ranks."""

    def __init__(self, settings: Margin, population: Population, seed: int) -> None:
        super().__init__()
        self.settings, self.seed, self.alike, self.keys = settings, seed, population.alike, population.keys
        self.lists = population.lists
        count = population.size if settings.beta_per == "class" else 1
        self.beta = nn.Parameter(torch.full((count,), settings.beta))

    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of this rank's anchors against the embeddings of all ranks."""
        boundaries = self.beta[ids] if self.settings.beta_per == "class" else self.beta.expand(len(ids))
        seed, alike, keys = self.seed, self.alike, self.keys
        if self.lists is None:
            loss = margin_loss(embeddings, ids, boundaries, self.settings, seed=seed, step=step, alike=alike, keys=keys)
        else:
            loss = margin_loss_of_lists(embeddings, ids, self.lists, boundaries, self.settings, keys=keys)
        return Loss(loss.total, loss.terms | {"beta": self.beta.detach().mean()})


@float32_island
def margin_loss(
    embeddings: Embeddings,
    ids: Ids,
    boundaries: Float[Tensor, " batch"],
    settings: Margin,
    *,
    seed: int,
    step: int,
    alike: int | None = None,
    keys: int | None = None,
) -> Loss:
    """Mean over active pairs of [α + d − β]₊ (positive pairs) and [α − d + β]₊ (negative pairs).

    Wu et al. 2017, section 4.2: β is the boundary of the anchor's image, d the distance of unit vectors, and a pair
    with a loss above zero is active. Unlike a triplet loss it compares distances with a boundary and not with each
    other. The minimum over β is isotonic regression with a single step: β rests at a quantile of d + α of positives and
    d − α of negatives, the distances after each has been moved to its wrong side (loss augmentation), so that only
    their order counts. To the sum ν β is added for each positive pair, as in the authors' code. With it a boundary
    rests where the active positive pairs outnumber the active negative ones by ν for each pair that is compared, and
    without it where they are as many.

    The pairs are those of the sampled triples: each positive with the negative sampled for it, or, with `all`,
    each embedding of this rank with each other one of its id, and with each one of another id, on all ranks.
    Where no pair is active the loss and its gradient are zero, ν or not.

    Examples:
        >>> views = torch.eye(2).expand(2, 2, 2)  # two views of two images, at right angles
        >>> loss = margin_loss(views, torch.arange(2), torch.full((2,), 2.0), Margin(), seed=0, step=0)
        >>> round(loss.total.item(), 4)  # 0.2 - 2 ** 0.5 + 2
        0.7858
    """
    sampling = settings.sampler
    batch = batch_of(embeddings, ids, normalized=True, seed=seed, step=step, alike=alike, keys=keys)

    def term(rows: slice, products: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        triples = choose(sampling, batch, rows, products)
        beta = beta[rows, None]

        def pushed(products: Tensor) -> Tensor:
            return push(batch.distances(products), beta, settings.margin)

        near, pushes, negatives = triples.pairs(batch, rows, products, pushed)
        pulls = pull(batch.distances(near), beta, settings.margin).where(triples.chosen, 0)
        total = pulls.sum() + pushes.sum()
        if settings.nu:
            total = total + settings.nu * (beta * triples.chosen).sum()
        active = (pulls.detach() > 0).sum() + (pushes.detach() > 0).sum()
        counts = torch.stack([active, triples.chosen.sum() + negatives]).to(products.dtype)
        hard = hardness(triples, batch, rows, products, pushes.detach() == 0)
        return total, torch.cat([counts, triples.figures, hard])

    wide = boundaries.to(batch.anchors.dtype).repeat(len(embeddings))
    total, figures = sum_over_tiles(batch.anchors, batch.candidates, term, wide)
    figures = distributed.total(figures)
    active, count = figures[:2]
    terms = batch.terms() | {"active": active / count.clamp(min=1)} | shares(sampling, figures[2:])
    return Loss((total * distributed.world_size() / active.clamp(min=1)).where(active > 0, 0), terms)


@float32_island
def margin_loss_of_lists(
    embeddings: Embeddings,
    ids: Ids,
    lists: Lists,
    boundaries: Float[Tensor, " batch"],
    settings: Margin,
    *,
    keys: int | None = None,
) -> Loss:
    """Mean over active pairs of s [α + d − β]₊ and (1 − s) [α − d + β]₊, as in `margin_loss`.

    A pair is a query and an item of its list: s is how similar they are, of a triplet 1 for the positive and 0 for the
    negative. β is the boundary of the query's image. The mean is weighted by s, or 1 − s. Where the batch's other
    images are items too, they are pairs with s = 0.

    Examples:
        >>> from manyviews.objectives.relations import Relations
        >>> lists = Lists(Relations("pairs", torch.tensor([[0, 1]]), torch.tensor([[0.0]]), size=2))
        >>> views = torch.eye(2)[None]  # two images, at right angles
        >>> loss = margin_loss_of_lists(views, torch.arange(2), lists, torch.full((2,), 2.0), Margin())
        >>> round(loss.total.item(), 4)  # 0.2 - 2 ** 0.5 + 2
        0.7858
    """
    batch = list_batch(embeddings, ids, lists, "cosine", keys=keys)

    def term(some: slice, products: Tensor, same: Tensor, there: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        beta, apart = beta[some, None], distances(squared_distances(products, normalized=True))
        similar, different = same.where(there, 0), (1 - same).where(there, 0)
        pulls, pushes = (force(apart, beta, settings.margin) for force in (pull, push))
        total = (similar * pulls + different * pushes + settings.nu * beta * similar).sum()
        active = similar * (pulls.detach() > 0) + different * (pushes.detach() > 0)
        return total, torch.stack([active.sum(), there.sum(), different.sum()])

    of_lists = boundaries[:: lists.size].to(batch.queries.dtype).repeat(len(embeddings))
    total, (active, count, negatives) = batch.sum(term, of_lists)
    terms = batch.terms(negatives) | {"active": share_of_mean(active, count)}
    return Loss(share_of_mean(total, active).where(distributed.total(active) > 0, 0), terms)


def pull(apart: Float[Tensor, "*pairs"], beta: Float[Tensor, "*#pairs"], margin: float) -> Float[Tensor, "*pairs"]:
    """[α + d − β]₊ from distances."""
    return (margin + apart - beta).relu()


def push(apart: Float[Tensor, "*pairs"], beta: Float[Tensor, "*#pairs"], margin: float) -> Float[Tensor, "*pairs"]:
    """[α − d + β]₊ from distances."""
    return (margin + beta - apart).relu()
