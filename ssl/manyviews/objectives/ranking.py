"""Learning to rank: for each embedding, others of its id or of near labels come first."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from manyviews.engine import normalize, sum_over_tiles
from manyviews.objectives import query_losses
from manyviews.objectives.cost import Cost, Sizes, all_pairs
from manyviews.objectives.labels import Labels
from manyviews.objectives.losses import float32_island, gather_views, share_of_mean
from manyviews.objectives.mining import most_alike
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Targets
from manyviews.objectives.relations import Lists, list_batch
from manyviews.objectives.settings import ObjectiveSettings, Population, Temperature, Traits

Relevance = Callable[[slice], Tensor]
QueryLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Sums = tuple[Tensor, Tensor]
RankingLoss = Literal["squared_error", "cross_entropy", "rank_net", "hinge", "list_net", "list_mle"]


class Ranking(ObjectiveSettings):
    """Ranking losses over all other embeddings of the batch: by point, by pair or by list.

    The relevance of an item to a query is 1 where they have the same id and 0 elsewhere; with the recipe's `values`
    it is 1 / (1 + distance of their labels), as Kim et al. 2019 measure it. Of the recipe's relations it is that of the
    file, divided by the highest one if that is above 1, and items are those of the query's list.
    """

    traits: ClassVar[Traits] = Traits(
        uses_values="if given", relations=("triplets", "ranked"), compares_embeddings=True
    )

    name: Literal["ranking"] = "ranking"
    loss: RankingLoss = "list_net"
    """Of each item (squared_error, cross_entropy); of each pair, one more relevant than the other (RankNet, hinge); or
    of the whole list (ListNet, ListMLE). With `values` the losses of pairs cost (images of a batch)³."""
    temperature: Temperature = 0.1
    """Divides the cosines, which makes them scores (squared_error compares the cosines as they are). The hinge's margin
    is a score of 1, and so a cosine of this number."""
    label_temperature: float = Field(0.1, gt=0, le=1e4)
    """Divides the relevances before their softmax: how much more the best items count than the next (list_net)."""

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every embedding against all of the batch."""
        return all_pairs(sizes, "cosine")

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective, with the label of each image if the population has values."""
        return RankingObjective(self, population)


class RankingObjective(Objective):
    """Ranking loss with all images' labels, if any, and the cross-entropy's learned threshold."""

    def __init__(self, settings: Ranking, population: Population) -> None:
        super().__init__()
        self.settings, self.alike, self.keys = settings, population.alike, population.keys
        self.labels = None if population.values is None else Labels(population.values)
        self.lists = population.lists
        self.highest = 1.0 if self.lists is None else max(float(self.lists.values.max()), 1.0)
        # Few items are relevant: at 1 nearly all are predicted to be irrelevant (Zhai et al. 2023, section 3.2).
        self.threshold = nn.Parameter(torch.tensor(1.0)) if settings.loss == "cross_entropy" else None

    @float32_island
    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of this rank's queries, averaged over those with items of different relevance.

        Items are all embeddings of the batch, on all ranks, but the query itself; local views are no items.
        """
        if self.lists is not None:
            return self._of_lists(embeddings, ids, self.lists)
        gathered = gather_views(normalize(embeddings), ids, self.keys)
        queries, query_ids = normalize(embeddings).flatten(0, 1), ids.repeat(len(embeddings))
        loss = self._loss(self._most(gathered.ids, self.keys or len(embeddings)))
        learned = () if self.threshold is None else (self.threshold,)

        def term(own: Tensor | None, relevance: Relevance, tile: slice, products: Tensor, *threshold: Tensor) -> Sums:
            cosines, relevances = products, relevance(tile)
            if own is not None:
                cosines, relevances = (_without(own[tile], items) for items in (cosines, relevances))
            if not cosines.shape[1]:
                return cosines.sum(), products.new_zeros(4, dtype=torch.float64)
            return self._sums(loss, cosines, relevances, None, *threshold)

        keys = len(queries) if self.keys is None else self.keys * len(ids)
        sums = []
        for part in [slice(0, keys), slice(keys, len(queries))][: 1 if self.keys is None else 2]:
            relevance = self._relevance(query_ids[part], gathered.ids, queries.dtype)
            own = gathered.own[part] if part.start == 0 else None
            sums.append(sum_over_tiles(queries[part], gathered.rows, partial(term, own, relevance), *learned))
        return self._mean(*(torch.stack(values).sum(0) for values in zip(*sums, strict=True)))

    def _of_lists(self, embeddings: Tensor, ids: Tensor, lists: Lists) -> Loss:
        """Loss of this rank's lists, averaged over those with items of different relevance."""
        batch = list_batch(embeddings, ids, lists, "cosine", keys=self.keys)
        loss = self._loss(batch.items.shape[1])
        learned = () if self.threshold is None else (self.threshold,)

        def term(some: slice, cosines: Tensor, relevances: Tensor, there: Tensor, *threshold: Tensor) -> Sums:
            return self._sums(loss, cosines, relevances / self.highest, there, *threshold)

        return self._mean(*batch.sum(term, *learned))

    def _sums(
        self, loss: QueryLoss, cosines: Tensor, relevances: Tensor, there: Tensor | None, *threshold: Tensor
    ) -> Sums:
        """Sum of the losses of queries, and sums over these for the terms."""
        above, below = query_losses.unlike(relevances, there)
        asked, first = above.any(1), above & ~below
        total = loss(cosines - threshold[0] if threshold else cosines, relevances, there).where(asked, 0).sum()
        figures = [asked, cosines.where(first, 0), first, below]
        return total, torch.stack([figure.detach().sum().double() for figure in figures])

    def _mean(self, total: Tensor, figures: Tensor) -> Loss:
        """Mean over the queries that were asked, of all ranks, with its terms."""
        asked, similarities, first, rest = figures
        terms = {"positive_similarity": similarities / first.clamp(min=1), "negatives": rest / asked.clamp(min=1)}
        if self.threshold is not None:
            terms["threshold"] = self.threshold.detach().clone()
        return Loss(share_of_mean(total, asked), {name: figure.to(total.dtype) for name, figure in terms.items()})

    def _most(self, ids: Tensor, views: int) -> int | None:
        """On a GPU an upper bound of a query's relevant items, for which each tile would wait."""
        if ids.device.type == "cpu" or self.settings.loss not in ("rank_net", "hinge"):
            return None
        if self.labels is not None or self.settings.loss == "hinge":
            return len(ids)
        ordered = ids.sort().values
        members = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
        return most_alike(members, self.alike, views=views) - (self.keys is None)

    def _loss(self, most: int | None) -> QueryLoss:
        """Loss function of the cosines and relevances of queries' items, and the mask of those that exist."""
        settings = self.settings
        binary = settings.loss == "hinge" and self.labels is None and self.lists is None
        name = "binary_hinge" if binary else settings.loss
        loss: Callable[..., Tensor] = getattr(query_losses, name)
        if name == "squared_error":
            return loss
        if name == "list_net":
            return lambda cosines, relevances, there: loss(
                cosines / settings.temperature, relevances / settings.label_temperature, there
            )
        if binary:
            return lambda cosines, relevances, there: loss(cosines / settings.temperature, relevances)
        if name in ("rank_net", "hinge"):
            loss = partial(loss, most=most)
        return lambda cosines, relevances, there: loss(cosines / settings.temperature, relevances, there)

    def _relevance(self, query_ids: Tensor, ids: Tensor, dtype: torch.dtype) -> Relevance:
        """Relevance of items of these ids to a slice of the queries."""
        if self.labels is None:
            return lambda tile: (query_ids[tile, None] == ids).to(dtype)
        between = self.labels.between(query_ids, ids, dtype)
        return lambda tile: 1 / (1 + between(tile)[0].sqrt())


def _without(dropped: Int[Tensor, " rows"], matrix: Float[Tensor, "rows all"]) -> Float[Tensor, "rows others"]:
    """Drops one column of each row."""
    columns = torch.arange(max(matrix.shape[1] - 1, 0), device=matrix.device)
    return matrix.gather(1, columns + (columns >= dropped[:, None]))
