"""The log of sums of exponentials over all pairs of embeddings, exact, in tiles, with its own backward.

Three ideas carry it. *Sorted by id*, equal ids lie beside each other, so that a mask is needed only where the ids of
a tile's rows and columns meet, whatever the ids stand for. *Powers of two*: with log₂e folded into the scale,
exp(s/τ) is exp2 of the product itself, at a third of exp's price on CPU. *No shift*: the exponentials are summed as
they are, and only where a sum leaves the safe range of the number format (for unit vectors never at a temperature of
0.03 or above) is the work done again with a running maximum. All three lose nothing: the results are exact.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from contrastive.similarity.rows import at_least_float32, slices

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


def log_sum_exp(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"] | None,
    temperature: float,
    *,
    query_ids: Int[Tensor, " queries"] | None = None,
    key_ids: Int[Tensor, " keys"] | None = None,
) -> Float[Tensor, " queries"]:
    """For each query, the log of the sum of exp(query · key / temperature) over the keys that have another id.

    Without `keys` the queries are the keys: each product then serves a row and a column, at half the price. Without
    ids every key counts. Where no key is left the value is −inf and its gradient zero. Memory grows with the number
    of embeddings, never with the number of pairs.

    Everything is computed in float32, also under autocast, or in float64 where the queries are; keys of a narrower
    type are widened tile by tile. Differentiable once, in the queries and, where they ask for it, in the keys.

    Raises:
        ValueError: if the temperature is not above 0, or ids are missing.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0; 0.05 to 0.5 is usual")
    if keys is None and query_ids is None:
        raise ValueError(
            "query_ids are missing: without keys they say which pairs are left out, the own row among them"
        )
    if keys is not None and (query_ids is None) != (key_ids is None):
        raise ValueError("ids are given on one side only; give both query_ids and key_ids, or neither")
    with torch.autocast(queries.device.type, enabled=False):
        queries = at_least_float32(queries)
        if keys is None:
            result: Tensor = _SymmetricLogSumExp.apply(queries, query_ids, temperature)
            keys, key_ids = queries, query_ids
        else:
            result = _LogSumExp.apply(queries, keys, query_ids, key_ids, temperature, False)
        if not _is_safe(result):
            result = _LogSumExp.apply(queries, keys, query_ids, key_ids, temperature, True)
    return result


