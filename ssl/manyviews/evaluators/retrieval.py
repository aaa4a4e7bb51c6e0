"""Retrieval: whether the images nearest to an image are of its class, best of classes never seen in training."""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.engine import top_k
from manyviews.evaluators.distance import Nearness, searchable
from manyviews.evaluators.ranking import ideal_hits, ndcg_at_k

HITS = 1 << 22
"""Places in the rankings of one block of queries: 32 MiB for each figure of all places."""


class RetrievalSettings(Settings):
    """How many of the nearest images are looked at."""

    recall_at: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field((1, 2, 4, 8), min_length=1, max_length=64)
    """Numbers k of Recall@k; papers take 1, 2, 4, 8 for few hundred classes and 1, 10, 100, 1000 for thousands."""
    ndcg_at: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field((10,), max_length=64)
    """Numbers k of NDCG@k."""


class RetrievalResult(NamedTuple):
    """The figures of each query that has a relevant reference; their means are what papers report."""

    queries: Int64[Tensor, " counted"]
    """Which of the queries these are, ascending; the others are in no figure."""
    left_out: int
    """Queries without any relevant reference."""
    recall: Bool[Tensor, "grid counted"]
    """Whether a relevant reference is among the k nearest. Precision@1 is Recall@1."""
    r_precision: Float[Tensor, " counted"]
    """Share of relevant ones among the R nearest references, where R is the number of relevant ones."""
    map_at_r: Float[Tensor, " counted"]
    """(1 / R) Σ_{i ≤ R} P(i) · [the i-th nearest is relevant], P(i) the share of relevant ones among the i nearest."""
    ndcg: Float[Tensor, "grids counted"]
    """Discounted gain of the k nearest, as a share of that of the best order."""


