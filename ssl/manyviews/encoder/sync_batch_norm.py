"""Batch norm over the batches of all ranks, without a host wait in each layer."""

from functools import cache
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from manyviews.system import distributed

KERNELS = ("stats", "gather_stats_with_counts", "elemt", "backward_reduce", "backward_elemt")
"""The functions `torch.batch_norm_…` that `nn.SyncBatchNorm` consists of."""


def synchronise_batch_norms(module: nn.Module) -> nn.Module:
    """Makes every batch norm normalise by the statistics of all ranks; returns the module.

    In each layer `nn.SyncBatchNorm` looks for ranks with an empty batch, for which the host waits; here none has one.
    """
    module = convert_sync_batchnorm(module)
    if all(hasattr(torch, f"batch_norm_{name}") for name in KERNELS):
        for norm in module.modules():
            if isinstance(norm, nn.SyncBatchNorm) and norm.momentum is not None:
                # The class, not the object, is replaced: parameters, buffers, hooks and references stay.
                kind: Any = type(norm)
                object.__setattr__(norm, "__class__", _without_waits(kind))
    return module


class SyncBatchNorm(nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` for batches that are empty on no rank."""

    def forward(self, input: Tensor) -> Tensor:
        """The batch normalised by the statistics of all ranks; in evaluation mode by the running ones."""
        if not self.training or distributed.world_size() == 1:
            unsynchronised: Tensor = super().forward(input)
            return unsynchronised
        self._check_input_dim(input)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, self.momentum, self.eps
        normalised: Tensor = _Normalise.apply(_dense(input), self.weight, self.bias, *statistics)
        return normalised


@cache
def _without_waits(kind: type) -> type:
    # Before its base: timm's layers, which add an activation, call their parent's forward.
    return SyncBatchNorm if kind is nn.SyncBatchNorm else type(kind.__name__, (kind, SyncBatchNorm), {})


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        channels = x.shape[1]
        mean, inverse = torch.batch_norm_stats(x, eps)
        count = torch.full_like(mean[:1], x.numel() // channels)
        own = torch.cat([mean, inverse, count]).unsqueeze(0)
        everywhere = distributed.gather_without_gradient(own, [1] * distributed.world_size())
        means, inverses, counts = everywhere.split([channels, channels, 1], 1)
        numbers = counts.flatten() if running_mean is None else counts.flatten().to(running_mean.dtype)
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x, means, inverses, running_mean, running_var, momentum, eps, numbers
        )
        ctx.save_for_backward(x, weight, mean, inverse, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        gradient, (of_x, of_weight, of_bias) = _dense(gradients[0]), ctx.needs_input_grad[:3]
        sums, products, weight_gradient, bias_gradient = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse, weight, of_x, of_weight, of_bias
        )
        x_gradient = None
        if of_x:
            sums, products = distributed.total(torch.cat([sums, products])).chunk(2)
            factor = None if weight is None else weight.to(mean.dtype)
            x_gradient = torch.batch_norm_backward_elemt(gradient, x, mean, inverse, factor, sums, products, counts)
        # DDP averages the gradients of weight and bias.
        own = weight_gradient if of_weight else None, bias_gradient if of_bias else None
        return x_gradient, *own, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])
    return x if last else x.contiguous()
