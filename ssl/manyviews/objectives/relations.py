"""Relations between images as data: batches of lists, each a query and items of known relevance."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from manyviews.engine import normalize, squared_distance_rows, sum_over_tiles
from manyviews.engine.rows import at_least_float32
from manyviews.objectives.losses import gather_views
from manyviews.objectives.objective import Embeddings, Ids

Kind = Literal["pairs", "triplets", "ranked"]
Measure = Literal["cosine", "product", "squared_distance"]


class Relations(NamedTuple):
    """Known relevances of items to queries, and how batches are made of them."""

    kind: Kind
    rows: Int[Tensor, "rows columns"]
    """Ids of a query and its item; of triplets, of a query, a relevant item and a less relevant one."""
    relevances: Float[Tensor, "rows items"]
    """Relevance of each item of a row, 0 or more; of pairs at most 1."""
    size: int
    """Images of a list in a batch: a query and its items. Batches are lists one after another; a list with fewer items
    is filled up with its query."""
    others: bool = False
    """Whether images of a batch without a relation to a query are items of relevance 0 too."""


class Lists(nn.Module):
    """Looks up the relevances of the lists of a batch; equal on all ranks.

    They follow from the recipe and the images, so they are no part of a checkpoint.

    Examples:
        >>> triplets = Relations("triplets", torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 0.0]]), size=3)
        >>> relevances, there = Lists(triplets).relevances(torch.tensor([[0, 1, 2], [1, 0, 2]]))
        >>> relevances.tolist(), there.tolist()
        ([[1.0, 0.0], [0.0, 0.0]], [[True, True], [False, False]])
    """

    values: Tensor
    related: Tensor

    def __init__(self, relations: Relations) -> None:
        super().__init__()
        rows, self.kind, self.size, self.others = relations.rows, relations.kind, relations.size, relations.others
        self.images = int(rows.max()) + 1
        # A row is found column by column: the number of its first columns, then those with the next one.
        self.columns = rows.shape[1] - 1
        keys = rows[:, 0]
        for column in range(self.columns):
            known, keys = (keys * self.images + rows[:, column + 1]).unique(return_inverse=True)
            self.register_buffer(f"known_{column}", known, persistent=False)
        values = torch.empty(len(known), self.columns).index_copy_(0, keys, relations.relevances.float())
        self.register_buffer("values", values, persistent=False)
        pairs = torch.cat([rows[:, 0] * self.images + rows[:, column + 1] for column in range(self.columns)])
        self.register_buffer("related", pairs.unique(), persistent=False)

    def relevances(
        self, lists: Int[Tensor, "lists size"]
    ) -> tuple[Float[Tensor, "lists items"], Bool[Tensor, "lists items"]]:
        """Relevance of each item of the lists, 0 without a relation, and a mask of those with one."""
        items = lists[:, 1:].unflatten(1, (-1, self.columns))
        keys = lists[:, :1].expand(items.shape[:2])
        there = torch.ones_like(keys, dtype=torch.bool)
        for column in range(self.columns):
            keys, known = self._find(keys, items[..., column], getattr(self, f"known_{column}"))
            there = there & known
        relevances, there = self.values[keys], there[..., None].expand_as(items)
        return relevances.where(there, 0).flatten(1), there.flatten(1)

    def unrelated(self, queries: Int[Tensor, " rows"], ids: Int[Tensor, " all"]) -> Bool[Tensor, "rows all"]:
        """Mask of the images that are neither the query nor in a relation with it."""
        _, known = self._find(queries[:, None].expand(-1, len(ids)), ids.expand(len(queries), -1), self.related)
        return ~known & (queries[:, None] != ids)

    def _find(self, keys: Tensor, ids: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of keys and ids among the known ones, and a mask of those that are among them."""
        # Images beyond the largest one of all relations have none.
        wanted = torch.where(ids < self.images, keys * self.images + ids, -1)
        indices = torch.searchsorted(known, wanted.contiguous()).clamp(max=len(known) - 1)
        return indices, known[indices] == wanted


def sum_over_lists(
    embeddings: Embeddings,
    ids: Ids,
    lists: Lists,
    measure: Measure,
    term: Callable[..., tuple[Tensor, Tensor]],
    *parameters: Tensor,
) -> tuple[Float[Tensor, ""], Float[Tensor, " figures"]]:
    """Sums a term over this rank's lists; collective if the images of other lists are items too.

    Each call `term(products, relevances, there, *parameters)` is for some lists: the `measure` of their queries and
    items, [lists, items], the relevances, and a mask of the items that exist. What it returns is as of
    `sum_over_tiles`, which differentiates it. Each view of the images has its own lists.

    Where a batch's other images are items, they follow the list's own ones; `lists.others` says so.
    """
    views, batch = embeddings.shape[:2]
    if lists.others:
        rows, row_ids, own = gather_views(at_least_float32(embeddings), ids)
    else:
        rows, row_ids = at_least_float32(embeddings).flatten(0, 1), ids.repeat(views)
        own = torch.arange(views * batch, device=ids.device)
    by_list, seats = ids.view(-1, lists.size), own.view(-1, lists.size)
    query_ids, columns = by_list[:, 0].repeat(views), seats[:, 1:]
    relevances, there = (part.repeat(views, 1) for part in lists.relevances(by_list))
    if measure == "cosine":
        rows = normalize(rows)
    queries = rows[seats[:, 0]]
    if measure == "squared_distance":
        queries, rows = squared_distance_rows(queries, rows)

    def tile(some: slice, products: Tensor, *learned: Tensor) -> tuple[Tensor, Tensor]:
        items, known, exist = products.gather(1, columns[some]), relevances[some].to(products.dtype), there[some]
        if lists.others:
            items = torch.cat([items, products], 1)
            known = torch.cat([known, torch.zeros_like(products)], 1)
            exist = torch.cat([exist, lists.unrelated(query_ids[some], row_ids)], 1)
        return term(items, known, exist, *learned)

    return sum_over_tiles(queries, rows, tile, *parameters)
