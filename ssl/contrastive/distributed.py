"""The world of processes: every function works alike with and without an initialised `torch.distributed`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number among all processes; 0 when there is only one."""
    return dist.get_rank() if _initialised() else 0


def size() -> int:
    """The number of processes; 1 without `torch.distributed`."""
    return dist.get_world_size() if _initialised() else 1


def gather(local: Tensor) -> Tensor:
    """The tensors of all processes, concatenated in rank order along the first axis, with gradient.

    Every process passes the same shape. In backward the gradients that all processes have for one process's slice
    are summed and sent home. With a loss that is the mean over the local anchors, the mean over processes that DDP
    takes is then the gradient one process would have with the whole batch.
    """
    if size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)
    return gathered


@torch.no_grad()
def gather_without_gradient(local: Tensor) -> Tensor:
    """The tensors of all processes (of one shape), concatenated in rank order along the first axis; no gradient."""
    local = local.detach()
    return local if size() == 1 else _all_gather(local)


@torch.no_grad()
def gather_uneven(local: Tensor) -> Tensor:
    """The tensors of all processes, whose first axes may differ, concatenated in rank order; no gradient."""
    local = local.detach()
    if size() == 1:
        return local
    lengths = _all_gather(torch.tensor([len(local)], device=local.device)).tolist()
    padded = local.new_zeros(max(lengths), *local.shape[1:])
    padded[: len(local)] = local
    pieces = _all_gather(padded).view(size(), *padded.shape)
    return torch.cat([piece[:length] for piece, length in zip(pieces, lengths, strict=True)])


@torch.no_grad()
def total(value: Tensor) -> Tensor:
    """The sum over processes, elementwise; no gradient."""
    value = value.detach().clone()
    if size() > 1:
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """The mean over processes, elementwise; no gradient."""
    return total(value) / size()


def any_rank(flag: bool) -> bool:
    """An agreement: true on every process as soon as it is true on one."""
    if size() == 1:
        return flag
    votes = torch.tensor(int(flag), device=_device())
    dist.all_reduce(votes)
    return bool(votes.item())


def from_first_rank(value: float) -> float:
    """The first process's number, on every process."""
    if size() == 1:
        return value
    # Gloo and NCCL both carry float64; a device without it (MPS) runs no more than one process.
    number = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.broadcast(number, src=0)
    return float(number.item())


def barrier() -> None:
    """Returns once every process has come here."""
    any_rank(False)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return _all_gather(local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous(memory_format=torch.contiguous_format).clone()
        dist.all_reduce(gradient)
        return gradient.chunk(size())[rank()]


def _all_gather(local: Tensor) -> Tensor:
    gathered = local.new_empty(size() * len(local), *local.shape[1:])
    if len(local):
        dist.all_gather_into_tensor(gathered, local.contiguous())
    return gathered


def _device() -> torch.device:
    """Where the process group can reduce: gloo on the CPU, NCCL on the GPU only."""
    return torch.device("cpu") if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
