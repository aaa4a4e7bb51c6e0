"""Copies of the buffers of modules, to undo what a forward pass has changed."""

from itertools import chain

import torch
from torch import Tensor, nn


class KeptBuffers:
    """A copy of the buffers of modules (statistics of batch norms), to restore them from.

    Buffers of a kind are copied into one tensor: on a GPU that is one launch, not one for each layer.
    """

    def __init__(self, *modules: nn.Module | None) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for buffer in chain.from_iterable(module.buffers() for module in modules if module is not None):
            kinds.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        self._kept = [(buffers, torch.cat([buffer.flatten() for buffer in buffers])) for buffers in kinds.values()]

    def restore(self) -> None:
        """Gives the buffers their values of before."""
        for buffers, copy in self._kept:
            pieces = copy.split([buffer.numel() for buffer in buffers])
            for buffer, piece in zip(buffers, pieces, strict=True):
                buffer.copy_(piece.view_as(buffer))
