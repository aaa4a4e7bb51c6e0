"""Batch norm by the statistics of all ranks' batches, for which the host waits for no GPU."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from manyviews.system import distributed

OPERATIONS = ("batch_norm_stats", "batch_norm_gather_stats_with_counts", "batch_norm_elemt")
OPERATIONS += ("batch_norm_backward_reduce", "batch_norm_backward_elemt")
"""What `torch.nn.SyncBatchNorm` computes with, on GPUs; without one of them its own forward is used."""


def synchronize_batch_norms(module: nn.Module) -> nn.Module:
    """Converts batch norms, also timm's with activation, to `SyncBatchNorm`; parameters stay the same objects."""
    module = convert_sync_batchnorm(module)
    for norm in module.modules():
        if isinstance(norm, nn.SyncBatchNorm) and all(hasattr(torch, name) for name in OPERATIONS):
            object.__setattr__(norm, "__class__", _class_for(type(norm)))
    return module


class SyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` without its waits: it looks for ranks with an empty batch, in every layer.

    Here each rank must have a batch of at least one image, of any size. Values, gradients and running statistics are
    the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The normalised batch; collective in training."""
        if not (self.training and x.is_cuda and distributed.world_size() > 1) or self.momentum is None:
            alone: Tensor = super().forward(x)
            return alone
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        normalised: Tensor = _Normalize.apply(x, self.weight, self.bias, *running, self.momentum, self.eps)
        return normalised


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "batch channels ..."],
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x, channels = _dense(x), x.shape[1]
        mean, inverse = torch.batch_norm_stats(x, eps)
        own = torch.cat([mean, inverse, mean.new_full((1,), x.numel() // channels)])
        means, inverses, counts = distributed.gather_without_gradient(own[None], [1] * distributed.world_size()).split(
            [channels, channels, 1], dim=1
        )
        counts = counts.flatten().contiguous()
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x, means.contiguous(), inverses.contiguous(), running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, inverse, counts.int())
        normalised: Tensor = torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        gradient, needed = _dense(gradients[0]), ctx.needs_input_grad
        sums, products, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse, weight, *needed[:3]
        )
        of_x = None
        if needed[0]:
            sums, products = distributed.total(torch.cat([sums, products])).split(len(sums))
            scale = None if weight is None else weight.to(mean.dtype)
            of_x = torch.batch_norm_backward_elemt(gradient, x, mean, inverse, scale, sums, products, counts)
        return of_x, of_weight if needed[1] else None, of_bias if needed[2] else None, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    """The layouts that the operations take: channels first or last, without gaps."""
    return x if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


@cache
def _class_for(kind: type) -> type:
    # timm's class adds an activation to `super().forward`, which is then the one above.
    return SyncBatchNorm if kind is nn.SyncBatchNorm else type(kind.__name__, (kind, SyncBatchNorm), {})
