"""Collectives that work with and without an initialised `torch.distributed`.

The first axis of gathered tensors may differ between ranks, and be empty. Tensors travel on their own device,
by gloo from a CPU and by NCCL from a GPU; numbers, flags and objects travel on the CPU: they wait for no GPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

# The names since torch 2.14, where the older ones warn.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_meters: list["Traffic"] = []
T = TypeVar("T")
FORESEEN = (OSError, ValueError, KeyError, SafetensorError)
"""Errors of damaged checkpoints, full disks and wrong settings; any other is an error of the program."""


class Traffic:
    """Bytes that other ranks have sent to this one in ring collectives."""

    received = 0


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts the bytes that this rank receives while the context is open."""
    meter = Traffic()
    _meters.append(meter)
    try:
        yield meter
    finally:
        _meters.remove(meter)


def rank() -> int:
    """The rank of this process; 0 without `torch.distributed`."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """The world size; 1 without `torch.distributed`."""
    return dist.get_world_size() if _initialised() else 1


def share(count: int, rank_: int | None = None, size_: int | None = None) -> slice:
    """The consecutive share of `count` items of a rank, by default this one."""
    number, processes = rank() if rank_ is None else rank_, world_size() if size_ is None else size_
    return slice(number * count // processes, (number + 1) * count // processes)


def counts(count: int) -> list[int]:
    """All-gathers an integer; returns one per rank."""
    if world_size() == 1:
        return [count]
    gathered: list[int] = _all_gather(torch.tensor([count])).tolist()
    return gathered


def gather(local: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Concatenates the tensors of all ranks along the first axis, with gradient.

    Backward sums the gradients of all ranks for each rank's slice. With a loss that is the mean over local anchors,
    DDP's mean over ranks is then the gradient of the whole batch. `lengths`: of all ranks, if known.
    """
    if world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local, list(lengths or counts(len(local))))
    return gathered


@torch.no_grad()
def gather_without_gradient(local: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Concatenates the tensors of all ranks along the first axis, without gradient."""
    local = local.detach()
    return local if world_size() == 1 else _gather(local, lengths or counts(len(local)))


@torch.no_grad()
def scatter_sum(whole: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums over ranks; returns this rank's slice, the `lengths[r]` rows of rank r."""
    if world_size() == 1:
        return whole.detach()
    longest = max(lengths)
    pieces = whole.detach()
    if len(set(lengths)) > 1:
        pieces = whole.new_zeros(world_size(), longest, *whole.shape[1:])
        for padded, piece in zip(pieces, whole.split(list(lengths)), strict=True):
            padded[: len(piece)] = piece
        pieces = pieces.flatten(0, 1)
    own = pieces.new_empty(longest, *pieces.shape[1:])
    if longest:
        _reduce_scatter(own, pieces.contiguous())
    _note(pieces, 1)
    return own[: lengths[rank()]]


@torch.no_grad()
def exchange(local: Tensor, outgoing: Sequence[int], incoming: Sequence[int]) -> Tensor:
    """Sends `outgoing[r]` rows of `local` to rank r; returns `incoming[r]` rows from each."""
    local = local.detach()
    if world_size() == 1:
        return local
    arrived = local.new_empty(sum(incoming), *local.shape[1:])
    dist.all_to_all_single(arrived, local.contiguous(), list(incoming), list(outgoing))
    for meter in _meters:
        meter.received += (len(arrived) - incoming[rank()]) * local[:1].nbytes
    return arrived


@torch.no_grad()
def total(value: Tensor) -> Tensor:
    """Sum over ranks, elementwise, without gradient."""
    return _all_reduce(value, "SUM")


@torch.no_grad()
def maximum(value: Tensor) -> Tensor:
    """Maximum over ranks, elementwise, without gradient."""
    return _all_reduce(value, "MAX")


def mean(value: Tensor) -> Tensor:
    """Mean over ranks, elementwise, without gradient."""
    return total(value) / world_size()


def any_over_ranks(flag: bool) -> bool:
    """Logical OR over ranks."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes)
    return bool(votes.item())


def from_first_rank(value: float) -> float:
    """Broadcasts a number from rank 0."""
    if world_size() == 1:
        return value
    number = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(number, src=0)
    return float(number.item())


def all_gather_object(value: T) -> list[T]:
    """All-gathers a picklable value; returns one per rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """If the body raises on any rank, raises on every rank; none waits for one that failed.

    Raises:
        OSError: on the other ranks, naming rank and problem.
        RuntimeError: likewise, for an error of the program.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as raised:
        problem = raised
    kind = "" if problem is None else "foreseen" if isinstance(problem, FORESEEN) else "fault"
    text = "" if problem is None else str(problem) or type(problem).__name__
    problems = all_gather_object((kind, text))
    # A program error takes precedence: all ranks must pass over a damaged file, or none.
    for worst, error in (("fault", RuntimeError), ("foreseen", OSError)):
        if problem is not None and kind == worst:
            raise problem
        failed = [f"process {number}: {text}" for number, (own, text) in enumerate(problems) if own == worst]
        if failed:
            raise error("; ".join(failed))


def barrier() -> None:
    """Waits for all ranks."""
    any_over_ranks(False)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, lengths: list[int]) -> Tensor:
        ctx.lengths = lengths
        return _gather(local, lengths)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return scatter_sum(gradients[0], ctx.lengths), None


def _gather(local: Tensor, lengths: Sequence[int]) -> Tensor:
    if len(set(lengths)) == 1:
        return _all_gather(local)
    padded = local.new_zeros(max(lengths), *local.shape[1:])
    padded[: len(local)] = local
    pieces = _all_gather(padded).view(world_size(), *padded.shape)
    return torch.cat([piece[:length] for piece, length in zip(pieces, lengths, strict=True)])


def _all_gather(local: Tensor) -> Tensor:
    gathered = local.new_empty(world_size() * len(local), *local.shape[1:])
    if len(local):
        _gather_into(gathered, local.contiguous())
    _note(gathered, 1)
    return gathered


def _all_reduce(value: Tensor, operation: str) -> Tensor:
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value, op=getattr(dist.ReduceOp, operation))
        _note(value, 2)
    return value


def _note(tensor: Tensor, rounds: int) -> None:
    """Counts the bytes of a ring: all but one part per round; an all-reduce has two rounds."""
    for meter in _meters:
        meter.received += rounds * tensor.numel() * tensor.element_size() * (world_size() - 1) // world_size()


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
