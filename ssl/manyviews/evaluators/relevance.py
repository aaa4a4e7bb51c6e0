"""Relevance of images to a query: by class, by continuous labels, by lists, or by triplets."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from manyviews.engine.rows import slices
from manyviews.evaluators.distance import Nearness, searchable, similarity_of_pairs
from manyviews.objectives.labels import Labels

TABLE = 1 << 21
"""Numbers of one block of queries and items: 16 MiB in float64. It changes no result."""
Positions = Int64[Tensor, " queries"]


class Block(NamedTuple):
    """Some queries with their items, of the same number for each."""

    positions: Int64[Tensor, " queries"]
    """Of the queries among all queries."""
    items: Int64[Tensor, "queries items"]
    """Ids of images."""
    scores: Float[Tensor, "queries items"]
    relevances: Float64[Tensor, "queries items"]


class Graded(NamedTuple):
    """Relevance of all images of a gallery to each of them."""

    images: Int64[Tensor, " gallery"]
    """Ids of the images: each is a query, and all others are its items."""
    of: Callable[[Positions], Float64[Tensor, "queries gallery"]]
    """Relevance of all images to those at some positions of `images`."""
    by: str
    """What makes an image relevant, for titles."""

    def blocks(self, features: Float[Tensor, "all dim"], chosen: Positions, nearness: Nearness) -> Iterator[Block]:
        """Yields the chosen queries with all other images as items, by their position."""
        if len(self.images) < 2:
            return
        own = features[self.images.to(features.device)]
        left, right = searchable(own[chosen.to(features.device)], own, nearness)
        columns = torch.arange(len(own) - 1)
        for rows in slices(0, len(chosen), max(1, TABLE // len(own))):
            positions = chosen[rows]
            # All but the query itself.
            others = columns + (columns >= positions[:, None])
            scores, relevances = (left[rows] @ right.T).cpu(), self.of(positions)
            yield Block(positions, self.images[others], scores.gather(1, others), relevances.gather(1, others))


class Lists(NamedTuple):
    """Relevance of the items that are listed for each query, and of no others."""

    images: Int64[Tensor, " queries"]
    """Ids of the queries."""
    counts: Int64[Tensor, " queries"]
    """Number of items of each query, at least 1."""
    items: Int64[Tensor, " items"]
    """Ids of the items of the first query, then of the second, and so on."""
    relevances: Float64[Tensor, " items"]
    by: str

    def blocks(self, features: Float[Tensor, "all dim"], chosen: Positions, nearness: Nearness) -> Iterator[Block]:
        """Yields the chosen queries with their items, those with equally many items together."""
        begins = self.counts.cumsum(0) - self.counts
        for count in self.counts[chosen].unique().tolist():
            same = chosen[self.counts[chosen] == count]
            for rows in slices(0, len(same), max(1, TABLE // count)):
                positions = same[rows]
                entries = begins[positions, None] + torch.arange(count)
                items = self.items[entries]
                pairs = torch.stack([self.images[positions, None].expand_as(items), items], 2).flatten(0, 1)
                scores = similarity_of_pairs(features, pairs.to(features.device), nearness).cpu().view(items.shape)
                yield Block(positions, items, scores, self.relevances[entries])


class Triplets(NamedTuple):
    """Triplets of images: the anchor, one that is nearer to it, and one that is farther."""

    images: Int64[Tensor, "triplets 3"]
    by: str


Relevance = Graded | Lists | Triplets


class RankedQuery(NamedTuple):
    """A query with its nearest items and those that should be, each with its relevance."""

    query: int
    value: float
    """NDCG at the first k."""
    ranked: tuple[tuple[int, float], ...]
    ideal: tuple[tuple[int, float], ...]


class RankingExamples(NamedTuple):
    """Queries with the worst and the best rankings."""

    worst: tuple[RankedQuery, ...]
    best: tuple[RankedQuery, ...]
    by: str
    """What made images relevant."""
    figure: str
    """The name of their value, such as NDCG@10."""


def same_class(labels: Int[Tensor, " images"], images: Int64[Tensor, " gallery"]) -> Graded:
    """Returns relevance 1 for images of the query's class, else 0; unlabelled images are left out.

    Examples:
        >>> same_class(torch.tensor([0, 1, 0]), torch.arange(3)).of(torch.tensor([0])).tolist()
        [[1.0, 0.0, 1.0]]
    """
    images = images[labels[images] >= 0]
    own = labels[images]
    return Graded(images, lambda queries: (own[queries, None] == own).double(), "same class")


def near_values(values: Float[Tensor, "images numbers"], images: Int64[Tensor, " gallery"], source: str) -> Graded:
    """Returns relevance 1 / (1 + d), with d the Euclidean distance of continuous labels.

    With linear gain, NDCG is then that of Kim et al. 2019 and of the authors' code: gain 2^r with r = −log2(1 + d).
    `source` names the values in titles.

    Examples:
        >>> near_values(torch.tensor([[0.0], [1.0], [3.0]]), torch.arange(3), "file").of(torch.tensor([0])).tolist()
        [[1.0, 0.5, 0.25]]
    """
    labels, every = Labels(values[images]), torch.arange(len(images))

    def of(queries: Positions) -> Float64[Tensor, "queries gallery"]:
        squares, _ = labels.between(queries, every, torch.float64)(slice(None))
        # Equal distances stay equal: they differ by the rounding of float64 alone.
        return (1 / (1 + squares.sqrt())).float().double()

    return Graded(images, of, f"1 / (1 + distance of values={source})")
