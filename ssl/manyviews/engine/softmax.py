"""Log-sum-exp over all pairs of embeddings, exact, in tiles, with its own backward.

*Powers of two*: with log₂e folded into the scale, exp(s/τ) is exp2 of the product, at a third of exp's cost on CPU. *No
shift*: exponentials are summed as they are, unless a sum may leave the safe range of the number format, which for unit
vectors it never does at a temperature of 0.03 or above; then they are divided by a running maximum. *Keys stay on their
rank*: queries travel to the keys of all ranks, partial sums are added, and gradients travel home.

On a CPU: *sorted by id*, equal ids are adjacent, and a mask is needed only where the ids of a tile's rows and columns
meet. The sums themselves show whether a shift is needed, which repeats the work. *One core per tile*: tiles are
distributed over the cores by a rule that does not depend on their number, so results do not either. If the queries are
the keys, each product serves twice, and the ranks share the pairs.

On a GPU nothing is read, so that the host never waits: the caller says whether rows are unit vectors, and without that
the maximum is always taken. Tiles are large, masked as a whole and few. Gradients may be multiplied in TF32 (see
`log_sum_exp`), and so are products with keys of 16 bits, whose rounding is as large; other scores never are, for at a
temperature of 0.07 they would be off by up to 0.03.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyviews.engine.pairs import PIECES, Pairs, as_bfloat16, cut, each_pair, order_of, put, take, tile_shape
from manyviews.engine.rows import at_least_float32, slices
from manyviews.engine.threads import on_all_cores
from manyviews.system import distributed
from manyviews.system.precision import tf32

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
LEAST_UNSHIFTED = 0.03
"""Temperature from which on sums of unit vectors need no shift: terms are below 2⁴⁹, and keys fewer than 2³⁴."""


class _Options(NamedTuple):
    temperature: float
    lengths: list[int]
    """Queries of each rank."""
    shifts: tuple[bool, ...]
    """Whether to subtract a running maximum: tried in this order until the sums are safe."""
    tf32_gradient: bool


def log_sum_exp(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"] | None,
    temperature: float,
    *,
    query_ids: Int[Tensor, " queries"] | None = None,
    key_ids: Int[Tensor, " keys"] | None = None,
    unit: bool = False,
    tf32_gradient: bool = False,
) -> Float[Tensor, " queries"]:
    """Log of Σ exp(query · key / temperature) over the keys of another id, for each query.

    Collective: each rank passes its own queries and its own keys, any number of them, and gets the values of its own
    queries over the keys of all ranks; backward is collective too. Differentiable once, in queries and keys.

    Without `keys` the queries are the keys: on a CPU each product then serves a row and a column, at half the cost.
    Without ids every key counts. Where no key remains the value is −inf and its gradient zero. Memory grows with the
    number of embeddings, never with the number of pairs.

    Computed in float32, also under autocast, or in float64 if the queries are; keys of a narrower type are widened tile
    by tile. Two exceptions: float32 queries and bfloat16 keys are multiplied as bfloat16 on CPUs with instructions for
    it, at nearly twice the speed, and summed in float32. This moves the values of unit vectors by less than 2⁻⁸ / τ,
    and by about 1e-3 at 0.07 where many keys share the sum. On a GPU queries and keys of 16 bits are multiplied in
    TF32, which moves them by less than 2⁻¹⁰ / τ.

    Say `unit=True` if no row is longer than 1: a GPU then need not look for the largest products. With `tf32_gradient`
    it multiplies softmax and rows in TF32; a gradient is then off by less than 2⁻⁹ of the mean length of the rows. Only
    where nearly all of it is to cancel is that much, as where the positives are among the keys.

    Raises:
        ValueError: if the temperature is not above 0, or ids are missing.

    Examples:
        >>> queries, keys = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> log_sum_exp(queries, keys, 1.0)
        tensor([1.5514, 1.5514])
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0; 0.05 to 0.5 is usual")
    if keys is None and query_ids is None:
        raise ValueError(
            "query_ids are missing: without keys they determine which pairs are left out, the own row among them"
        )
    if keys is not None and (query_ids is None) != (key_ids is None):
        raise ValueError("ids are given on one side only; give both query_ids and key_ids, or neither")
    with torch.autocast(queries.device.type, enabled=False):
        queries = at_least_float32(queries)
        lengths = distributed.counts(len(queries))
        result: Tensor
        on_cpu = queries.device.type == "cpu"
        if keys is None and on_cpu:
            result, safe = _SymmetricLogSumExp.apply(queries, query_ids, temperature, lengths)
            if safe:
                return result
        if keys is None:
            keys, key_ids = queries, query_ids
        shifts = (False, True) if on_cpu else (not (unit and temperature >= LEAST_UNSHIFTED),)
        options = _Options(temperature, lengths, shifts, tf32_gradient)
        result = _LogSumExp.apply(queries, keys, query_ids, key_ids, options)
    return result


