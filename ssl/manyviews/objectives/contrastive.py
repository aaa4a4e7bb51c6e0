"""Contrastive loss of Siamese networks: equal ids are pulled together, others pushed apart."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from manyviews.engine import sum_over_tiles
from manyviews.objectives.cost import Cost, Distance, Sizes, all_pairs
from manyviews.objectives.losses import distances, float32_island, share_of_mean, squared_distances
from manyviews.objectives.mining import (
    All,
    Sampling,
    batch_of,
    choose,
    hardness,
    of_objective,
    refuse_off_sphere,
    shares,
)
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Stateless
from manyviews.objectives.relations import Lists, list_batch
from manyviews.objectives.settings import ObjectiveSettings, Population, Traits, renamed
from manyviews.system import distributed


class Contrastive(ObjectiveSettings):
    """Contrastive loss of pairs (Hadsell, Chopra and LeCun 2006) in the batches of all ranks."""

    name: Literal["contrastive"] = "contrastive"
    margin: float = Field(1.0, gt=0, le=1e4)
    """Distance up to which negatives are pushed apart; points on the unit sphere are 2 apart at most. With
    form=hinge_of_squares it is a squared distance, of 4 at most."""
    form: Literal["squared_hinge", "hinge", "hinge_of_squares"] = "squared_hinge"
    """½ d² and ½ [margin − d]₊² (the paper), d and [margin − d]₊, or d² and [margin − d²]₊."""
    normalized: bool = True
    """Compare points on the unit sphere; else the embeddings as they are, as in 2006."""
    average: Literal["active", "all"] = "active"
    """The mean over the negative pairs within the margin, or over all that were sampled."""
    sampling: Sampling = All()
    """Which pairs; of given ones, all."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, values: Any) -> Any:
        return renamed(values, "squared", "form", {True: "squared_hinge", False: "hinge"})

    @model_validator(mode="after")
    def _on_the_sphere(self) -> "Contrastive":
        refuse_off_sphere(self.sampling, self.normalized)
        return self

    @property
    def traits(self) -> Traits:
        """On the unit sphere the cosine orders as the Euclidean distance does."""
        distance: Distance = "cosine" if self.normalized else "euclidean"
        return Traits(relations=("pairs",), compares_embeddings=True, distance=distance, sampling=self.sampler)

    @property
    def sampler(self) -> Sampling:
        """The sampling, with this margin if it needs one and has none of its own."""
        return of_objective(self.sampling, self.margin, squared=self.form == "hinge_of_squares")

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every embedding against all of the batch."""
        # Pairs within the margin are counted before they are weighed.
        counted = self.average == "active" or self.sampling.name == "all"
        return all_pairs(sizes, self.traits.distance, passes=4 if counted else 3)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective; it has no state, and draws pairs by `seed`."""
        alike, keys, lists = population.alike, population.keys, population.lists
        if lists is not None:
            return Stateless(lambda z, ids, _: contrastive_loss_of_pairs(z, ids, lists, self, keys=keys), lists)
        return Stateless(
            lambda z, ids, step: contrastive_loss(z, ids, self, seed=seed, step=step, alike=alike, keys=keys)
        )


