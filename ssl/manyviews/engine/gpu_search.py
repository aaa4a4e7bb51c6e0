"""Nearest of many keys on a GPU: candidates by products in half precision, then exact values.

*Fast products*: all products are computed in float16, whose tensor cores are 16 times as fast as float32, and those of
the candidates again in float32. *A bound*: with q̃ and x̃ the rounded rows, |q·x − q̃·x̃| ≤ |q − q̃| |x| + |q̃| |x − x̃|
(Cauchy and Schwarz). All four lengths are measured; to them comes what sums in float32 and the rounding of the result
add. The result is proved for each query whose k-th best exact value is above the least candidate by more than that.
*A frame* tightens the bound: queries and keys are centred, and columns scaled so that both are equally long in each.
*No reading*: shapes depend on the sizes alone, so that the host never waits for the GPU.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manyviews.engine.candidates import Keys
from manyviews.engine.rows import slices

SCORES = 1 << 27
"""Products in half precision in memory at a time: 256 MiB."""
COLUMNS = 1 << 16
"""Keys of a tile."""
NUMBERS = 1 << 27
"""Numbers of the candidates' rows in memory at a time: 512 MiB."""
WORK, SHARE = 1 << 40, 1 << 8
"""Products of numbers, and keys per neighbour, from which on candidates are faster than all products in float32: by
calculation the exact value of a candidate takes as long as some 200 products."""
SPARE = 32
"""Candidates beyond k, to which a quarter of k comes: so many may be nearer than the error of their products."""
TINY, LEAST_SPREAD, LEAST = torch.finfo(torch.float32).tiny, 2.0**-6, 1e-12
"""Least divisors, and the number below which squares may vanish."""
LOW = 0xFFFFFFFF
"""Mask of the column in the code of a value and a column; the column is less."""


class Half(NamedTuple):
    """Rows in half precision, and bounds of their lengths."""

    rows: Tensor
    lengths: Tensor
    errors: Tensor
    """Length of what rounding changed."""

    @classmethod
    def of(cls, rows: Tensor) -> "Half":
        """Rounds rows."""
        half = rows.half()
        # Lengths are sums of squares, with errors of their own.
        return cls(half, 1.001 * rows.norm(dim=1), 1.001 * (half.float() - rows).norm(dim=1))

    def with_columns(self, columns: Tensor) -> "Half":
        """Appends columns, and zeros up to a multiple of 8 numbers, which tensor cores take."""
        rows = torch.cat([self.rows, columns], 1)
        return self._replace(rows=F.pad(rows, (0, -rows.shape[1] % 8)))


class Frame(NamedTuple):
    """Where products of queries and keys are rounded.

    q·x = q·centre + |q · scales| spread (v·y + o·y / spread), with y = (x − centre) · inverse and v = (u − o) / spread,
    where u is q · scales at length 1. The second product is a number for each key, in two more columns: what float16
    holds of it, and what remains.
    """

    centre: Tensor
    scales: Tensor
    inverse: Tensor
    origin: Tensor
    spread: Tensor
    greatest: Tensor
    """Largest number of the keys in each column."""

    @classmethod
    def of(cls, queries: Tensor, keys: Keys) -> "Frame":
        """Fits a frame: rows have a mean square length of 1, and columns are balanced."""
        count, dim = keys.rows.shape
        centre, squares, greatest = (queries.new_zeros(dim) for _ in range(3))
        for span in slices(0, count, COLUMNS):
            rows = keys.part(span).scaled()
            centre += rows.sum(0) / count
            greatest = torch.maximum(greatest, rows.abs().amax(0))
        for span in slices(0, count, COLUMNS):
            squares += (keys.part(span).scaled() - centre).square_().sum(0) / count
        spread, wanted = squares.sqrt(), queries.square().mean(0).sqrt()
        scales = (spread / wanted).sqrt()
        inverse = scales.reciprocal()
        # A column of zeros on either side adds nothing.
        empty = ~((spread > 0) & (wanted > 0))
        scales, inverse = scales.masked_fill(empty, 0), inverse.masked_fill(empty, 0)
        length = (squares * inverse.square()).sum().sqrt().clamp(min=TINY)
        scales, inverse = scales * length, inverse / length
        units = queries * scales / (queries * scales).norm(dim=1, keepdim=True).clamp_(min=TINY)
        origin = units.mean(0)
        # A spread of nearly nothing would leave the range of float16.
        deviation = (units - origin).square().sum(1).mean().sqrt().clamp(min=LEAST_SPREAD)
        return cls(centre, scales, inverse, origin, deviation, greatest)

    def queries(self, rows: Tensor) -> tuple[Half, Tensor]:
        """Maps queries into the frame, and returns the factors of their products."""
        rows = rows * self.scales
        lengths = rows.norm(dim=1).clamp_(min=TINY)
        half = Half.of((rows / lengths[:, None] - self.origin) / self.spread)
        return half.with_columns(half.rows.new_ones(len(rows), 2)), lengths * self.spread

    def keys(self, rows: Tensor) -> tuple[Half, Tensor]:
        """Maps keys into the frame, and returns the greatest number of their last columns and of its rounding."""
        rows = (rows - self.centre) * self.inverse
        products = (rows * self.origin).sum(1, dtype=torch.float64).float() / self.spread
        first = products.half()
        second = (products - first.float()).half()
        errors = products - first.float() - second.float()
        half = Half.of(rows).with_columns(torch.stack([first, second], 1))
        return half, torch.stack([products.abs().max(), errors.abs().max()])


