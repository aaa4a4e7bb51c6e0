"""Rows of embeddings: their number format, their length, and slices of them."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def normalize(embeddings: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Rows of length 1, in float32 (float64 stays float64).

    Rows shorter than 1e-6 are divided by 1e-6: a zero row stays zero, and its gradient finite.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        unit: Tensor = _Normalize.apply(at_least_float32(embeddings))
    return unit


def directions(rows: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows wide"]:
    """Rows of length 1 whatever their length was, for measuring how they lie, in float32 (float64 stays float64).

    A zero row has no direction: all of them get a common one of their own, in one more dimension, so that rows that
    are all zero lie in one place and not far from each other, as products of 0 would have it.
    """
    rows = at_least_float32(rows)
    # By the largest number first: squares of lengths that float32 holds may be beyond it.
    largest = rows.abs().amax(-1, keepdim=True)
    zero = largest == 0
    return torch.cat([normalize(rows / largest.masked_fill(zero, 1)), zero.to(rows.dtype)], -1)


def at_least_float32(rows: Tensor) -> Tensor:
    """The rows in float32, or as they are in float64."""
    return rows if rows.dtype == torch.float64 else rows.float()


def unit_distance(products: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """Euclidean distances of unit rows from their products: √(2 − 2 s).

    Never less than the root of the number format's epsilon, with a zero gradient there: that of a root would have no
    bound where two rows coincide.
    """
    return (2 - 2 * products).clamp(min=torch.finfo(products.dtype).eps).sqrt()


def squared_distance_rows(
    rows: Float[Tensor, "rows dim"], others: Float[Tensor, "others dim"]
) -> tuple[Float[Tensor, "rows wide"], Float[Tensor, "others wide"]]:
    """Two sets of longer rows whose products are the squared distances of the given ones: |a|² + |b|² − 2 a·b.

    Both sets are moved by the others' mean first, so that little is lost where their common part is large. Rounding
    may leave products of equal rows slightly below 0.
    """
    centre = others.detach().mean(0)
    rows, others = rows - centre, others - centre
    lengths, widths = rows.square().sum(1, keepdim=True), others.square().sum(1, keepdim=True)
    left = torch.cat([-2 * rows, lengths, torch.ones_like(lengths)], 1)
    return left, torch.cat([others, torch.ones_like(widths), widths], 1)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Consecutive slices of length `step` from `start` to `stop`; the last may be shorter."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


class _Normalize(torch.autograd.Function):
    """Saves its result only, where autograd would save three tensors and allocate two more."""

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