@float32_island
def contrastive_loss(
    embeddings: Embeddings,
    ids: Ids,
    settings: Contrastive,
    *,
    seed: int,
    step: int,
    alike: int | None = None,
    keys: int | None = None,
) -> Loss:
    """Mean over positive pairs of ½ d², plus the mean over negative pairs of ½ [margin − d]₊².

    That is equation 4 of Hadsell et al. 2006 but for the two means: in their sum over all pairs the positives would
    weigh next to nothing, for there are as many times more negatives as there are other images. The other forms are d
    and [margin − d]₊, which pull and push equally hard at any distance, and d² and [margin − d²]₊, whose forces grow
    with the distance: negatives that nearly coincide are hardly pushed, and those at the margin the most.

    The pairs are those of the sampled triples, each counted once: with `all`, each embedding of this rank with each
    other one of its id, and with each one of another id, on all ranks; else each positive with the one negative sampled
    for it. Positives without a negative and anchors without a positive are left out: pulled alone all embeddings would
    collapse, pushed alone nothing would be learned. The mean over negative pairs is over those within the margin, or
    over all; where there is no pair the loss and its gradient are zero.

    Examples:
        >>> views = torch.eye(2).expand(2, 2, 2)  # two views of two images, at right angles
        >>> loss = contrastive_loss(views, torch.arange(2), Contrastive(margin=2.0), seed=0, step=0)
        >>> round(loss.total.item(), 4)  # (2 - 2 ** 0.5) ** 2 / 2
        0.1716
    """
    normalized, sampling = settings.normalized, settings.sampler
    batch = batch_of(embeddings, ids, normalized=normalized, seed=seed, step=step, alike=alike, keys=keys)
    weight = torch.ones_like(batch.positive_similarity)

    def hinges_of(products: Tensor) -> Tensor:
        return hinge(batch.squared_distances(products), settings)

    def term(rows: slice, products: Tensor) -> tuple[Tensor, Tensor]:
        triples = choose(sampling, batch, rows, products)
        near, hinges, count = triples.pairs(batch, rows, products, hinges_of)
        pulls = pull(batch.squared_distances(near), settings)
        total = pulls.where(triples.chosen, 0).sum() + weight * push(hinges, settings).sum()
        counts = torch.stack([triples.chosen.sum(), (hinges.detach() > 0).sum(), count]).to(products.dtype)
        hard = hardness(triples, batch, rows, products, hinges.detach() == 0)
        return total, torch.cat([counts, triples.figures, hard])

    if settings.average == "active" or sampling.name == "all":
        # The weight of a negative pair is needed before the tiles are differentiated: a first pass counts them.
        _, figures = sum_over_tiles(batch.anchors.detach(), batch.candidates.detach(), term)
        positives, active, count = distributed.total(figures[:3])
        weight = positives / (active if settings.average == "active" else count).clamp(min=1)
    total, figures = sum_over_tiles(batch.anchors, batch.candidates, term)
    figures = distributed.total(figures)
    positives, active, count = figures[:3]
    terms = batch.terms() | {"active": active / count.clamp(min=1)} | shares(sampling, figures[3:])
    return Loss(total * distributed.world_size() / positives.clamp(min=1), terms)


@float32_island
def contrastive_loss_of_pairs(
    embeddings: Embeddings, ids: Ids, lists: Lists, settings: Contrastive, *, keys: int | None = None
) -> Loss:
    """Mean of ½ d² over given pairs, weighted by s, plus that of ½ [margin − d]₊², weighted by 1 − s; or another form.

    s is how similar a pair is, from 0 to 1: the Y of Hadsell et al. 2006, equation 4, is 1 − s, and may be any number
    between. As in `contrastive_loss` the second mean is over the pairs within the margin, or over all. Where the
    batch's other images are items too, they are pairs with s = 0.

    Examples:
        >>> from manyviews.objectives.relations import Relations
        >>> lists = Lists(Relations("pairs", torch.tensor([[0, 1]]), torch.tensor([[0.25]]), size=2))
        >>> loss = contrastive_loss_of_pairs(torch.eye(2)[None], torch.arange(2), lists, Contrastive(margin=2.0))
        >>> round(loss.total.item(), 4)  # 2 / 2 + (2 - 2 ** 0.5) ** 2 / 2
        1.1716
    """
    normalized = settings.normalized
    batch = list_batch(embeddings, ids, lists, "cosine" if normalized else "squared_distance", keys=keys)

    def pulled(some: slice, products: Tensor, same: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        pulls = pull(squared_distances(products, normalized=normalized), settings)
        return (same * pulls).where(there, 0).sum(), same.where(there, 0).sum()[None]

    def pushed(some: slice, products: Tensor, same: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        hinges = hinge(squared_distances(products, normalized=normalized), settings)
        different = (1 - same).where(there, 0)
        active = different.where(hinges.detach() > 0, 0).sum()
        return (different * push(hinges, settings)).sum(), torch.stack([active, different.sum()])

    pulls, (similar,) = batch.sum(pulled)
    pushes, (active, count) = batch.sum(pushed)
    loss = share_of_mean(pulls, similar) + share_of_mean(pushes, active if settings.average == "active" else count)
    return Loss(loss, batch.terms(count) | {"active": share_of_mean(active, count)})


def pull(squares: Float[Tensor, "*pairs"], settings: Contrastive) -> Float[Tensor, "*pairs"]:
    """½ d², d or d², from squared distances."""
    if settings.form == "hinge":
        return distances(squares)
    return squares / 2 if settings.form == "squared_hinge" else squares


def hinge(squares: Float[Tensor, "*pairs"], settings: Contrastive) -> Float[Tensor, "*pairs"]:
    """[margin − d]₊, or [margin − d²]₊, from squared distances."""
    return (settings.margin - (squares if settings.form == "hinge_of_squares" else distances(squares))).relu()


def push(hinges: Float[Tensor, "*pairs"], settings: Contrastive) -> Float[Tensor, "*pairs"]:
    """½ of squared hinges, or the hinges."""
    return hinges.square() / 2 if settings.form == "squared_hinge" else hinges
