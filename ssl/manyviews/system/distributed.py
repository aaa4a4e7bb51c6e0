"""The world of processes: every function works alike with and without an initialised `torch.distributed`.

Tensors that travel may have another first axis on every process, empty ones included.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

# Their names since torch 2.14, where the older ones warn.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_meters: list["Traffic"] = []
T = TypeVar("T")
FORESEEN = (OSError, ValueError, KeyError, SafetensorError)
"""What a damaged checkpoint, a full disk or a wrong setting raises; anything else is a fault of the program."""


class Traffic:
    """What the other processes have sent to this one."""

    received = 0
    """Bytes, as a ring carries them."""


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts the bytes that reach this process while it is open."""
    meter = Traffic()
    _meters.append(meter)
    try:
        yield meter
    finally:
        _meters.remove(meter)


def rank() -> int:
    """This process's number among all processes; 0 when there is only one."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """The number of processes; 1 without `torch.distributed`."""
    return dist.get_world_size() if _initialised() else 1


def share(count: int, rank_: int | None = None, size_: int | None = None) -> slice:
    """The part of `count` things that belongs to a process (this one): consecutive, and alike to one thing."""
    number, processes = rank() if rank_ is None else rank_, world_size() if size_ is None else size_
    return slice(number * count // processes, (number + 1) * count // processes)


def counts(count: int) -> list[int]:
    """What each process passed as `count`, in rank order."""
    if world_size() == 1:
        return [count]
    found: list[int] = _all_gather(torch.tensor([count], device=_device())).tolist()
    return found


def gather(local: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """The tensors of all processes, concatenated in rank order along the first axis, with gradient.

    In backward the gradients that all processes have for one process's slice are summed and sent home. With a loss
    that is the mean over the local anchors, the mean over processes that DDP takes is then the gradient one process
    would have with the whole batch. `lengths` are those of all processes, where they are known already.
    """
    if world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local, list(lengths or counts(len(local))))
    return gathered


@torch.no_grad()
def gather_without_gradient(local: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """The tensors of all processes, concatenated in rank order along the first axis; no gradient."""
    local = local.detach()
    return local if world_size() == 1 else _gather(local, lengths or counts(len(local)))


@torch.no_grad()
def scatter_sum(whole: Tensor, lengths: Sequence[int]) -> Tensor:
    """The sum over processes of what all have for all, of which each keeps its own slice; no gradient.

    The inverse way of `gather`: `whole` holds `lengths[r]` rows for process r.
    """
    if world_size() == 1:
        return whole.detach()
    longest = max(lengths)
    pieces = whole.detach()
    if len(set(lengths)) > 1:
        pieces = whole.new_zeros(world_size(), longest, *whole.shape[1:])
        for place, piece in zip(pieces, whole.split(list(lengths)), strict=True):
            place[: len(piece)] = piece
        pieces = pieces.flatten(0, 1)
    own = pieces.new_empty(longest, *pieces.shape[1:])
    if longest:
        _reduce_scatter(own, pieces.contiguous())
    _note(pieces, 1)
    return own[: lengths[rank()]]


@torch.no_grad()
def exchange(local: Tensor, outgoing: Sequence[int], incoming: Sequence[int]) -> Tensor:
    """What the other processes sent to this one, in rank order; no gradient.

    `local` holds `outgoing[r]` rows for process r, and `incoming[r]` rows arrive from it.
    """
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
    """The sum over processes, elementwise; no gradient."""
    return _all_reduce(value, "SUM")


@torch.no_grad()
def maximum(value: Tensor) -> Tensor:
    """The maximum over processes, elementwise; no gradient."""
    return _all_reduce(value, "MAX")


def mean(value: Tensor) -> Tensor:
    """The mean over processes, elementwise; no gradient."""
    return total(value) / world_size()


def any_over_ranks(flag: bool) -> bool:
    """An agreement: true on every process as soon as it is true on one."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag), device=_device())
    dist.all_reduce(votes)
    return bool(votes.item())


def from_first_rank(value: float) -> float:
    """The first process's number, on every process."""
    if world_size() == 1:
        return value
    # Gloo and NCCL both carry float64; a device without it (MPS) runs no more than one process.
    number = torch.tensor(value, dtype=torch.float64, device=_device())
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
    """A stretch of work that succeeds on all processes or raises on all: none goes on to wait for one that failed.

    Raises:
        OSError: naming the process and its problem, on those that had none themselves.
        RuntimeError: likewise, where the problem is a fault of the program.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as raised:
        problem = raised
    kind = "" if problem is None else "foreseen" if isinstance(problem, FORESEEN) else "fault"
    words = "" if problem is None else str(problem) or type(problem).__name__
    problems = all_gather_object((kind, words))
    # A fault anywhere is a fault everywhere: where damage is passed over, all pass over it or none does.
    for worst, error in (("fault", RuntimeError), ("foreseen", OSError)):
        if problem is not None and kind == worst:
            raise problem
        failed = [f"process {number}: {text}" for number, (own, text) in enumerate(problems) if own == worst]
        if failed:
            raise error("; ".join(failed))


def barrier() -> None:
    """Returns once every process has come here."""
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
    """A ring sends each process all but one part of the whole in a round; a sum for all takes two rounds."""
    for meter in _meters:
        meter.received += rounds * tensor.numel() * tensor.element_size() * (world_size() - 1) // world_size()


def _device() -> torch.device:
    """Where the process group can reduce: gloo on the CPU, NCCL on the GPU only."""
    return torch.device("cpu") if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
