"""Optimisers, parameter groups for weight decay, and the learning-rate schedule."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.optim.lars import Lars
from torch import nn

from manyviews.config import Settings

REFERENCE_BATCH = 256
"""The batch size of an unscaled rate (Goyal et al. 2017)."""

Name = Literal["adamw", "sgd", "lars"]
Share = Annotated[float, Field(ge=0, lt=1)]
RATES: dict[str, float] = {"adamw": 3e-3, "sgd": 0.06, "lars": 0.3}
WEIGHT_DECAYS: dict[str, float] = {"adamw": 0.05, "sgd": 5e-4, "lars": 1e-6}


class OptimSettings(Settings):
    """Optimizer and learning-rate schedule."""

    name: Name = "adamw"
    """adamw; sgd with momentum; lars (You et al. 2017) for very large batches."""
    rate: float | None = Field(None, gt=0, le=1e4)
    """Peak learning rate, before scaling; by default 3e-3 for adamw, 0.06 for sgd, 0.3 for lars (SimCLR's)."""
    scale: Literal["none", "linear", "sqrt"] | None = None
    """How the rate grows with global batch / 256; by default none for adamw, linear for sgd and lars."""
    weight_decay: float | None = Field(None, ge=0, le=1e4)
    """Not on norms and biases; by default 0.05 for adamw (decoupled, times the rate), 5e-4 for sgd, 1e-6 for lars."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd and lars."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of adamw's two moments."""
    trust: float = Field(1e-3, gt=0, le=1e4)
    """Trust coefficient of lars: a tensor's step is this share of its norm, times the rate."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the run in which the rate rises linearly from zero; then it falls to zero along a cosine."""
    clip: float | None = Field(None, gt=0, le=1e9)
    """Largest norm of the whole gradient; none by default."""

    def peak_rate(self, batch_size: int) -> float:
        """The peak learning rate for a global batch size."""
        rate = RATES[self.name] if self.rate is None else self.rate
        ratio = batch_size / REFERENCE_BATCH
        scale = self.scale or ("none" if self.name == "adamw" else "linear")
        return rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[scale]

    def build(self, module: nn.Module, objective: nn.Module | None = None, *, batch_size: int) -> torch.optim.Optimizer:
        """Builds the optimiser of a module's trainable parameters, for a global batch size.

        Parameters of an objective, one row per image over all ranks, are the last group: without weight decay, which
        would change rows of absent images, and without LARS' adaptation, whose norm would be that of local rows.

        Raises:
            ValueError: if nothing is trainable.
        """
        decayed, spared = decay_groups(module)
        if not decayed and not spared:
            raise ValueError("no parameter of the module requires a gradient: there is nothing to train")
        rate = self.peak_rate(batch_size)
        decay = WEIGHT_DECAYS[self.name] if self.weight_decay is None else self.weight_decay
        owned = list(objective.parameters()) if objective is not None else []
        groups: list[dict[str, Any]] = [
            {"params": parameters, "weight_decay": weight_decay, "peak_rate": rate}
            for parameters, weight_decay in ((decayed, decay), (spared, 0.0), (owned, 0.0))
            if parameters
        ]
        # One kernel for all tensors. Of sgd on a GPU alone: on a CPU it would be no faster, and round otherwise.
        devices = {parameter.device.type for parameter in [*decayed, *spared, *owned]}
        if self.name == "adamw":
            return torch.optim.AdamW(groups, lr=rate, betas=self.betas, fused=devices <= {"cpu", "cuda", "mps", "xpu"})
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=self.momentum, fused=devices == {"cuda"} or None)
        for group in groups:
            # timm's LARS would not adapt with a weight decay of 0.
            group["always_adapt"] = group["params"] is decayed
        return Lars(groups, lr=rate, momentum=self.momentum, trust_coeff=self.trust)


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits the trainable parameters of a module into those with and without weight decay.

    Without are vectors and scalars (norms, biases), and those in timm's `no_weight_decay()` of a submodule (position
    embeddings, class tokens).
    """
    exempt: set[str] = set()
    for prefix, child in module.named_modules():
        own = getattr(child, "no_weight_decay", None)
        if callable(own):
            exempt |= {f"{prefix}.{name}" if prefix else name for name in own()}
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (spared if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    return decayed, spared


def cosine(progress: float, warmup: float = 0.0) -> float:
    """The share of the peak rate: a linear warm-up, then half a cosine to 0 (SGDR, 2017).

    `progress`, the share of the run that is done, is clamped to [0, 1]; `warmup` is the share of the warm-up.

    Examples:
        >>> [cosine(progress, warmup=0.5) for progress in (0.25, 0.5, 1.0)]
        [0.5, 1.0, 0.0]
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    if warmup >= 1:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Sets the rate of every group to a share of its peak."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak_rate"] * factor
