"""Batch norm that leaks no identity to a momentum encoder: split, or shuffled over ranks."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from manyviews.system import distributed
from manyviews.system.keyed_random import numpy_generator


def split_batch_norms(module: nn.Module, splits: int, *, interleaved: bool) -> None:
    """Makes every batch norm normalise each of `splits` parts of the batch on its own.

    In training only; the running statistics move by the mean of the parts' statistics. The keys and shapes of the state
    dict stay the same.

    On one device, queries and keys of the same images share batch statistics, which gives away which query is theirs
    (He et al. 2020, section 3.3; their cure, `Shuffle`, needs several processes). Split differently, they do not:
    interleaved parts take every splits-th sample, the others are blocks.
    """
    for norm in module.modules():
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        if not isinstance(norm, SplitBatchNorm):
            # The class, not the object, is replaced: parameters, buffers, hooks and references stay.
            kind: Any = type(norm)
            object.__setattr__(norm, "__class__", _split_class(kind))
        assert isinstance(norm, SplitBatchNorm)
        norm.splits, norm.interleaved = splits, interleaved


class SplitBatchNorm(nn.Module):
    """Mixin that `split_batch_norms` puts before the class of a batch norm."""

    splits: int
    interleaved: bool

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """The batch normalised in parts; in evaluation mode as a whole.

        Raises:
            ValueError: fewer than two samples for each part.
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


@cache
def _split_class(kind: type) -> type:
    return type(f"Split{kind.__name__}", (SplitBatchNorm, kind), {})


class Shuffle(NamedTuple):
    """An exchange of samples between ranks, "shuffling BN" (He et al. 2020, section 3.3).

    Each rank encodes as many samples as it has, but others: the batch statistics of keys then do not give away which
    query is theirs. The authors' code gathers all images on every rank; here each is sent once.
    """

    sent: Int64[Tensor, " samples"]
    """Indices of this rank's samples in the order of sending."""
    outgoing: Sequence[int]
    """Number of samples sent to each rank."""
    received: Int64[Tensor, " samples"]
    """Positions of the samples in the order of arrival, rank by rank."""
    incoming: Sequence[int]
    """Number of samples received from each rank."""

    @classmethod
    def draw(cls, samples: int, key: Sequence[int], device: torch.device | str = "cpu") -> "Shuffle":
        """Draws a permutation of the samples of all ranks, from the key alone; collective.

        Args:
            samples: number on this rank; it may differ between ranks.
            key: numbers that are equal on all ranks and differ from step to step.
            device: that of the samples.
        """
        lengths = torch.tensor(distributed.counts(samples))
        drawn = numpy_generator("shuffle", *key).permutation(int(lengths.sum()))
        permutation, own = torch.from_numpy(drawn), distributed.rank()
        # The sample permutation[index] is encoded by the rank that owns the index.
        owners = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        from_own, to_own = owners[permutation] == own, owners == own
        senders = owners[permutation[to_own]]
        return cls(
            # Copies that do not block: indices on the CPU would make the host wait for a GPU.
            sent=(permutation[from_own] - lengths[:own].sum()).to(device, non_blocking=True),
            outgoing=owners[from_own].bincount(minlength=len(lengths)).tolist(),
            received=senders.argsort(stable=True).to(device, non_blocking=True),
            incoming=senders.bincount(minlength=len(lengths)).tolist(),
        )

    def away(self, local: Float[Tensor, "samples ..."]) -> Float[Tensor, "samples ..."]:
        """Exchanges this rank's samples for those that it encodes; without gradient; collective."""
        return _exchange(local, self.sent, self.outgoing, self.received, self.incoming)

    def home(self, encoded: Float[Tensor, "samples ..."]) -> Float[Tensor, "samples ..."]:
        """Exchanges encoded samples for the outputs of this rank's own, in their order; collective."""
        return _exchange(encoded, self.received, self.incoming, self.sent, self.outgoing)


@torch.no_grad()
def _exchange(
    tensor: Tensor, leaving: Tensor, outgoing: Sequence[int], arriving: Tensor, incoming: Sequence[int]
) -> Tensor:
    exchanged = torch.empty_like(tensor)
    exchanged[arriving] = distributed.exchange(tensor[leaving], outgoing, incoming)
    return exchanged