class _SymmetricLogSumExp(torch.autograd.Function):
    """The queries are the keys: tile (a, b) is also tile (b, a), in forward and in backward.

    With E = exp(z zᵀ / τ), its row sums S and u = g / S, the gradient of Σ gᵢ log Sᵢ in zᵢ is Σⱼ Eᵢⱼ (uᵢ + uⱼ) zⱼ / τ.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, ids: Tensor, temperature: float) -> Tensor:
        order, ids = _order(ids)
        # Both sides scaled by one root: their products are the exponents of two.
        scale = math.sqrt(LOG2_E / temperature)
        rows = _take(embeddings, order).mul(scale)
        sums = rows.new_zeros(len(rows))
        for a, b, exponentials in _symmetric_exponentials(rows, ids):
            sums[a] += exponentials.sum(1)
            if a != b:
                sums[b] += exponentials.sum(0)
        ctx.save_for_backward(rows, ids, order, sums)
        ctx.scale = scale
        result: Tensor = _put(sums.log(), order)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, ids, order, sums = ctx.saved_tensors
        shares = _take(gradients[0], order) / sums
        gradient = torch.zeros_like(rows)
        buffer = _buffer(rows)
        for a, b, weights in _symmetric_exponentials(rows, ids):
            pairs = buffer[: weights.numel()].view_as(weights)
            weights.mul_(torch.add(shares[a, None], shares[b], out=pairs))
            gradient[a].addmm_(weights, rows[b])
            if a != b:
                gradient[b].addmm_(weights.T, rows[a])
        return _put(gradient.mul_(ctx.scale * LN_2), order), None, None


class _LogSumExp(torch.autograd.Function):
    """Online softmax: one pass gives the log-sum-exp and the softmax-weighted mean of the keys, its gradient.

    A second pass, in backward, is needed only where the keys want their gradient too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        temperature: float,
        running_maximum: bool,
    ) -> Tensor:
        query_order, query_ids = _order(query_ids) if query_ids is not None else (None, None)
        key_order, key_ids = _order(key_ids) if key_ids is not None else (None, None)
        rows = _take(queries, query_order).mul(LOG2_E / temperature)
        sums = rows.new_zeros(len(rows), 1)
        # Below every score, yet finite: where no key is left, 2^(−inf − maximum) is 0 and not NaN.
        maximum = torch.full_like(sums, torch.finfo(rows.dtype).min if running_maximum else 0.0)
        weighted = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        for a, _, tile, scores in _scores(rows, keys, query_ids, key_ids, key_order):
            if running_maximum:
                highest = torch.maximum(maximum[a], scores.amax(1, keepdim=True))
                shrink = torch.exp2(maximum[a] - highest)
                maximum[a] = highest
                sums[a] *= shrink
                if weighted is not None:
                    weighted[a] *= shrink
                scores.sub_(highest)
            exponentials = scores.exp2_()
            sums[a] += exponentials.sum(1, keepdim=True)
            if weighted is not None:
                weighted[a].addmm_(exponentials, tile)
        result: Tensor = sums.log2().add_(maximum).mul_(LN_2).squeeze(1)
        mean = None
        if weighted is not None:
            mean = _put(weighted.div_(sums.clamp_(min=torch.finfo(sums.dtype).tiny)), query_order)
        ctx.temperature = temperature
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(mean, rows, keys, query_ids, key_ids, query_order, key_order, result)
        else:
            ctx.save_for_backward(mean)
        return _put(result, query_order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, *rest = ctx.saved_tensors
        query_gradient = key_gradient = None
        if mean is not None:
            query_gradient = mean * (gradients[0] / ctx.temperature).unsqueeze(1)
        if rest:
            key_gradient = _key_gradient(gradients[0], *rest)
        return query_gradient, key_gradient, None, None, None, None


def _key_gradient(
    gradient: Tensor,
    rows: Tensor,
    keys: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    query_order: Tensor | None,
    key_order: Tensor | None,
    result: Tensor,
) -> Tensor:
    """Softmaxᵀ · (gradient · queries) / τ, with the softmax recomputed tile by tile."""
    exponent = result.mul(LOG2_E).masked_fill_(result.isneginf(), 0).unsqueeze(1)
    weighted_rows = rows * (_take(gradient, query_order) * LN_2).unsqueeze(1)
    found = rows.new_zeros(len(keys), rows.shape[1])
    for a, b, _, scores in _scores(rows, keys, query_ids, key_ids, key_order):
        found[b].addmm_(scores.sub_(exponent[a]).exp2_().T, weighted_rows[a])
    return _put(found, key_order).to(keys.dtype)


def _symmetric_exponentials(rows: Tensor, ids: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """2^(row · row) for each pair of tiles a ≤ b, zero where the ids are equal, in one buffer used again.

    The tiles on the diagonal are the low ones, for half of their work is done twice.
    """
    height, width = _tile_shape(rows)
    tiles = []
    for a in slices(0, len(rows), height):
        tiles += [(a, a), *((a, b) for b in slices(a.stop, len(rows), width))]
    meetings = _meetings(ids, ids, [b for _, b in tiles])
    buffer = _buffer(rows)
    for (a, b), meeting in zip(tiles, meetings, strict=True):
        scores = _multiply(rows[a], rows[b], buffer)
        _exclude(scores, a, b, meeting, ids, ids)
        yield a, b, scores.exp2_()


def _scores(
    rows: Tensor, keys: Tensor, row_ids: Tensor | None, key_ids: Tensor | None, key_order: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Each tile of keys with its products with a tile of rows, −inf where the ids are equal, in one buffer used again.

    `key_ids` are sorted; `key_order` says where in `keys` they stand.
    """
    height = max(min(len(rows), _tile_shape(rows)[0]), 1)
    columns = list(slices(0, len(keys), math.prod(_tile_shape(rows)) // height))
    meetings = _meetings(row_ids, key_ids, columns) if row_ids is not None and key_ids is not None else None
    buffer = _buffer(rows)
    for a in slices(0, len(rows), height):
        for index, b in enumerate(columns):
            tile = (keys[b] if key_order is None else keys[key_order[b]]).to(rows.dtype)
            scores = _multiply(rows[a], tile, buffer)
            if meetings is not None and row_ids is not None and key_ids is not None:
                _exclude(scores, a, b, meetings[index], row_ids, key_ids)
            yield a, b, tile, scores


def _meetings(row_ids: Tensor, key_ids: Tensor, tiles: Sequence[slice]) -> list[list[int]]:
    """For each tile of keys the first and last row whose id may be in it; all ids sorted."""
    lowest, highest = key_ids[[b.start for b in tiles]], key_ids[[b.stop - 1 for b in tiles]]
    first = torch.searchsorted(row_ids, lowest)
    last = torch.searchsorted(row_ids, highest, right=True)
    meetings: list[list[int]] = torch.stack([first, last], 1).tolist()
    return meetings


def _exclude(scores: Tensor, a: slice, b: slice, meeting: list[int], row_ids: Tensor, key_ids: Tensor) -> None:
    first, last = max(meeting[0], a.start), min(meeting[1], a.stop)
    if first < last:
        equal = row_ids[first:last, None] == key_ids[b]
        scores[first - a.start : last - a.start].masked_fill_(equal, -torch.inf)


def _multiply(rows: Tensor, columns: Tensor, buffer: Tensor) -> Tensor:
    shape = len(rows), len(columns)
    return torch.mm(rows, columns.T, out=buffer[: shape[0] * shape[1]].view(shape))


def _buffer(rows: Tensor) -> Tensor:
    height, width = _tile_shape(rows)
    return rows.new_empty(height * max(height, width))


def _tile_shape(rows: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile: on CPU its scores stay in the cache between passes; on a GPU launches cost more."""
    return (512, 1024) if rows.device.type == "cpu" else (8192, 8192)


def _order(ids: Tensor) -> tuple[Tensor | None, Tensor]:
    """The order that sorts the ids (None where they are sorted) and the sorted ids."""
    if bool((ids[1:] >= ids[:-1]).all()):
        return None, ids
    ids, order = ids.sort(stable=True)
    return order, ids


def _take(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows[order]


def _put(rows: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of `_take`."""
    if order is None:
        return rows
    placed = torch.empty_like(rows)
    placed[order] = rows
    return placed


def _is_safe(logarithms: Tensor) -> bool:
    """Whether exponentials of this sum neither overflowed nor lost digits to underflow: two thirds of the range."""
    limit = 0.66 * math.log(torch.finfo(logarithms.dtype).max)
    return bool((logarithms.detach().abs() < limit).all())
