"""Rows in eight bits, and bounds of their products that take a quarter of the time of products in float32.

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


class Narrow(NamedTuple):
    """Rows as they are multiplied."""

    numbers: Tensor
    scales: Tensor
    """What the numbers of each row are multiplied by."""
    lengths: Tensor
    """On the left of the rows that were given, on the right of those that the numbers stand for."""


@cache
def multiplies_integers() -> bool:
    """Whether this CPU and this build of torch have products of eight-bit integers that are fast and exact."""
    if not (has_instructions("avx512_vnni") and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    # Without those instructions sums of two products stop at what 16 bits hold.
    largest = torch.full((8, CHECKED), LARGEST, dtype=torch.int8)
    ones = torch.ones(8)
    found = bounds(Narrow(_unsigned(largest.clone()), ones, ones), Narrow(_packed(largest, 8), ones, ones), ones)
    return bool((found == torch.tensor(float(CHECKED * LARGEST**2)).bfloat16()).all())


def left(rows: Tensor, *, integers: bool) -> Narrow:
    """Rows as they stand on the left of a bound: in eight bits, or as they are."""
    if not integers:
        return Narrow(rows, rows.new_ones(len(rows)), rows.norm(dim=1))
    numbers, scales, rounded = _rounded(rows)
    lengths, errors = rows.norm(dim=1), rounded.sub_(rows).norm(dim=1)
    whole = _with_margin(numbers, scales, lengths, errors, first=True)
    return Narrow(_unsigned(whole), scales, lengths)


def right(rows: Tensor, width: int, height: int, *, integers: bool) -> Narrow:
    """Rows as they stand on the right of a bound, with zero rows behind them, for so many rows on the left."""
    rows = torch.nn.functional.pad(rows, (0, 0, 0, width - len(rows)))
    if not integers:
        return Narrow(rows, rows.new_ones(width), rows.norm(dim=1))
    numbers, scales, rounded = _rounded(rows)
    lengths, errors = rounded.norm(dim=1), rounded.sub_(rows).norm(dim=1)
    whole = _with_margin(numbers, scales, lengths, errors, first=False)
    return Narrow(_packed(whole, height), scales, lengths)


def bounds(queries: Narrow, keys: Narrow, buffer: Tensor) -> Tensor:
    """What the product of each pair of rows is at most, in units of the left row's scale.

    In bfloat16, to the nearest number, where the rows are integers; else the product itself, in float32, in the buffer.
    What float32 loses in scales, lengths and sums is not in it: a small part of the product of the lengths.
    """
    if queries.numbers.dtype != torch.uint8:
        return torch.mm(queries.numbers, keys.numbers.T, out=buffer)
    zeros = torch.zeros(len(keys.scales), dtype=torch.int64)
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        queries.numbers, 1.0, OFFSET, keys.numbers, keys.scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )
    return found


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers, their scales, and the rows that they stand for."""
    scales = (rows.abs().amax(1) / LARGEST).clamp_(min=torch.finfo(rows.dtype).tiny)
    numbers = (rows / scales[:, None]).round_()
    return numbers, scales, numbers * scales[:, None]


def _with_margin(numbers: Tensor, scales: Tensor, lengths: Tensor, errors: Tensor, *, first: bool) -> Tensor:
    """The numbers in eight bits, and behind them the columns whose products are the margin."""
    dim = numbers.shape[1]
    # A length is at most 127 √dim scales, and an error √dim / 2: the former is divided, the latter spread over columns.
    share, columns = SLACK * math.sqrt(dim), math.ceil(dim / 250)
    long = (lengths / (scales * share)).ceil_()[:, None].expand(-1, columns)
    short = (errors * share / (scales * columns)).ceil_()[:, None].expand(-1, columns)
    return torch.cat([numbers, long, short] if first else [numbers, short, long], 1).to(torch.int8)


def _unsigned(numbers: Tensor) -> Tensor:
    """Integers with OFFSET added, in the memory of the given ones."""
    return numbers.view(torch.uint8).bitwise_xor_(OFFSET)


def _packed(numbers: Tensor, height: int) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(numbers, [height, numbers.shape[1]])
    return packed
