"""Batch norm over parts of the batch, as separate devices would have it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def split_batch_norms(module: nn.Module, splits: int, *, interleaved: bool) -> None:
    """Makes every batch norm in the module normalise each of `splits` parts of the batch by its own statistics.

    In training only; the running statistics move as they would for the mean of the parts' statistics. Names and shapes
    in the state dict stay what they were, and what calls the modules does not change.

    On one device, queries and keys of the same images share batch statistics, by which they find each other without a
    look at the images (He et al. 2020, section 3.3; their cure, shuffling between devices, needs several). Split
    differently, they do not: interleaved parts take every splits-th sample, the others are blocks, so that a sample
    has other company in a twin with blocks than in an encoder with interleaved parts.
    """
    for norm in module.modules():
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        if not isinstance(norm, SplitBatchNorm):
            # The class, not the object, is replaced: parameters, buffers, hooks and whoever holds it stay.
            object.__setattr__(norm, "__class__", _split_class(type(norm)))
        assert isinstance(norm, SplitBatchNorm)
        norm.splits, norm.interleaved = splits, interleaved


class SplitBatchNorm(_BatchNorm):
    """What `split_batch_norms` adds to a batch norm of any class."""

    splits: int
    interleaved: bool

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """The batch normalised in parts; in evaluation mode, as ever.

        Raises:
            ValueError: There are fewer than two samples for each part.
        """
        if not self.training or self.splits == 1:
            unsplit: Tensor = super().forward(x, *args)
            return unsplit
        if len(x) < 2 * self.splits:
            raise ValueError(
                f"{len(x)} samples cannot be split into {self.splits} parts of at least 2 for batch norm; "
                f"use encoder.batch_norm_splits={max(1, len(x) // 2)} or a larger batch"
            )
        order = torch.arange(len(x), device=x.device)
        if self.interleaved:
            order = torch.cat([order[first :: self.splits] for first in range(self.splits)])
            x = x[order]
        # Each part moves copies, since autograd keeps the statistics it was given; the mean is written once.
        originals = dict(self.named_buffers(recurse=False))
        outputs, moved = [], []
        for part in x.tensor_split(self.splits):
            for name, buffer in originals.items():
                setattr(self, name, buffer.clone())
            outputs.append(super().forward(part, *args))
            moved.append(dict(self.named_buffers(recurse=False)))
        for name, buffer in originals.items():
            setattr(self, name, buffer)
            values = torch.stack([buffers[name] for buffers in moved])
            buffer.copy_(values.mean(0) if values.is_floating_point() else values[0])
        joined = torch.cat(outputs)
        return joined[order.argsort()] if self.interleaved else joined


_split_classes: dict[type, type] = {}


def _split_class(kind: type) -> type:
    if kind not in _split_classes:
        _split_classes[kind] = type(f"Split{kind.__name__}", (SplitBatchNorm, kind), {})
    return _split_classes[kind]
