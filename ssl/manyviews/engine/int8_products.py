"""Rows in eight bits, and bounds of their products, in a quarter of the time of float32.

That is so where the CPU has instructions for sums of products of eight-bit integers. Each row is rounded to multiples
of its own scale, the 127th part of its largest number. With q̃ and x̃ the rounded rows, |q·x − q̃·x̃| ≤ |q| |x − x̃| +
|q − q̃| |x̃| (Cauchy and Schwarz). Both terms are products of a number of each row, so they go along in a few more
columns, rounded up: what is summed, exactly, in integers, is the bound itself.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from manyviews.system.hardware import has_instructions

LARGEST = 127
OFFSET = 128
"""Added to the integers on the left: the instructions multiply those without a sign by those with one."""
WIDEST = 1 << 15
"""Numbers of a row, at most, whose products stay far below what 32 bits hold."""
CHECKED = 67
"""Columns of a product that is taken on trial; it has to be rounded up."""
SLACK = 1.001
"""Keeps what is 127 in exact arithmetic from being rounded up to 128."""
WIDER = 16
"""A row gets at most one extra column for this many of its own."""


class Narrow(NamedTuple):
    """Rows in the number format of the products."""

    numbers: Tensor
    scales: Tensor
    """Factor of each row's numbers."""
    lengths: Tensor
    """Of the original rows on the left, of the rounded rows on the right."""


class Frame(NamedTuple):
    """Origins for queries and keys, which keep rounding errors as small as the rows' spread.

    q·x = q·c + |q| ((u − o)·(x − c) + o·(x − c)), where u = q / |q|, c is the keys' mean and o that of the u. The first
    term is a number for each query, and the last one a number for each key: it is stored in extra columns of the rows,
    which rounds and bounds it with the others.
    """

    centre: Tensor
    origin: Tensor
    columns: int
    """Number of extra columns."""
    weight: float
    """Each query's value in an extra column."""

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, centre: Tensor) -> "Frame":
        """Fits a frame to a sample of the queries, at length 1, and one of the keys."""
        origin, keys = queries.mean(0), keys - centre
        weight = float((queries - origin).abs().amax(1).mean().clamp(min=1e-6))
        # As many columns as leave the largest number of a key where it is.
        needed = (keys @ origin).abs().max() / (weight * keys.abs().amax(1).mean())
        columns = int(needed.nan_to_num(1).ceil().clamp(1, max(1, keys.shape[1] // WIDER)))
        return cls(centre, origin, columns, weight)

    @classmethod
    def of_keys_alone(cls, centre: Tensor) -> "Frame":
        """Frame for rows that are not rounded, whose margin is tiny for any origin."""
        return cls(centre, torch.zeros_like(centre), 0, 0.0)

    def queries(self, units: Tensor) -> Tensor:
        """Maps queries of length 1 into the frame."""
        return torch.cat([units - self.origin, units.new_full((len(units), self.columns), self.weight)], 1)

    def keys(self, rows: Tensor) -> Tensor:
        """Maps keys into the frame."""
        centred = rows - self.centre
        if not self.columns:
            return centred
        extra = (centred @ self.origin) / (self.columns * self.weight)
        return torch.cat([centred, extra[:, None].expand(-1, self.columns)], 1)


@cache
def multiplies_integers() -> bool:
    """Whether this CPU and build of torch have fast and exact products of eight-bit integers."""
    if not (has_instructions("avx512_vnni") and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    # Without those instructions sums of two products stop at what 16 bits hold.
    largest = torch.full((8, CHECKED), LARGEST, dtype=torch.int8)
    ones = torch.ones(8)
    sums = bounds(Narrow(_unsigned(largest.clone()), ones, ones), Narrow(_packed(largest, 8), ones, ones), ones)
    return bool((sums == torch.tensor(float(CHECKED * LARGEST**2)).bfloat16()).all())


def left(rows: Tensor, *, integers: bool) -> Narrow:
    """Prepares rows for the left side of `bounds`: in eight bits, or unchanged."""
    if not integers:
        return Narrow(rows, rows.new_ones(len(rows)), rows.norm(dim=1))
    rounded = _rounded(rows, first=True)
    return rounded._replace(numbers=_unsigned(rounded.numbers))


def right(rows: Tensor, width: int, height: int, *, integers: bool) -> Narrow:
    """Prepares rows for the right side of `bounds`: padded to `width`, for `height` left rows."""
    rows = torch.nn.functional.pad(rows, (0, 0, 0, width - len(rows)))
    if not integers:
        return Narrow(rows, rows.new_ones(width), rows.norm(dim=1))
    rounded = _rounded(rows, first=False)
    return rounded._replace(numbers=_packed(rounded.numbers, height))


def bounds(queries: Narrow, keys: Narrow, buffer: Tensor) -> Tensor:
    """Upper bound of the product of each pair of rows, in units of the left row's scale.

    In bfloat16, to the nearest number, where the rows are integers; else the product itself, in float32, in the buffer.
    Rounding of scales, lengths and sums in float32 is not included: a small part of the product of the lengths.
    """
    if queries.numbers.dtype != torch.uint8:
        return torch.mm(queries.numbers, keys.numbers.T, out=buffer)
    zeros = torch.zeros(len(keys.scales), dtype=torch.int64)
    upper: Tensor = torch.ops.onednn.qlinear_pointwise(
        queries.numbers, 1.0, OFFSET, keys.numbers, keys.scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )
    return upper


def _rounded(rows: Tensor, *, first: bool) -> Narrow:
    """Rows in eight bits, followed by the columns whose products are the margin of the bound."""
    scales = (rows.abs().amax(1) / LARGEST).clamp_(min=torch.finfo(rows.dtype).tiny)
    numbers = (rows / scales[:, None]).round_()
    rounded = numbers * scales[:, None]
    lengths = (rows if first else rounded).norm(dim=1)
    errors = rounded.sub_(rows).norm(dim=1)
    # A length is at most 127 √dim scales, and an error √dim / 2: the former is divided, the latter spread over columns.
    share, columns = SLACK * math.sqrt(rows.shape[1]), math.ceil(rows.shape[1] / 250)
    long = (lengths / (scales * share)).ceil_()[:, None].expand(-1, columns)
    short = (errors * share / (scales * columns)).ceil_()[:, None].expand(-1, columns)
    whole = torch.cat([numbers, long, short] if first else [numbers, short, long], 1).to(torch.int8)
    return Narrow(whole, scales, lengths)


def _unsigned(numbers: Tensor) -> Tensor:
    """Adds OFFSET to the integers, in place."""
    return numbers.view(torch.uint8).bitwise_xor_(OFFSET)


def _packed(numbers: Tensor, height: int) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(numbers, [height, numbers.shape[1]])
    return packed
