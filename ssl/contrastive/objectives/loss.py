"""What every objective returns, and what their settings have in common."""

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive.config import Settings

P = ParamSpec("P")
R = TypeVar("R")


class Loss(NamedTuple):
    """One step's loss and the figures worth logging beside it."""

    total: Float[Tensor, ""]
    """The mean over the local anchors; the mean over processes is the loss of the whole batch."""
    terms: dict[str, Tensor]
    """Detached scalars of this process."""


def cross_entropy(
    negatives: Float[Tensor, "*anchors"], positives: Float[Tensor, "*anchors"]
) -> Float[Tensor, "*anchors"]:
    """−log(e^p / (e^p + Σ e^n)) from the log-sum-exp of the negatives' logits and the positive's logit.

    0, with a zero gradient, where the negatives are −inf, for there are none.
    """
    # PyTorch's own threshold of 20 is 2e-9 off, which float64 sees.
    return F.softplus(negatives - positives, threshold=40)


def float32_island(function: Callable[P, R]) -> Callable[P, R]:
    """Keeps autocast out of a function of tensors: at a temperature of 0.07 bfloat16 logits are off by 0.02."""

    @functools.wraps(function)
    def island(*arguments: P.args, **options: P.kwargs) -> R:
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*arguments, **options)

    return island


class Objective(nn.Module, ABC):
    """What an objective is to the loop: a loss of embeddings, and memory that moves after the weights have."""

    @abstractmethod
    def forward(
        self,
        embeddings: Float[Tensor, "views batch dim"],
        ids: Int[Tensor, " batch"],
        targets: Float[Tensor, "views batch dim"] | None,
        step: int,
    ) -> Loss:
        """The loss of this process's anchors; `targets` are the momentum twin's embeddings where there is a twin."""

    @torch.no_grad()
    def update(
        self,
        embeddings: Float[Tensor, "views batch dim"],
        ids: Int[Tensor, " batch"],
        targets: Float[Tensor, "views batch dim"] | None,
    ) -> None:
        """Moves the memory after a step that was taken; an objective without memory has nothing to do."""


class ObjectiveSettings(Settings):
    """What the settings of all objectives have in common."""

    @property
    def twin_momentum(self) -> float | None:
        """Share of its old weights that a momentum twin keeps at each step; none: there is no twin."""
        return None


def _warn_if_tiny(temperature: float) -> float:
    if temperature < 0.01:
        warnings.warn(
            f"temperature {temperature} is below 0.01: only the hardest negative of each anchor will count; "
            "0.05 to 0.5 is usual",
            stacklevel=2,
        )
    return temperature


Temperature = Annotated[float, Field(gt=0), AfterValidator(_warn_if_tiny)]
