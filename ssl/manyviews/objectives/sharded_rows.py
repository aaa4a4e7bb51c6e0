"""Rows that are sharded over the ranks: initial values, remote access, and modules."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from manyviews.engine import normalize
from manyviews.engine.rows import sum_of_groups
from manyviews.objectives.objective import Objective, Taken
from manyviews.objectives.settings import Population
from manyviews.system import distributed
from manyviews.system.keyed_random import torch_generator

Storage = Literal["float32", "float16", "bfloat16"]
BLOCK = 1 << 14
"""Rows drawn from one generator: a rank draws only the blocks that its rows lie in."""


class Ring(nn.Module):
    """First-in-first-out memory of the last `size` embeddings over all ranks, with their ids.

    Slot s is the same slot on any number of ranks: each owns consecutive ones, and the batch of all ranks is written in
    rank order, so that the content does not depend on their number. Slots that have not been written yet have random
    unit rows of id −1, which no image has.
    """

    rows: Tensor
    ids: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int, *, seed: int, storage: Storage = "float32") -> None:
        super().__init__()
        self.size, self.own = size, distributed.share(size)
        self.register_buffer("rows", unit_rows(self.own, dim, seed=seed, storage=storage))
        self.register_buffer("ids", torch.full((len(self.rows),), -1))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("filled", torch.tensor(0))

    @torch.no_grad()
    def enqueue(
        self, embeddings: Float[Tensor, "batch dim"], ids: Int[Tensor, " batch"], taken: Taken | None = None
    ) -> None:
        """Overwrites the oldest slots with the normalized embeddings of all ranks, unless `taken` is false."""
        lengths = distributed.counts(len(ids))
        keys = distributed.gather_without_gradient(normalize(embeddings).to(self.rows.dtype), lengths)
        key_ids = distributed.gather_without_gradient(ids, lengths)
        # Of a batch larger than the ring the last keys remain, where one after the other would have left them.
        skipped = max(len(keys) - self.size, 0)
        slots = (self.pointer + torch.arange(skipped, len(keys), device=keys.device)) % self.size - self.own.start
        overwrite(self.rows, slots, keys[skipped:], taken)
        overwrite(self.ids, slots, key_ids[skipped:], taken)
        added = len(keys) if taken is None else len(keys) * taken
        self.pointer.add_(added).remainder_(self.size)
        self.filled.add_(added).clamp_(max=self.size)


class LearnedRows(Objective):
    """Objective with one learned row per id, in `weight`, sharded over the ranks by id.

    Rows start as random unit rows and are moved by the optimizer; their gradient on each rank is the sum over the
    losses of all ranks.

    Raises:
        ValueError: if there are fewer than two ids.
    """

    def __init__(self, population: Population, *, dim: int, seed: int) -> None:
        super().__init__()
        if population.size < 2:
            raise ValueError(
                f"one row for each id needs at least 2 ids, and there is {population.size}: give labels of at least 2 "
                "classes, or set ids=images"
            )
        self.classes = population.size
        self.own = distributed.share(self.classes)
        self.weight = nn.Parameter(unit_rows(self.own, dim, seed=seed))

    def shards(self) -> dict[str, int]:
        """The rows."""
        return {"weight": self.classes}

    def own_ids(self) -> Int[Tensor, " rows"]:
        """Ids whose rows this rank holds."""
        return torch.arange(self.own.start, self.own.stop, device=self.weight.device)


def unit_rows(rows: slice, dim: int, *, seed: int, storage: Storage = "float32") -> Float[Tensor, "rows dim"]:
    """Draws random rows of length 1; row i depends on the seed and i alone."""
    dtype: torch.dtype = getattr(torch, storage)
    result = torch.empty(rows.stop - rows.start, dim, dtype=dtype)
    for block in range(rows.start // BLOCK, -(-rows.stop // BLOCK)):
        drawn = normalize(torch.randn(BLOCK, dim, generator=torch_generator(seed, block)))
        first, last = max(rows.start, block * BLOCK), min(rows.stop, (block + 1) * BLOCK)
        result[first - rows.start : last - rows.start] = drawn[first - block * BLOCK : last - block * BLOCK]
    return result


def check_ids(ids: Int[Tensor, " batch"], count: int) -> None:
    """Checks that each id has a row; on CPU only, as a GPU would have to synchronize.

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
    """Fetches the rows of this rank's ids from their ranks, with gradients to these.

    `rows` are those from id `start` on; `lengths` are the numbers of ids that the ranks ask for. Collective, and
    collective again in backward if the rows require a gradient.
    """
    if distributed.world_size() == 1:
        return rows[ids - start]
    fetched: Tensor = _Fetch.apply(rows, distributed.gather_without_gradient(ids, lengths) - start, list(lengths))
    return fetched


def owned(rows: Tensor, indices: Int[Tensor, "..."]) -> Tensor:
    """Mask of the indices, counted from this rank's first row, that are rows of this rank."""
    return (indices >= 0) & (indices < len(rows))


def overwrite(rows: Tensor, indices: Int[Tensor, " values"], values: Tensor, taken: Taken | None = None) -> None:
    """Writes values to this rank's rows, those of another rank's indices not; equal indices have equal values.

    Where `taken` is false nothing is written.
    """
    if distributed.world_size() > 1 and len(rows) and len(indices):
        here = owned(rows, indices)
        if rows.device.type == "cpu":
            indices, values = indices[here], values[here]
        else:
            # Their number would be waited for: one of them, or else an old row, is written in place of the others.
            chosen = torch.arange(len(indices), device=rows.device).where(here, here.byte().argmax())
            here, indices = here[chosen], indices[chosen].clamp(0, len(rows) - 1)
            values = values[chosen].where(here.view(-1, *[1] * (rows.ndim - 1)), rows[indices])
    if len(rows):
        if taken is not None:
            values = values.where(taken, rows[indices])
        rows.index_copy_(0, indices, values)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor, lengths: list[int]) -> Tensor:
        # Each row comes from one rank and zeros from the others: the sum is the row, bit for bit.
        fetched = rows.new_zeros(len(indices), rows.shape[1])
        if len(rows):
            fetched = rows[indices % len(rows)].where(owned(rows, indices)[:, None], fetched)
        ctx.save_for_backward(indices)
        ctx.shape, ctx.lengths = rows.shape, lengths
        return distributed.scatter_sum(fetched, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        gathered = distributed.gather_without_gradient(gradients[0], ctx.lengths)
        if not ctx.shape[0]:
            return gathered.new_zeros(ctx.shape), None, None
        own = (indices >= 0) & (indices < ctx.shape[0])
        # What is another rank's adds zero, spread over the rows.
        gathered = gathered.where(own[:, None], 0)
        return sum_of_groups(gathered, indices % ctx.shape[0], ctx.shape[0]), None, None
