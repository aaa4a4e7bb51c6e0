"""Rows of embeddings: their number format, their length, and slices of them."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable


def normalize(embeddings: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Scales rows to length 1, in float32 (float64 stays float64).

    Rows shorter than 1e-6 are divided by 1e-6: a zero row stays zero, and its gradient finite.

    Examples:
        >>> normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        unit: Tensor = _Normalize.apply(at_least_float32(embeddings))
    return unit


def directions(rows: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows wide"]:
    """Scales rows of any length to length 1, in float32 (float64 stays float64).

    A zero row has no direction: all of them get a common one, in an extra dimension, so that they coincide instead of
    having products of 0.

    Examples:
        >>> directions(torch.tensor([[0.0, 1e-30], [0.0, 0.0]]))
        tensor([[0., 1., 0.],
                [0., 0., 1.]])
    """
    rows = at_least_float32(rows)
    # By the largest number first: squares of lengths may be beyond float32.
    largest = rows.abs().amax(-1, keepdim=True)
    zero = largest == 0
    return torch.cat([normalize(rows / largest.masked_fill(zero, 1)), zero.to(rows.dtype)], -1)


def at_least_float32(rows: Tensor) -> Tensor:
    """Converts rows to float32; float64 stays float64."""
    return rows if rows.dtype == torch.float64 else rows.float()


def squared_distance_rows(
    rows: Float[Tensor, "rows dim"], others: Float[Tensor, "others dim"]
) -> tuple[Float[Tensor, "rows wide"], Float[Tensor, "others wide"]]:
    """Two sets of longer rows whose products are squared distances: |a|² + |b|² − 2 a·b.

    Both sets are shifted by the others' mean first, which reduces rounding errors. Products of equal rows may still be
    slightly below 0.

    Examples:
        >>> left, right = squared_distance_rows(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        >>> left @ right.T
        tensor([[25.,  1.]])
    """
    centre = others.detach().mean(0)
    rows, others = rows - centre, others - centre
    lengths, widths = rows.square().sum(1, keepdim=True), others.square().sum(1, keepdim=True)
    left = torch.cat([-2 * rows, lengths, torch.ones_like(lengths)], 1)
    return left, torch.cat([others, torch.ones_like(widths), widths], 1)


def distinct(ids: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " groups"], Int[Tensor, " rows"]]:
    """Distinct ids in rising order, and the group of each row: its id's place among them.

    A GPU would have to be waited for to know how many there are: there the sorted ids are returned with repetitions.
    The first of equal ones is the group, and the other places are no row's.

    Examples:
        >>> values, groups = distinct(torch.tensor([7, 3, 7]))
        >>> values.tolist(), groups.tolist()
        ([3, 7], [1, 0, 1])
    """
    if ids.device.type == "cpu":
        values, groups = ids.unique(return_inverse=True)
        return values, groups
    values = ids.sort().values
    return values, torch.searchsorted(values, ids)


def sum_of_groups(
    rows: Shaped[Tensor, "rows ..."], groups: Int[Tensor, " rows"], count: int
) -> Shaped[Tensor, "groups ..."]:
    """Sums the rows of each of `count` groups, in a fixed order on every device; differentiable.

    Examples:
        >>> sum_of_groups(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1]), 3)
        tensor([2., 5., 0.])
    """
    sums = rows.new_zeros(count, *rows.shape[1:])
    # On a GPU the one adds in any order; on a CPU of several cores the other does.
    if rows.device.type == "cpu":
        return sums.index_add_(0, groups, rows)
    return sums.index_put_((groups,), rows, accumulate=True)


def tile_numbers(device: torch.device, on_cpu: int) -> int:
    """Numbers of a tile: on a CPU what fits in its caches; on a GPU 128 MiB, for few launches."""
    return on_cpu if device.type == "cpu" else 1 << 25


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Consecutive slices of length `step` from `start` to `stop`; the last may be shorter."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


class _Normalize(torch.autograd.Function):
    """Saves only its result, where autograd would save three tensors and allocate two more."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_(min=1e-6).reciprocal_()
        unit: Tensor = rows * inverse
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        unit, inverse = ctx.saved_tensors
        (gradient,) = gradients
        radial = torch.einsum("...d,...d->...", gradient, unit).unsqueeze(-1)
        # A row below the least length is multiplied by a constant: nothing of its gradient is radial.
        radial = radial.masked_fill_(inverse >= 1e6, 0)
        result: Tensor = torch.addcmul(gradient, unit, radial, value=-1).mul_(inverse)
        return result
