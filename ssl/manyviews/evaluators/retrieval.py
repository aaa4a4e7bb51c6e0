"""Retrieval: Recall@k, R-precision, MAP@R and NDCG of the nearest images."""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.engine import top_k
from manyviews.evaluators.distance import Nearness, searchable
from manyviews.evaluators.gains import discounted, ideal_hits

HITS = 1 << 22
"""Ranks of one block of queries: 32 MiB for a float64 number at each rank. It changes no result."""


class RetrievalSettings(Settings):
    """The numbers of nearest images that count."""

    recall_at: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field((1, 2, 4, 8), min_length=1, max_length=64)
    """Numbers k of Recall@k; papers take 1, 2, 4, 8 for few hundred classes and 1, 10, 100, 1000 for thousands."""
    ndcg_at: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field((10,), max_length=64)
    """Numbers k of NDCG@k."""


class RetrievalResult(NamedTuple):
    """Scores of each query that has a relevant reference; papers report their means."""

    queries: Int64[Tensor, " counted"]
    """Indices of these queries, ascending."""
    left_out: int
    """Number of queries without a relevant reference."""
    recall: Bool[Tensor, "grid counted"]
    """Whether a relevant reference is among the k nearest; Precision@1 is Recall@1."""
    r_precision: Float[Tensor, " counted"]
    """Share of relevant references among the R nearest, where R is the number of relevant ones."""
    map_at_r: Float[Tensor, " counted"]
    """(1 / R) Σ_{i ≤ R} P(i) · [the i-th nearest is relevant]; P(i): share of relevant ones among the i nearest."""
    ndcg: Float[Tensor, "grids counted"]
    """Discounted cumulative gain of the k nearest divided by that of the best order."""


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
    shared: bool = False,
) -> RetrievalResult:
    """Ranks the references by similarity to each query and scores the ranking, exactly.

    Recall@k as in Jégou et al. 2011 and Song et al. 2016; R-precision and MAP@R as in Musgrave et al. 2020, section
    3.2; NDCG as in `gains`, with relevances of 0 and 1. Equal similarities go to the lower reference. Without
    references each query is compared with all others. A reference with the query's id is left out of its ranking and of
    its number of relevant ones, as are all images labelled −1. Queries are ranked block by block: no table of all
    queries and references is stored. With `shared`, collective: all ranks pass the same, each searches its share of the
    references, and all get the whole result. All is computed where the queries are; the result is on the CPU.

    Raises:
        ValueError: if ids or labels are given on one side only, the queries are the references without ids, or no
            query has a relevant reference.

    Examples:
        >>> retrieve(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])).recall[0].tolist()
        [True, True, True, True]
    """
    settings = settings or RetrievalSettings()
    if references is None and reference_labels is None and query_ids is None and reference_ids is None:
        references, reference_labels = queries, query_labels
        query_ids = reference_ids = torch.arange(len(queries), device=queries.device)
    if references is None or reference_labels is None or (query_ids is None) != (reference_ids is None):
        raise ValueError("references and their labels, or ids, are given on one side only; give both or neither")
    if query_ids is None and queries.shape == references.shape and torch.equal(queries, references.to(queries.device)):
        raise ValueError("the queries are the references, so each would find itself; give query_ids and reference_ids")
    # Labels and ids are counted on the CPU, where numbers are read.
    query_labels, reference_labels = query_labels.cpu(), reference_labels.cpu()
    query_ids, reference_ids = (None if ids is None else ids.cpu() for ids in (query_ids, reference_ids))
    device, labelled = queries.device, reference_labels >= 0
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
    ids = query_ids[counted].to(device) if query_ids is not None else None
    recall = torch.empty(len(settings.recall_at), len(counted), dtype=torch.bool, device=device)
    ndcg = left.new_empty(len(settings.ndcg_at), len(counted), dtype=torch.float64)
    r_precision, map_at_r = (left.new_empty(len(counted), dtype=torch.float64) for _ in range(2))
    widest = max(*settings.recall_at, *settings.ndcg_at, 1)
    # Sorted by the number of relevant references: a block is searched no deeper than necessary.
    numbers, order = relevant[counted].sort(descending=True, stable=True)
    relevant, labels = numbers.to(device), query_labels[counted[order]].to(device)
    targets, order, start = reference_labels.to(device), order.to(device), 0
    while start < len(order):
        depth = min(max(int(numbers[start]), widest), len(references))
        part = slice(start, start + max(1, HITS // depth))
        rows = order[part]
        start += len(rows)
        similarities, nearest = top_k(
            left[rows],
            right,
            depth,
            query_ids=ids[rows] if ids is not None else None,
            key_ids=reference_ids,
            shared=shared,
        )
        hits = (targets[nearest] == labels[part, None]) & (similarities > -torch.inf)
        for index, k in enumerate(settings.recall_at):
            recall[index, rows] = hits[:, :k].any(1)
        for index, k in enumerate(settings.ndcg_at):
            ideal = discounted(ideal_hits(relevant[part], min(k, depth)))
            ndcg[index, rows] = discounted(hits[:, :k].double()) / ideal
        r_precision[rows], map_at_r[rows] = at_r(hits, relevant[part])
    scores = (each.cpu() for each in (recall, r_precision, map_at_r, ndcg))
    return RetrievalResult(counted, asked - len(counted), *scores)


def at_r(
    hits: Bool[Tensor, "queries depth"], relevant: Int[Tensor, " queries"]
) -> tuple[Float[Tensor, " queries"], Float[Tensor, " queries"]]:
    """Computes R-precision and average precision at R, in float64.

    `hits` is whether the reference at each rank is relevant, for at least R ranks; `relevant` is R, at least 1.
    """
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    hits = hits & (ranks <= relevant[:, None])
    counts = hits.cumsum(1)
    precision = (counts / ranks.double()).masked_fill_(~hits, 0)
    return counts[:, -1] / relevant.double(), precision.sum(1) / relevant


def _relevant(
    query_labels: Tensor, reference_labels: Tensor, query_ids: Tensor | None, reference_ids: Tensor | None
) -> Tensor:
    """Counts the references of each query's class, without its id; 0 for unlabelled queries."""
    sizes = torch.bincount(reference_labels, minlength=int(query_labels.max()) + 1 if len(query_labels) else 0)
    relevant = torch.where(query_labels >= 0, sizes[query_labels.clamp(min=0)], 0)
    if query_ids is None or reference_ids is None:
        return relevant
    # Ids may be repeated: (id, class) pairs are encoded as one number, and those of the query are counted.
    _, dense = torch.unique(torch.cat([query_ids, reference_ids]), return_inverse=True)
    own = dense[: len(query_ids)] * len(sizes) + query_labels.clamp(min=0)
    present = (dense[len(query_ids) :] * len(sizes) + reference_labels).sort().values
    excluded = torch.searchsorted(present, own, right=True) - torch.searchsorted(present, own)
    return torch.where(query_labels >= 0, relevant - excluded, 0)
