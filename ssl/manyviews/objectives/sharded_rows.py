"""Rows that are spread over the processes: how they begin, and how a process comes by those of another."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyviews.engine import normalize
from manyviews.system import distributed
from manyviews.system.keyed_random import torch_generator

Storage = Literal["float32", "float16", "bfloat16"]
BLOCK = 1 << 14
"""Rows drawn from one generator: a process draws the blocks that its rows lie in, and no others."""


def unit_rows(rows: slice, dim: int, *, seed: int, storage: Storage = "float32") -> Float[Tensor, "rows dim"]:
    """Random rows of length 1, of which row i depends on the seed and i alone: the same for any number of processes."""
    dtype: torch.dtype = getattr(torch, storage)
    result = torch.empty(rows.stop - rows.start, dim, dtype=dtype)
    for block in range(rows.start // BLOCK, -(-rows.stop // BLOCK)):
        drawn = normalize(torch.randn(BLOCK, dim, generator=torch_generator(seed, block)))
        first, last = max(rows.start, block * BLOCK), min(rows.stop, (block + 1) * BLOCK)
        result[first - rows.start : last - rows.start] = drawn[first - block * BLOCK : last - block * BLOCK]
    return result


def check_ids(ids: Int[Tensor, " batch"], count: int) -> None:
    """Refuses ids that have no row; on CPU only, as a GPU would have to wait for it.

    Raises:
        ValueError: naming the ids and the bound.
    """
    if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(
            f"there is one row for each of {count} ids, 0 to {count - 1}; the batch holds ids from {int(ids.min())} to "
            f"{int(ids.max())}; build the objective with the ids of all training images"
        )


def fetch(
    rows: Float[Tensor, "rows dim"], start: int, ids: Int[Tensor, " batch"], lengths: Sequence[int]
) -> Float[Tensor, "batch dim"]:
    """The rows of this process's ids, from the processes that own them; gradients travel back to the owners.

    `rows` are those from id `start` on; `lengths` says how many ids each process asks for. All processes must call
    together, and come together again in backward where the rows want a gradient.
    """
    if distributed.world_size() == 1:
        return rows[ids - start]
    found: Tensor = _Fetch.apply(rows, distributed.gather_without_gradient(ids, lengths) - start, list(lengths))
    return found


def owned(rows: Tensor, places: Int[Tensor, "..."]) -> Tensor:
    """Which places, counted from this process's first row, are rows of this process."""
    return (places >= 0) & (places < len(rows))


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, lengths: list[int]) -> Tensor:
        own = owned(rows, places)
        # Each row comes from one process and zeros from the others: the sum is the row, bit for bit.
        found = rows.new_zeros(len(places), rows.shape[1])
        found[own] = rows[places[own]]
        ctx.save_for_backward(places[own], own)
        ctx.shape, ctx.lengths = rows.shape, lengths
        return distributed.scatter_sum(found, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        places, own = ctx.saved_tensors
        arrived = distributed.gather_without_gradient(gradients[0], ctx.lengths)
        # index_put_ adds repeated places in a fixed order on every device; index_add_ on a GPU would not.
        home = arrived.new_zeros(ctx.shape).index_put_((places,), arrived[own], accumulate=True)
        return home, None, None
