"""Relations between images as data: batches of lists, each a query and items of known relevance."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from manyviews.engine import normalize, squared_distance_rows, sum_over_tiles
from manyviews.engine.rows import at_least_float32
from manyviews.objectives.losses import gather_views, share_of_mean
from manyviews.objectives.objective import Embeddings, Ids

Kind = Literal["pairs", "triplets", "ranked"]
Measure = Literal["cosine", "product", "squared_distance"]
Term = Callable[..., tuple[Tensor, Tensor]]
"""Called with a slice of the lists, products, relevances, mask of existing items, parameters; see `ListBatch.sum`."""


class Relations(NamedTuple):
    """Known relevances of items to queries, and how batches are made of them."""

    kind: Kind
    rows: Int[Tensor, "rows columns"]
    """Ids of a query and its item; of triplets, of a query, a relevant item and a less relevant one."""
    relevances: Float[Tensor, "rows items"]
    """Relevance of each item of a row, 0 or more; of pairs at most 1."""
    size: int
    """Images of a list in a batch: a query and its items; of triplets 3. Batches are lists one after another; a list
    with fewer items is filled up with its query."""
    others: bool = False
    """Whether images of a batch without a relation to a query are items of relevance 0 too."""


class Lists(nn.Module):
    """Looks up the relevances of the lists of a batch; equal on all ranks.

    They follow from the recipe and the images, so they are no part of a checkpoint.

    Raises:
        ValueError: if lists of triplets are not of 3 images.

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
        if self.kind == "triplets" and self.size != 3:
            raise ValueError(f"a triplet is a list of 3 images, and size is {self.size}")
        self.images = int(rows.max()) + 1
        # A row is looked up column by column: the number of its first columns, then those with the next one.
        self.columns = rows.shape[1] - 1
        keys = rows[:, 0]
        for column in range(self.columns):
            known, keys = (keys * self.images + rows[:, column + 1]).unique(return_inverse=True)
            self.register_buffer(f"known_{column}", known, persistent=False)
        values = torch.empty(len(known), self.columns).index_copy_(0, keys, relations.relevances.float())
        self.register_buffer("values", values, persistent=False)
        queries, items = rows[:, :1].expand(-1, self.columns).flatten(), rows[:, 1:].flatten()
        both = torch.cat([queries * self.images + items, items * self.images + queries])
        self.register_buffer("related", both.unique(), persistent=False)

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
        """Mask of the images that are neither the query nor in a relation with it, as its item or it as theirs."""
        _, known = self._find(queries[:, None].expand(-1, len(ids)), ids.expand(len(queries), -1), self.related)
        return ~known & (queries[:, None] != ids)

    def related_to(self, count: int) -> Int[Tensor, " images"]:
        """Number of images in a relation with each of `count` images."""
        return torch.bincount(self.related // self.images, minlength=count)

    def _find(self, keys: Tensor, ids: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of keys and ids among the known ones, and a mask of those that are among them."""
        # Images beyond the largest one of all relations have none.
        wanted = torch.where(ids < self.images, keys * self.images + ids, -1)
        indices = torch.searchsorted(known, wanted.contiguous()).clamp(max=len(known) - 1)
        return indices, known[indices] == wanted


class ListBatch(NamedTuple):
    """This rank's lists of a batch, and the rows that their items are among.

    Every view of a query has its own list, with the items in the same view. Queries of local views have those of one of
    the other views: a local view is nobody's item.
    """

    queries: Float[Tensor, "lists width"]
    rows: Float[Tensor, "all width"]
    """Products of queries and rows are what the batch was made to measure."""
    items: Int[Tensor, "lists items"]
    """Indices of each list's own items among the rows."""
    relevances: Float[Tensor, "lists items"]
    there: Bool[Tensor, "lists items"]
    """Mask of the own items that exist."""
    unrelated: Callable[[slice], Bool[Tensor, "some all"]] | None
    """Mask of the rows that are further items of some lists, of relevance 0; None: no row is."""
    positive_similarity: Float[Tensor, ""]
    """This rank's part of the mean cosine of queries and items, weighted by relevance."""

    def sum(self, term: Term, *parameters: Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, " figures"]]:
        """Sums a term over this rank's lists.

        Each call `term(lists, products, relevances, there, *parameters)` is for a slice of the lists: the products of
        their queries and items, [lists, items], the relevances, and a mask of the items that exist. Items that are only
        of the batch follow the list's own ones. What it returns is as of `sum_over_tiles`, which differentiates it.
        """

        def tile(some: slice, products: Tensor, *learned: Tensor) -> tuple[Tensor, Tensor]:
            items, known, exist = products.gather(1, self.items[some]), self.relevances[some], self.there[some]
            if self.unrelated is not None:
                items = torch.cat([items, products], 1)
                known = torch.cat([known, torch.zeros_like(products)], 1)
                exist = torch.cat([exist, self.unrelated(some)], 1)
            return term(some, items, known, exist, *learned)

        return sum_over_tiles(self.queries, self.rows, tile, *parameters)

    def terms(self, negatives: Tensor) -> dict[str, Tensor]:
        """Terms of every loss over lists, from the number of items that this rank's were pushed below or away."""
        count = torch.full_like(negatives, len(self.queries))
        return {"positive_similarity": self.positive_similarity, "negatives": share_of_mean(negatives, count)}


def list_batch(
    embeddings: Embeddings, ids: Ids, lists: Lists, measure: Measure, *, keys: int | None = None
) -> ListBatch:
    """Makes queries and items of this rank's images, and of all ranks' if others are items too; collective.

    `keys` as in `Population`.

    Raises:
        ValueError: if the last list is not whole.

    Examples:
        >>> lists = Lists(Relations("pairs", torch.tensor([[0, 1]]), torch.tensor([[0.5]]), size=2))
        >>> points = torch.tensor([[0.0, 2.0], [0.0, 3.0]])
        >>> batch = list_batch(points[None], torch.arange(2), lists, "product")
        >>> total, _ = batch.sum(lambda _, products, same, there: ((products * same).sum(), same.new_zeros(1)))
        >>> total.item()
        3.0
    """
    if len(ids) % lists.size:
        raise ValueError(
            f"{len(ids)} images are no whole number of lists of {lists.size}; give each process whole ones"
        )
    views, count = len(embeddings), len(ids) // lists.size
    used = normalize(embeddings) if measure == "cosine" else at_least_float32(embeddings)
    if lists.others:
        rows, row_ids, own = gather_views(used, ids, keys)
    else:
        rows, row_ids = used[:keys].flatten(0, 1), ids.repeat(views if keys is None else keys)
        own = torch.arange(views * len(ids), device=ids.device)
    compared = torch.arange(views, device=ids.device) % (keys or views)
    items = own.view(views, count, lists.size)[compared, :, 1:].flatten(0, 1)
    by_list = ids.view(count, lists.size)
    relevances, there = (part.repeat(views, 1) for part in lists.relevances(by_list))
    relevances, query_ids = relevances.to(rows.dtype), by_list[:, 0].repeat(views)
    queries = used[:, :: lists.size].flatten(0, 1)
    with torch.no_grad():
        cosines = torch.einsum("ld,lid->li", normalize(queries), normalize(rows[items]))
        similarity = share_of_mean((cosines * relevances).sum(), relevances.sum())
    if measure == "squared_distance":
        queries, rows = squared_distance_rows(queries, rows)

    def unrelated(some: slice) -> Tensor:
        return lists.unrelated(query_ids[some], row_ids)

    return ListBatch(queries, rows, items, relevances, there, unrelated if lists.others else None, similarity)
