"""Nearest keys of each query, exact, in tiles, with defined order of equal values."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyviews.engine import candidates, gpu_search
from manyviews.engine.candidates import Keys
from manyviews.engine.rows import at_least_float32, normalize, slices
from manyviews.system import distributed, hardware

COLUMNS = 1 << 16
SCORES = 1 << 23
"""Scores in memory at a time: 32 MiB, about the third-level cache of a small machine."""
GPU_SCORES = 1 << 25
"""The same on a GPU: 128 MiB, and as much again a few times to order them."""
RESIDENT = 0.25
"""Share of a GPU's free memory that keys take at a time which stay on the CPU."""


@torch.no_grad()
def top_k(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    k: int,
    *,
    query_ids: Int[Tensor, " queries"] | None = None,
    key_ids: Int[Tensor, " keys"] | None = None,
    cosine: bool = False,
    shared: bool = False,
) -> tuple[Float[Tensor, "queries k"], Int[Tensor, "queries k"]]:
    """Finds the k largest products of each query with the keys, and their indices; no gradient.

    Largest first; equal values by index, lower first. Keys of the query's id are left out; if fewer than k remain, the
    last values are −inf. Exact, in tiles, in float32 (float64 if the queries are).

    With `cosine` the products are those of the rows at length 1 (or divided by 1e-6, if they are shorter): keys are
    normalised tile by tile, and never copied as a whole.

    Keys that do not fit in a GPU's memory may stay on the CPU: they are searched part by part where the queries are.

    With `shared` it is collective: all ranks have the same queries and keys, each searches its share of the keys, and
    all get the whole result. It is that of a single process up to the last bit of a value.

    Raises:
        ValueError: if k is not between 1 and the number of keys, or ids are given on one side only.

    Examples:
        >>> values, indices = top_k(torch.eye(2), torch.tensor([[1.0, 3.0], [2.0, 0.0], [0.0, 3.0]]), 2)
        >>> values.tolist(), indices.tolist()
        ([[2.0, 1.0], [3.0, 3.0]], [[1, 0], [0, 2]])
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"k {k} must be between 1 and the number of keys, {len(keys)}")
    if (query_ids is None) != (key_ids is None):
        raise ValueError("ids are given on one side only; give both query_ids and key_ids, or neither")
    query_ids = None if query_ids is None else query_ids.to(queries.device)
    key_ids = None if key_ids is None else key_ids.to(keys.device)
    with torch.autocast(queries.device.type, enabled=False):
        queries = normalize(queries) if cosine else at_least_float32(queries)
        searched = Keys(keys, key_ids, keys.norm(dim=1).clamp_(min=1e-6) if cosine else None)
        if shared and distributed.world_size() > 1:
            return _of_all_ranks(queries, searched, k, query_ids)
        return _of_this_rank(queries, searched, k, query_ids)


def _of_all_ranks(queries: Tensor, keys: Keys, k: int, query_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    own = distributed.share(len(keys.rows))
    keys = keys.part(own)
    few = min(k, len(keys.rows))
    best = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    if few:
        best = _of_this_rank(queries, keys, few, query_ids)
    lengths = distributed.counts(few)
    values = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for rows in slices(0, len(queries), max(1, SCORES // sum(lengths))):
        pieces = (distributed.gather_without_gradient(part[rows].T, lengths) for part in (best[0], best[1] + own.start))
        gathered, origins = (piece.T for piece in pieces)
        # Ranks have consecutive keys, so equal values are in the order of their indices already.
        ordered = gathered.sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = ordered.values[:, :k], origins.gather(1, ordered.indices[:, :k])
    return values, indices


def _of_this_rank(queries: Tensor, keys: Keys, k: int, query_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    if keys.rows.device.type == queries.device.type:
        return _of_one_device(queries, keys, k, query_ids)
    size = keys.rows.shape[1] * keys.rows.element_size()
    count = max(COLUMNS, int(RESIDENT * hardware.free(queries.device)) // max(size, 1))
    best: tuple[Tensor, Tensor] | None = None
    # Parts of one size, so that all are searched by one method.
    parts = math.ceil(len(keys.rows) / count)
    for span in slices(0, len(keys.rows), math.ceil(len(keys.rows) / parts)):
        part = keys.part(span).to(queries.device)
        values, indices = _of_one_device(queries, part, min(k, len(part.rows)), query_ids)
        best = _merged(best, values, indices + span.start, k)
    assert best is not None
    return best


def _of_one_device(queries: Tensor, keys: Keys, k: int, query_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    method = gpu_search if queries.device.type == "cuda" else candidates
    if not method.pays(queries, keys.rows, k):
        return _of_all_products(queries, keys, k, query_ids)
    values, indices, proved = method.search(queries, keys, k, query_ids)
    if not proved.all():
        rest = (~proved).nonzero().squeeze(1)
        ids = query_ids[rest] if query_ids is not None else None
        values[rest], indices[rest] = _of_all_products(queries[rest], keys, k, ids)
    return values, indices


def _of_all_products(queries: Tensor, keys: Keys, k: int, query_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    values = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    columns = min(len(keys.rows), COLUMNS)
    scores_at_once = GPU_SCORES if queries.device.type == "cuda" else SCORES
    for rows in slices(0, len(queries), scores_at_once // columns):
        best: tuple[Tensor, Tensor] | None = None
        for span in slices(0, len(keys.rows), columns):
            tile = keys.part(span)
            scores = queries[rows] @ tile.rows.to(queries.dtype).T
            if tile.lengths is not None:
                scores /= tile.lengths
            if query_ids is not None and tile.ids is not None:
                scores.masked_fill_(query_ids[rows, None] == tile.ids, -torch.inf)
            largest, positions = _largest(scores, min(k, scores.shape[1]))
            best = _merged(best, largest, positions + span.start, k)
        assert best is not None
        values[rows], indices[rows] = best
    return values, indices


def _merged(best: tuple[Tensor, Tensor] | None, values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of those before and of later keys."""
    if best is None:
        return values, indices
    # Results of the keys before come first: of equal values theirs have the lower index.
    values, indices = torch.cat([best[0], values], 1), torch.cat([best[1], indices], 1)
    values, chosen = _largest(values, min(k, values.shape[1]))
    return values, indices.gather(1, chosen)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds the k largest of each row and their columns, largest first, equal values by column."""
    if scores.device.type == "cuda":
        return gpu_search.largest(scores, k)
    count = scores.shape[1]
    if k == 1 and scores.device.type != "cpu":
        # The first of equal ones, without asking whether there are any.
        largest = scores.max(dim=1, keepdim=True)
        return largest.values, largest.indices
    if k == count:
        ordered = scores.sort(dim=1, descending=True, stable=True)
        return ordered.values, ordered.indices
    depth = math.isqrt(count // k)
    if depth >= 4:
        # Column j is in group j mod `spread`; the k largest are in the k groups with the largest maxima.
        spread = count // depth
        maxima, groups = scores[:, : spread * depth].reshape(-1, depth, spread).amax(1).topk(k + 1, dim=1)
        offsets = torch.arange(0, spread * depth, spread, device=scores.device)
        rest = torch.arange(spread * depth, count, device=scores.device).expand(len(scores), -1)
        columns = torch.cat([(groups[:, :k, None] + offsets).flatten(1), rest], 1)
        values, chosen = scores.gather(1, columns).topk(k + 1, dim=1)
        indices = columns.gather(1, chosen)
        cut = maxima[:, k] == maxima[:, k - 1]
    else:
        values, indices = scores.topk(k + 1, dim=1)
        cut = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    # topk does not define the order of equal values, nor which of them it keeps at the end.
    tied = (values[:, 1:k] == values[:, : k - 1]).any(1)
    cut |= values[:, k] == values[:, k - 1]
    values, indices = values[:, :k], indices[:, :k]
    if tied.any():
        rising = indices[tied].sort(dim=1).values
        ordered = scores[tied].gather(1, rising).sort(dim=1, descending=True, stable=True)
        values[tied], indices[tied] = ordered.values, rising.gather(1, ordered.indices)
    if cut.any():
        ordered = scores[cut].sort(dim=1, descending=True, stable=True)
        values[cut], indices[cut] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, indices
