"""Copies of tensors, to undo what a forward pass or an update has changed."""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from jaxtyping import Bool
from torch import Tensor, nn


class Kept:
    """A copy of tensors, to restore them from.

    Tensors of a kind are copied into one: on a GPU that is one launch, not one for each.
    """

    @torch.no_grad()
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        self._kept = [(group, _joined(group)) for group in kinds.values()]

    @torch.no_grad()
    def restore(self, where: Bool[Tensor, ""] | None = None) -> None:
        """Gives the tensors their values of before; with `where`, which no host reads, only if it is true. Once."""
        for tensors, copy in self._kept:
            if where is not None:
                torch.where(where, copy, _joined(tensors), out=copy)
            pieces = copy.split([tensor.numel() for tensor in tensors])
            copy_all(tensors, [piece.view(tensor.shape) for tensor, piece in zip(tensors, pieces, strict=True)])


class KeptBuffers(Kept):
    """A copy of the buffers of modules (statistics of batch norms), to restore them from."""

    def __init__(self, *modules: nn.Module | None) -> None:
        super().__init__(chain.from_iterable(module.buffers() for module in modules if module is not None))


def copy_all(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies each value to its target; in one launch where torch has a function for it."""
    together = getattr(torch, "_foreach_copy_", None)
    if together is not None:
        together(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
