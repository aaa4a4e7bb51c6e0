"""Anchors and candidates of a batch over all ranks: positives, negatives and distances."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyviews.engine import normalize, squared_distance_rows
from manyviews.engine.rows import distinct, sum_of_groups
from manyviews.objectives.losses import average, distances, gather_views, share_of_mean, squared_distances
from manyviews.objectives.objective import Embeddings, Ids


class Batch(NamedTuple):
    """Input of a loss of pairs: this rank's anchors, and the embeddings of all ranks.

    An anchor's positives are the other candidates with its id, its negatives those with another one. Both are listed by
    arithmetic on the sorted ids, without a table of all pairs.
    """

    anchors: Float[Tensor, "anchors width"]
    candidates: Float[Tensor, "all width"]
    normalized: bool
    """Whether the products are cosines of unit rows; else they are squared distances."""
    dim: int
    """Of the embeddings."""
    key: tuple[int, int]
    """Seed and step: random draws depend on them and on indices in the whole batch."""
    positive_similarity: Float[Tensor, ""]
    """This rank's part of the mean cosine of the anchors and all their positives."""
    order: Int[Tensor, " all"]
    """Indices of the candidates, sorted by id."""
    indices: Int[Tensor, " anchors"]
    """Index of each anchor among the candidates; of local views, which are none of them, beyond these."""
    seats: Int[Tensor, " anchors"]
    """Position of each anchor in `order`; of local views its length."""
    starts: Int[Tensor, " anchors"]
    """Position in `order` at which its id begins."""
    members: Int[Tensor, " anchors"]
    """Number of candidates with its id, itself among them unless it is of a local view."""
    largest: int
    """Maximum of `members`, or on a GPU an upper bound."""
    local: bool
    """Whether some anchors are of local views."""

    def mates(self, rows: slice) -> Int[Tensor, "rows members"]:
        """Indices of the embeddings with the anchors' ids, repeated for equal width."""
        columns = torch.arange(max(self.largest, 1), device=self.order.device)
        seats = self.starts[rows, None] + columns.minimum(self.members[rows, None] - 1)
        return self.order[seats]

    def positives(self, rows: slice) -> tuple[Int[Tensor, "rows positives"], Bool[Tensor, "rows positives"]]:
        """Indices of the anchors' positives, and a mask of them: rows with fewer are padded."""
        columns = torch.arange(max(self.largest - (not self.local), 0), device=self.order.device)
        seats = self.starts[rows, None] + columns
        seats = seats + (seats >= self.seats[rows, None])
        return self.order[seats.clamp(max=len(self.order) - 1)], columns < self.positive_counts(rows)[:, None]

    def positive_counts(self, rows: slice) -> Int[Tensor, " rows"]:
        """Number of positives of each anchor."""
        return self.members[rows] - (self.seats[rows] < len(self.order)).long()

    def negatives(self, rows: slice) -> Int[Tensor, " rows"]:
        """Number of negatives of each anchor."""
        return len(self.order) - self.members[rows]

    def negative_at(self, rows: slice, shares: Float[Tensor, "rows positives"]) -> Int[Tensor, "rows positives"]:
        """Indices of the negatives at these shares, in [0, 1), of each anchor's list of them."""
        count = self.negatives(rows)[:, None]
        # In float64: float32 has fewer numbers than a large batch has negatives.
        numbers = (shares.double() * count).long().minimum((count - 1).clamp(min=0))
        seats = numbers + (numbers >= self.starts[rows, None]) * self.members[rows, None]
        return self.order[seats.clamp(max=len(self.order) - 1)]

    def squared_distances(self, products: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """Squared Euclidean distances from products."""
        return squared_distances(products, normalized=self.normalized)

    def distances(self, products: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """Euclidean distances from products; with a zero gradient where rows coincide."""
        return distances(self.squared_distances(products))

    def nearness(self, products: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """A number that falls as the distance grows, without gradient."""
        return products.detach() if self.normalized else -products.detach()

    def moved(self, nearness: Float[Tensor, "*pairs"], farther: float, *, squared: bool) -> Float[Tensor, "*pairs"]:
        """Nearness of points that are farther by a distance or a squared distance."""
        distance = self.squared_distances(nearness if self.normalized else -nearness).clamp(min=0)
        distance = distance + farther if squared else (distance.sqrt() + farther).square()
        return 1 - distance / 2 if self.normalized else -distance

    def terms(self) -> dict[str, Tensor]:
        """Terms of every loss of pairs: the mean cosine of positives, and the number of negatives."""
        negatives = self.negatives(slice(None)).to(self.anchors.dtype)
        return {"positive_similarity": self.positive_similarity, "negatives": average(negatives)}


def batch_of(
    embeddings: Embeddings,
    ids: Ids,
    *,
    normalized: bool,
    seed: int,
    step: int,
    alike: int | None = None,
    keys: int | None = None,
) -> Batch:
    """Makes anchors of this rank's embeddings, and candidates of those of all ranks; collective.

    Compares points on the unit sphere if `normalized`, else the embeddings as they are. `alike` and `keys` as in
    `Population`.
    """
    unit = normalize(embeddings)
    used = unit if normalized else embeddings.to(unit.dtype)
    views, anchor_ids, images = len(embeddings), ids.repeat(len(embeddings)), len(ids)
    candidates, ids, own = gather_views(used, ids, keys)
    compared = views if keys is None else keys
    ordered, order = ids.sort(stable=True)
    seats = order.new_full((len(order) // compared * views,), len(order))
    seats[order] = torch.arange(len(order), device=order.device)
    starts = torch.searchsorted(ordered, anchor_ids)
    members = torch.searchsorted(ordered, anchor_ids, right=True) - starts
    # The width of the lists has to be known on the host; it is the same for all tiles.
    largest = most_alike(members, alike, views=compared)
    # Cosines with all of a class add up to that with its sum.
    anchors, rows = unit.detach().flatten(0, 1), normalize(candidates.detach())
    classes, groups = distinct(ids)
    sums = sum_of_groups(rows, groups, len(classes))
    itself = seats[own] < len(order)
    mates = sums[groups[own[:images]]].repeat(views, 1) - anchors * itself[:, None]
    similarity = share_of_mean((anchors * mates).sum(), (members - itself.long()).sum())
    anchors = used.flatten(0, 1)
    if not normalized:
        anchors, candidates = squared_distance_rows(anchors, candidates)
    by_id = (order, own, seats[own], starts, members, largest, keys is not None)
    return Batch(anchors, candidates, normalized, embeddings.shape[2], (seed, step), similarity, *by_id)


def most_alike(members: Int[Tensor, " anchors"], alike: int | None, *, views: int) -> int:
    """Maximum of the numbers of embeddings with the anchors' ids; a GPU is waited for only if it has no bound."""
    if alike is not None and members.device.type != "cpu":
        return views * alike
    return int(members.max()) if len(members) else 0


def batch_of_rows(
    rows: Float[Tensor, "all dim"], ids: Int[Tensor, " all"], *, normalized: bool, seed: int, step: int
) -> Batch:
    """Makes anchors and candidates of the same rows, as `batch_of` does of those of all ranks; not collective.

    Without the mean cosine of positives, which is 0.
    """
    used = normalize(rows) if normalized else rows
    ordered, order = ids.sort(stable=True)
    seats = torch.empty_like(order)
    seats[order] = torch.arange(len(order), device=order.device)
    starts = torch.searchsorted(ordered, ids)
    members = torch.searchsorted(ordered, ids, right=True) - starts
    anchors, candidates = (used, used) if normalized else squared_distance_rows(used, used)
    indices, largest = torch.arange(len(ids), device=ids.device), int(members.max()) if len(members) else 0
    by_id = (order, indices, seats, starts, members, largest, False)
    return Batch(anchors, candidates, normalized, rows.shape[1], (seed, step), used.new_zeros(()), *by_id)
