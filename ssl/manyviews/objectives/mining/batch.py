"""The embeddings of all processes as anchors and candidates: who is whose positive, who is whose negative, how far."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyviews.engine import normalize, squared_distance_rows, unit_distance
from manyviews.objectives.losses import average, gather_views, share_of_mean


class Classes(NamedTuple):
    """Which embeddings have which id, for the anchors of this process among the embeddings of all.

    An anchor's positives are the other embeddings with its id, its negatives those with another one. Both are listed
    by arithmetic on the sorted ids, so that no table of all pairs is needed.
    """

    order: Int[Tensor, " all"]
    """The places of all embeddings, those with the same id side by side."""
    places: Int[Tensor, " anchors"]
    """The place of each anchor among all."""
    seats: Int[Tensor, " anchors"]
    """Where the anchor stands in `order`."""
    starts: Int[Tensor, " anchors"]
    """Where its id begins in `order`."""
    members: Int[Tensor, " anchors"]
    """How many embeddings have its id, itself among them."""
    largest: int
    """The members of the id that has most."""

    def mates(self, rows: slice) -> Int[Tensor, "rows members"]:
        """The places of the embeddings with the anchors' ids, themselves among them; some repeated for equal width."""
        columns = torch.arange(max(self.largest, 1), device=self.order.device)
        seats = self.starts[rows, None] + columns.minimum(self.members[rows, None] - 1)
        return self.order[seats]

    def positives(self, rows: slice) -> tuple[Int[Tensor, "rows positives"], Bool[Tensor, "rows positives"]]:
        """The places of the anchors' positives, and which of them there are: rows with fewer are filled up."""
        columns = torch.arange(self.largest - 1 if self.largest else 0, device=self.order.device)
        seats = self.starts[rows, None] + columns
        seats = seats + (seats >= self.seats[rows, None])
        return self.order[seats.clamp(max=len(self.order) - 1)], columns < self.members[rows, None] - 1

    def negatives(self, rows: slice) -> Int[Tensor, " rows"]:
        """How many negatives the anchors have."""
        return len(self.order) - self.members[rows]

    def negative_at(self, rows: slice, shares: Float[Tensor, "rows positives"]) -> Int[Tensor, "rows positives"]:
        """The places of the negatives that stand at these shares, in [0, 1), of the list of an anchor's negatives."""
        count = self.negatives(rows)[:, None]
        # In float64: float32 has fewer numbers than a large batch has negatives.
        numbers = (shares.double() * count).long().minimum((count - 1).clamp(min=0))
        seats = numbers + (numbers >= self.starts[rows, None]) * self.members[rows, None]
        return self.order[seats.clamp(max=len(self.order) - 1)]


class Batch(NamedTuple):
    """What a loss of pairs looks at: anchors, candidates, and how their products are read."""

    anchors: Float[Tensor, "anchors width"]
    candidates: Float[Tensor, "all width"]
    classes: Classes
    normalized: bool
    """Whether the products are cosines of unit rows; else they are squared distances."""
    dim: int
    """Of the embeddings."""
    key: tuple[int, int]
    """Seed and step: with the places in the whole batch they decide what is drawn."""
    positive_similarity: Float[Tensor, ""]
    """This process's part of the mean cosine of the anchors and all their positives."""

    def squared_distances(self, products: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """Squared Euclidean distances, from products."""
        return 2 - 2 * products if self.normalized else products.clamp(min=0)

    def distances(self, products: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """Euclidean distances, from products; with a zero gradient where two rows coincide, where a root has none."""
        if self.normalized:
            return unit_distance(products)
        return products.clamp(min=torch.finfo(products.dtype).eps).sqrt()

    def nearness(self, products: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """A number that grows as the distance falls, without gradient."""
        return products.detach() if self.normalized else -products.detach()

    def terms(self) -> dict[str, Tensor]:
        """The figures that every loss of pairs reports: the mean cosine of positives, and negatives of each anchor."""
        negatives = self.classes.negatives(slice(None)).to(self.anchors.dtype)
        return {"positive_similarity": self.positive_similarity, "negatives": average(negatives)}


def batch_of(
    embeddings: Float[Tensor, "views batch dim"],
    ids: Int[Tensor, " batch"],
    *,
    normalized: bool,
    seed: int,
    step: int,
) -> Batch:
    """This process's embeddings as anchors, and those of all processes as candidates; collective.

    Args:
        embeddings: of any length.
        ids: equal for positives.
        normalized: compare points on the unit sphere; else the embeddings as they are.
        seed: of what is drawn.
        step: of what is drawn.
    """
    unit = normalize(embeddings)
    used = unit if normalized else embeddings.to(unit.dtype)
    gathered = gather_views(used, ids)
    classes = classes_of(gathered.ids, gathered.own)
    anchors, candidates = used.flatten(0, 1), gathered.rows
    if not normalized:
        anchors, candidates = squared_distance_rows(anchors, candidates)
    return Batch(
        anchors,
        candidates,
        classes,
        normalized,
        embeddings.shape[2],
        (seed, step),
        _mean_cosine(unit.detach().flatten(0, 1), normalize(gathered.rows.detach()), gathered.ids, classes),
    )


def classes_of(ids: Int[Tensor, " all"], own: Int[Tensor, " anchors"]) -> Classes:
    """The classes of some ids, for the anchors at the places `own`."""
    ordered, order = ids.sort(stable=True)
    seats = torch.empty_like(order)
    seats[order] = torch.arange(len(order), device=order.device)
    wanted = ids[own]
    starts = torch.searchsorted(ordered, wanted)
    members = torch.searchsorted(ordered, wanted, right=True) - starts
    # The width of the lists has to be known on the host; it is the same for all tiles.
    largest = int(members.max()) if len(members) else 0
    return Classes(order, own, seats[own], starts, members, largest)


def _mean_cosine(anchors: Tensor, rows: Tensor, ids: Tensor, classes: Classes) -> Tensor:
    """By the sums of each class: similarities with all of a class add up to that with its sum."""
    values, numbers = ids.unique(return_inverse=True)
    sums = rows.new_zeros(len(values), rows.shape[1]).index_add(0, numbers, rows)
    total = (anchors * (sums[numbers[classes.places]] - anchors)).sum()
    return share_of_mean(total, (classes.members - 1).sum())