@torch.no_grad()
def retrieve(
    queries: Float[Tensor, "queries dim"],
    query_labels: Int[Tensor, " queries"],
    references: Float[Tensor, "references dim"] | None = None,
    reference_labels: Int[Tensor, " references"] | None = None,
    *,
    query_ids: Int[Tensor, " queries"] | None = None,
    reference_ids: Int[Tensor, " references"] | None = None,
    settings: RetrievalSettings | None = None,
    nearness: Nearness = "cosine",
    block: int | None = None,
    shared: bool = False,
) -> RetrievalResult:
    """Looks up each query among the references and finds how high those of its class stand, exactly, in float64.

    Recall@k as in Jégou et al. 2011 and Song et al. 2016; R-precision and MAP@R as in Musgrave et al. 2020, section
    3.2; NDCG as in `ranking`, with relevances of 0 and 1. Equal similarities go to the lower reference. Without
    references each image is looked up among all others. A reference that has the query's id is never its answer and
    does not count among the relevant ones; images labelled −1 are neither looked up nor found. The rankings are made
    block by block of queries: no table of all queries and references is kept.

    Args:
        queries: features to look up.
        query_labels: their classes.
        references: features to find; without, the queries.
        reference_labels: their classes.
        query_ids: with `reference_ids`, the image that a row stands for; needed where an image is in both.
        reference_ids: likewise.
        settings: grids of k; a k beyond the number of references means all of them.
        nearness: cosine, or Euclidean distance of the features as they are.
        block: queries ranked at once; without, as many as keep the memory small. It changes no result.
        shared: all processes, which hold the same, come together: each searches its share of the references, and all
            get the whole answer.

    Raises:
        ValueError: if ids or labels are given on one side only, the queries are the references without ids, or no
            query has a relevant reference.
    """
    settings = settings or RetrievalSettings()
    if references is None and reference_labels is None and query_ids is None and reference_ids is None:
        references, reference_labels = queries, query_labels
        query_ids = reference_ids = torch.arange(len(queries), device=queries.device)
    if references is None or reference_labels is None or (query_ids is None) != (reference_ids is None):
        raise ValueError("references and their labels, or ids, are given on one side only; give both or neither")
    if query_ids is None and queries.shape == references.shape and torch.equal(queries, references):
        raise ValueError("the queries are the references, so each would find itself; give query_ids and reference_ids")
    labelled = reference_labels >= 0
    references, reference_labels = references[labelled], reference_labels[labelled]
    reference_ids = reference_ids[labelled] if reference_ids is not None else None
    relevant = _relevant(query_labels, reference_labels, query_ids, reference_ids)
    counted = (relevant > 0).nonzero().squeeze(1)
    asked = int((query_labels >= 0).sum())
    if not len(counted):
        raise ValueError(
            f"none of {asked} queries has another image of its class to find; retrieval takes classes of 2 images or "
            "more"
        )
    left, right = searchable(queries[counted], references, nearness)
    relevant, labels = relevant[counted], query_labels[counted]
    ids = query_ids[counted] if query_ids is not None else None

    recall = torch.empty(len(settings.recall_at), len(counted), dtype=torch.bool, device=queries.device)
    ndcg = left.new_empty(len(settings.ndcg_at), len(counted), dtype=torch.float64)
    r_precision, map_at_r = (left.new_empty(len(counted), dtype=torch.float64) for _ in range(2))
    widest = max(*settings.recall_at, *settings.ndcg_at, 1)
    # Queries of as many relevant references beside each other: a block then looks no further than it has to.
    order = relevant.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        depth = min(max(int(relevant[order[start]]), widest), len(references))
        rows = order[start : start + (block or max(1, HITS // depth))]
        start += len(rows)
        similarities, places = top_k(
            left[rows],
            right,
            depth,
            query_ids=ids[rows] if ids is not None else None,
            key_ids=reference_ids,
            shared=shared,
        )
        hits = (reference_labels[places] == labels[rows, None]) & (similarities > -torch.inf)
        for index, k in enumerate(settings.recall_at):
            recall[index, rows] = hits[:, :k].any(1)
        for index, k in enumerate(settings.ndcg_at):
            ndcg[index, rows] = ndcg_at_k(hits[:, :k].double(), ideal_hits(relevant[rows], min(k, depth)))
        r_precision[rows], map_at_r[rows] = at_r(hits, relevant[rows])
    return RetrievalResult(counted, asked - len(counted), recall, r_precision, map_at_r, ndcg)


def at_r(
    hits: Bool[Tensor, "queries depth"], relevant: Int[Tensor, " queries"]
) -> tuple[Float[Tensor, " queries"], Float[Tensor, " queries"]]:
    """R-precision and average precision at R of rankings, from which places are hits; float64.

    Args:
        hits: whether the reference at each place is relevant, the nearest first; at least R places.
        relevant: the number R of relevant references, at least 1.
    """
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    hits = hits & (ranks <= relevant[:, None])
    found = hits.cumsum(1)
    precision = (found / ranks.double()).masked_fill_(~hits, 0)
    return found[:, -1] / relevant.double(), precision.sum(1) / relevant


def _relevant(
    query_labels: Tensor, reference_labels: Tensor, query_ids: Tensor | None, reference_ids: Tensor | None
) -> Tensor:
    """How many references have each query's class, without those that have its id; 0 for unlabelled queries."""
    sizes = torch.bincount(reference_labels, minlength=int(query_labels.max()) + 1 if len(query_labels) else 0)
    relevant = torch.where(query_labels >= 0, sizes[query_labels.clamp(min=0)], 0)
    if query_ids is None or reference_ids is None:
        return relevant
    # Ids may be repeated: references of the query's id and class are counted, each pair of them as one number.
    _, dense = torch.unique(torch.cat([query_ids, reference_ids]), return_inverse=True)
    own = dense[: len(query_ids)] * len(sizes) + query_labels.clamp(min=0)
    present = (dense[len(query_ids) :] * len(sizes) + reference_labels).sort().values
    excluded = torch.searchsorted(present, own, right=True) - torch.searchsorted(present, own)
    return torch.where(query_labels >= 0, relevant - excluded, 0)