class _SymmetricLogSumExp(torch.autograd.Function):
    """Queries that are the keys: tile (a, b) is also tile (b, a), in forward and in backward.

    With E = exp(z zᵀ / τ), its row sums S and u = g / S, the gradient of Σ gᵢ log Sᵢ in zᵢ is Σⱼ Eᵢⱼ (uᵢ + uⱼ) zⱼ / τ.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, ids: Tensor, temperature: float, lengths: list[int]
    ) -> tuple[Tensor, bool]:
        order, ids = order_of(distributed.gather_without_gradient(ids, lengths))
        # Both sides scaled by one root: their products are the exponents of two.
        scale = math.sqrt(LOG2_E / temperature)
        rows = take(distributed.gather_without_gradient(embeddings, lengths), order).mul(scale)
        sums = rows.new_zeros(len(rows))

        def add(a: slice, b: slice, exponentials: Tensor) -> None:
            sums[a] += exponentials.sum(1)
            if a != b:
                sums[b] += exponentials.sum(0)

        each_pair(rows, ids, add)
        sums = distributed.total(sums)
        ctx.save_for_backward(rows, ids, order, sums)
        ctx.scale, ctx.lengths = scale, lengths
        logarithms = sums.log()
        return _own(put(logarithms, order), lengths), _is_safe(logarithms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, ids, order, sums = ctx.saved_tensors
        assert gradients[0] is not None
        shares = take(distributed.gather_without_gradient(gradients[0], ctx.lengths), order) / sums
        gradient = torch.zeros_like(rows)

        def add(a: slice, b: slice, exponentials: Tensor) -> None:
            weights = exponentials.mul_(shares[a, None] + shares[b])
            gradient[a].addmm_(weights, rows[b])
            if a != b:
                gradient[b].addmm_(weights.T, rows[a])

        each_pair(rows, ids, add)
        whole = put(gradient.mul_(ctx.scale * LN_2), order)
        return distributed.scatter_sum(whole, ctx.lengths), None, None, None


class _LogSumExp(torch.autograd.Function):
    """Log-sum-exp and, in one pass, its gradient in the queries, a weighted mean of the keys.

    A second pass, in backward, is needed only if the keys require a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, query_ids: Tensor | None, key_ids: Tensor | None, options: _Options
    ) -> Tensor:
        temperature, lengths, shifts, in_tf32 = options
        query_order, key_order = None, None
        if query_ids is not None and key_ids is not None:
            query_order, query_ids = order_of(distributed.gather_without_gradient(query_ids, lengths))
            key_order, key_ids = order_of(key_ids)
        rows = take(distributed.gather_without_gradient(queries, lengths), query_order).mul(LOG2_E / temperature)
        pairs = Pairs(rows, keys, query_ids, key_ids, key_order, in_tf32)
        for running_maximum in shifts:
            maximum, sums, weighted = _sum_over_keys(pairs, running_maximum, ctx.needs_input_grad[0])
            logarithms = sums.log2().add_(maximum).mul_(LN_2).squeeze(1)
            if len(shifts) == 1 or _is_safe(logarithms):
                break
        mean = None
        if weighted is not None:
            mean = distributed.scatter_sum(put(weighted, query_order), lengths)
            mean /= _own(put(sums, query_order), lengths).clamp(min=torch.finfo(rows.dtype).tiny)
        ctx.options = options
        rest = (query_order, logarithms, rows, keys, query_ids, key_ids, key_order) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(mean, *rest)
        return _own(put(logarithms, query_order), lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, *rest = ctx.saved_tensors
        (gradient,) = gradients
        query_gradient = key_gradient = None
        if mean is not None:
            query_gradient = mean * (gradient / ctx.options.temperature).unsqueeze(1)
        if rest:
            query_order, logarithms, rows, keys, query_ids, key_ids, key_order = rest
            pairs = Pairs(rows, keys, query_ids, key_ids, key_order, ctx.options.tf32_gradient)
            gradient = take(distributed.gather_without_gradient(gradient, ctx.options.lengths), query_order)
            key_gradient = _key_gradient(gradient, logarithms, pairs)
        return query_gradient, key_gradient, None, None, None


class _Sums(NamedTuple):
    """Sums of powers of two over some keys, divided by 2^maximum."""

    maximum: Tensor
    sums: Tensor
    weighted: Tensor | None
    """Sums of the keys, weighted by their powers."""


def _sum_over_keys(pairs: Pairs, running_maximum: bool, with_keys: bool) -> _Sums:
    """Sums over the keys of all ranks; `weighted` over this rank's keys, on the common scale."""
    height, columns = pairs.pieces()
    works = [partial(_sum_over_piece, pairs, a, b, running_maximum, with_keys) for a in height for b in columns]
    sums_of_pieces = on_all_cores(works, pairs.rows.device)
    width = len(columns)
    joined = [_join(sums_of_pieces[first : first + width]) for first in range(0, len(sums_of_pieces), width)]
    maximum, sums = (torch.cat([getattr(part, name) for part in joined]) for name in ("maximum", "sums"))
    weighted = torch.cat([part.weighted for part in joined if part.weighted is not None]) if with_keys else None
    if running_maximum and distributed.world_size() > 1:
        highest = distributed.maximum(maximum)
        shrink = torch.exp2(maximum - highest)
        maximum, sums = highest, sums * shrink
        if weighted is not None:
            weighted *= shrink
    return _Sums(maximum, distributed.total(sums), weighted)


def _sum_over_piece(pairs: Pairs, a: slice, columns: slice, running_maximum: bool, with_keys: bool) -> _Sums:
    sums = pairs.rows.new_zeros(a.stop - a.start, 1)
    # Below every score, yet finite: where no key is left, 2^(−inf − maximum) is 0 and not NaN.
    maximum = torch.full_like(sums, torch.finfo(sums.dtype).min if running_maximum else 0.0)
    weighted = sums.new_zeros(len(sums), pairs.rows.shape[1]) if with_keys else None
    for _, tile, scores in pairs.scores(a, columns):
        if running_maximum:
            highest = torch.maximum(maximum, scores.amax(1, keepdim=True))
            shrink = torch.exp2(maximum - highest)
            maximum = highest
            sums *= shrink
            if weighted is not None:
                weighted *= shrink
            scores.sub_(highest)
        exponentials = scores.exp2_()
        sums += exponentials.sum(1, keepdim=True)
        if weighted is not None and as_bfloat16(weighted, tile):
            weighted += torch.mm(exponentials.bfloat16(), tile)
        elif weighted is not None:
            with tf32(pairs.tf32_gradient):
                weighted.addmm_(exponentials, tile.to(weighted.dtype))
    return _Sums(maximum, sums, weighted)


def _join(parts: Sequence[_Sums]) -> _Sums:
    """Sums over several sets of keys."""
    if len(parts) == 1:
        return parts[0]
    maximum = torch.stack([part.maximum for part in parts]).amax(0)
    shrink = [torch.exp2(part.maximum - maximum) for part in parts]
    sums = torch.stack([part.sums * factor for part, factor in zip(parts, shrink, strict=True)]).sum(0)
    weighted = None
    for part, factor in zip(parts, shrink, strict=True):
        if part.weighted is not None:
            part.weighted.mul_(factor)
            weighted = part.weighted if weighted is None else weighted.add_(part.weighted)
    return _Sums(maximum, sums, weighted)


def _key_gradient(gradient: Tensor, logarithms: Tensor, pairs: Pairs) -> Tensor:
    """Softmaxᵀ · (gradient · queries) / τ, with the softmax recomputed tile by tile."""
    rows, keys = pairs.rows, pairs.keys
    exponent = logarithms.mul(LOG2_E).masked_fill_(logarithms.isneginf(), 0).unsqueeze(1)
    weighted_rows = rows * (gradient * LN_2).unsqueeze(1)
    key_gradient = rows.new_zeros(len(keys), rows.shape[1])

    def add(columns: slice) -> None:
        for a in slices(0, len(rows), tile_shape(rows.device)[0]):
            for b, _, scores in pairs.scores(a, columns):
                softmax = scores.sub_(exponent[a]).exp2_()
                with tf32(pairs.tf32_gradient):
                    key_gradient[b].addmm_(softmax.T, weighted_rows[a])

    pieces = PIECES if rows.device.type == "cpu" else 1
    on_all_cores([partial(add, columns) for columns in cut(len(keys), pieces)], rows.device)
    return put(key_gradient, pairs.key_order).to(keys.dtype)


def _own(whole: Tensor, lengths: list[int]) -> Tensor:
    own: Tensor = whole.split(lengths)[distributed.rank()]
    return own


def _is_safe(logarithms: Tensor) -> bool:
    """Whether the sums are within two thirds of the range, without overflow or underflow."""
    limit = 0.66 * math.log(torch.finfo(logarithms.dtype).max)
    return bool((logarithms.detach().abs() < limit).all())