def pays(queries: Tensor, keys: Tensor, k: int) -> bool:
    """Whether `search` is faster: on a GPU, in float32, for very many products."""
    fits = queries.device.type == "cuda" and queries.dtype == keys.dtype == torch.float32
    return fits and len(queries) * keys.numel() >= WORK and k <= min(len(keys) // SHARE, COLUMNS // 4)


@torch.no_grad()
def search(queries: Tensor, keys: Keys, k: int, query_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the k keys with the largest products, in float32, equal values by index.

    Returns:
        Values and indices, [queries, k], and whether each query's answer is proved; it means nothing where it is not.
    """
    frame, few = Frame.of(queries, keys), k + k // 4 + SPARE
    left, factors = frame.queries(queries)
    best = left.rows.new_full((len(queries), few), -torch.inf)
    indices = torch.zeros(len(queries), few, dtype=torch.int64, device=queries.device)
    # The greatest length of a key in the frame and of what rounding changed, and the same of its last columns.
    longest = queries.new_zeros(4)
    with _sums_in_float32():
        for span in slices(0, len(keys.rows), COLUMNS):
            right, last = frame.keys(keys.part(span).scaled())
            longest = torch.maximum(longest, torch.cat([torch.stack([right.lengths.max(), right.errors.max()]), last]))
            count = len(right.rows)
            for part in slices(0, len(queries), SCORES // count):
                values, columns = most(left.rows[part] @ right.rows.T, min(few, count))
                values = torch.cat([best[part], values], 1)
                columns = torch.cat([indices[part], columns + span.start], 1)
                best[part], chosen = values.topk(few, dim=1, sorted=False)
                indices[part] = columns.gather(1, chosen)
    least, (length, rounding, last, remainder) = best.amin(1).double(), longest.double()
    error = left.errors * length + (left.lengths + left.errors) * rounding + remainder
    # Tensor cores truncate where they add, hence 2⁻²² for 2⁻²⁴. float16 rounds by a share of 2⁻¹¹, or by 2⁻²⁵.
    error += (queries.shape[1] + 16) * 2.0**-22 * (left.lengths * length + last) + 1.01 * 2.0**-11 * least.abs()
    error += 2.0**-22 * length / frame.spread + 2.0**-24
    # Exact values, which are summed in float64, and centred numbers are rounded by a share of those that they are from.
    size = queries.abs().clamp(min=LEAST) @ (frame.greatest + frame.centre.abs()).clamp(min=LEAST)
    reached = queries.double() @ frame.centre.double() + factors * (least + error) + 2.0**-21 * size
    values, indices = _exact(queries, keys, k, query_ids, indices.sort(dim=1).values)
    return values, indices, values[:, -1] > reached


def most(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds the k largest of each row and their columns, in any order, and of equal ones any."""
    count = scores.shape[1]
    depth = math.isqrt(count // k)
    if depth < 4:
        values, columns = scores.topk(k, dim=1, sorted=False)
        return values, columns
    # Column j is in group j mod `spread`; the k largest are in the k groups with the largest maxima.
    spread = count // depth
    groups = scores[:, : spread * depth].unflatten(1, (depth, spread)).amax(1).topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(0, spread * depth, spread, device=scores.device)
    rest = torch.arange(spread * depth, count, device=scores.device).expand(len(scores), -1)
    columns = torch.cat([(groups[:, :, None] + offsets).flatten(1), rest], 1)
    values, chosen = scores.gather(1, columns).topk(k, dim=1, sorted=False)
    return values, columns.gather(1, chosen)


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds the k largest of each row and their columns, largest first, equal values by column; reads nothing.

    float32 becomes whole numbers whose order is by value and then by column, no two of them equal.
    """
    if scores.dtype != torch.float32:
        ordered = scores.sort(dim=1, descending=True, stable=True)
        return ordered.values[:, :k], ordered.indices[:, :k]
    columns = torch.arange(scores.shape[1], device=scores.device)
    codes, _ = most(_in_order((scores + 0.0).view(torch.int32)).long() << 32 | (LOW - columns), k)
    codes = codes.sort(dim=1, descending=True).values
    return _in_order((codes >> 32).int()).view(torch.float32), LOW - (codes & LOW)


def _in_order(bits: Tensor) -> Tensor:
    """Bits of float32 as whole numbers in the order of the values, and back."""
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def _exact(queries: Tensor, keys: Keys, k: int, query_ids: Tensor | None, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The k best of each query's candidates, which are in rising order."""
    values = queries.new_empty(len(queries), k)
    indices = candidates.new_empty(len(queries), k)
    for part in slices(0, len(queries), max(1, NUMBERS // (candidates.shape[1] * queries.shape[1]))):
        own = candidates[part]
        # Summed in float64, which no order of the sum shows in: equal rows have equal products wherever they are.
        products = keys.rows[own].mul_(queries[part, None]).sum(2, dtype=torch.float64)
        if keys.lengths is not None:
            products /= keys.lengths[own]
        products = products.float()
        if query_ids is not None and keys.ids is not None:
            products.masked_fill_(query_ids[part, None] == keys.ids[own], -torch.inf)
        values[part], chosen = largest(products, k)
        indices[part] = own.gather(1, chosen)
    return values, indices


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """Products in half precision are summed in float32 alone, as the bound supposes."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction, flags.allow_fp16_accumulation
    flags.allow_fp16_reduced_precision_reduction = flags.allow_fp16_accumulation = False
    try:
        yield
    finally:
        flags.allow_fp16_reduced_precision_reduction, flags.allow_fp16_accumulation = before
