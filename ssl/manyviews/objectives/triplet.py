"""Triplet loss: an anchor is to be nearer to its positive than to a negative, by a margin."""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from manyviews.engine import sum_over_tiles
from manyviews.objectives.cost import Cost, Distance, Sizes, all_pairs
from manyviews.objectives.losses import (
    distances,
    float32_island,
    share_of_mean,
    squared_distances,
)
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
from manyviews.objectives.query_losses import ordered_pairs
from manyviews.objectives.relations import Lists, list_batch
from manyviews.objectives.settings import ObjectiveSettings, Population, Traits, renamed
from manyviews.objectives.triplet_losses import Form, Penalties, all_triplets, penalties
from manyviews.system import distributed


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
    """Which triplets; of given ones, all."""

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
        return Traits(
            relations=("triplets", "ranked"), compares_embeddings=True, distance=distance, sampling=self.sampler
        )

    @property
    def sampler(self) -> Sampling:
        """The sampling, with this margin if it needs one and has none of its own."""
        return of_objective(self.sampling, self.margin, squared=self.squared)

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


@float32_island
def triplet_loss_of_lists(
    embeddings: Embeddings, ids: Ids, lists: Lists, settings: Triplet, *, keys: int | None = None
) -> Loss:
    """Mean over given triplets of [d(a, p) − d(a, n) + margin]₊, or another form, as in `triplet_loss`.

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
    form, margin, most = settings.form, settings.margin, batch.items.shape[1]

    def loss(more: Tensor, less: Tensor) -> Penalties:
        return penalties(-more, -less, form, margin)

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
    compared = count if settings.average == "all" or form in ("soft", "softmax") else active
    terms = {name: share_of_mean(figure, count) for name, figure in shares.items()}
    return Loss(share_of_mean(total, compared), batch.terms(count) | terms)
