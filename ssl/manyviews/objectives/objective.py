"""Interface of an objective: a loss of embeddings, and memory updated after a step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Embeddings = Float[Tensor, "views batch dim"]
Targets = Float[Tensor, "others batch dim"]
Ids = Int[Tensor, " batch"]
Taken = Bool[Tensor, ""]


class Loss(NamedTuple):
    """Loss of one step and the terms to log beside it."""

    total: Float[Tensor, ""]
    """Mean over the local anchors; its mean over the ranks is the loss of the whole batch."""
    terms: dict[str, Tensor]
    """Detached scalars of this rank."""


class Objective(nn.Module, ABC):
    """A loss of embeddings, and memory that is updated after each optimizer step."""

    @abstractmethod
    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of this rank's anchors; `targets` are the momentum twin's embeddings, if any."""

    @torch.no_grad()
    def update(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, taken: Taken | None = None) -> None:
        """Updates the memory after an optimizer step; does nothing by default.

        Where `taken`, on a GPU, is false, the step was skipped and nothing may change; the host does not read it.
        """

    def shards(self) -> dict[str, int]:
        """Length over all ranks of each entry of the state dict that is sharded.

        Each rank holds the part `distributed.share(length)` of the first axis; all other state is equal on all ranks.
        """
        return {}


class Stateless(Objective):
    """Wraps a pure function of embeddings, ids and step, and the lists of relations that it reads, if any."""

    def __init__(self, loss: Callable[[Embeddings, Ids, int], Loss], lists: nn.Module | None = None) -> None:
        super().__init__()
        # As a part of this module they move with it to another device.
        self.loss, self.lists = loss, lists

    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of this rank's anchors against the embeddings of all ranks."""
        return self.loss(embeddings, ids, step)
