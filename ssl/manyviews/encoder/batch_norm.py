"""Batch norm that a momentum twin cannot be seen through: over parts of the batch, or shuffled between processes."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from manyviews.system import distributed
from manyviews.system.keyed_random import numpy_generator


def split_batch_norms(module: nn.Module, splits: int, *, interleaved: bool) -> None:
    """Makes every batch norm in the module normalise each of `splits` parts of the batch by its own statistics.

    In training only; the running statistics move as they would for the mean of the parts' statistics. Names and shapes
    in the state dict stay what they were, and what calls the modules does not change.

    On one device, queries and keys of the same images share batch statistics, by which they find each other without a
    look at the images (He et al. 2020, section 3.3; their cure, `Shuffle`, needs several processes). Split
    differently, they do not: interleaved parts take every splits-th sample, the others are blocks, so that a sample
    has other company in a twin with blocks than in an encoder with interleaved parts.
    """
    for norm in module.modules():
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        if not isinstance(norm, SplitBatchNorm):
            # The class, not the object, is replaced: parameters, buffers, hooks and whoever holds it stay.
            kind: Any = type(norm)
            object.__setattr__(norm, "__class__", _split_class(kind))
        assert isinstance(norm, SplitBatchNorm)
        norm.splits, norm.interleaved = splits, interleaved


class SplitBatchNorm(nn.Module):
    """What `split_batch_norms` adds to a batch norm, whose class comes after this one."""

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


@cache
def _split_class(kind: type) -> type:
    return type(f"Split{kind.__name__}", (SplitBatchNorm, kind), {})


class Shuffle(NamedTuple):
    """An exchange of samples between processes, and the way back.

    Each process encodes as many samples as it has, but others: keys then share their batch statistics with other keys
    than their queries do with queries, and do not give away which query is theirs (He et al. 2020, section 3.3,
    "shuffling BN"). Their code gathers all images on every process; here each travels only where it is needed.
    """

    sent: Int64[Tensor, " samples"]
    """The own samples in the order in which they leave, and come home."""
    outgoing: Sequence[int]
    """How many leave for each process."""
    places: Int64[Tensor, " samples"]
    """Where those stand that arrive, process by process."""
    incoming: Sequence[int]
    """How many arrive from each process."""

    @classmethod
    def draw(cls, samples: int, key: Sequence[int]) -> "Shuffle":
        """One permutation of the samples of all processes, which depends on the key alone; collective.

        Args:
            samples: how many this process has; the others may have another number.
            key: numbers that are equal on all processes and differ from step to step.
        """
        lengths = torch.tensor(distributed.counts(samples))
        drawn = numpy_generator("shuffle", *key).permutation(int(lengths.sum()))
        permutation, own = torch.from_numpy(drawn), distributed.rank()
        # The sample permutation[place] is encoded by the process that the place belongs to.
        owners = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        from_own, to_own = owners[permutation] == own, owners == own
        senders = owners[permutation[to_own]]
        return cls(
            sent=permutation[from_own] - lengths[:own].sum(),
            outgoing=owners[from_own].bincount(minlength=len(lengths)).tolist(),
            places=senders.argsort(stable=True),
            incoming=senders.bincount(minlength=len(lengths)).tolist(),
        )

    def away(self, local: Float[Tensor, "samples ..."]) -> Float[Tensor, "samples ..."]:
        """The samples that this process encodes, for its own; without gradient; collective."""
        return _exchange(local, self.sent, self.outgoing, self.places, self.incoming)

    def home(self, encoded: Float[Tensor, "samples ..."]) -> Float[Tensor, "samples ..."]:
        """What has become of the own samples, in their order, for what this process has encoded; collective."""
        return _exchange(encoded, self.places, self.incoming, self.sent, self.outgoing)


@torch.no_grad()
def _exchange(
    tensor: Tensor, leaving: Tensor, outgoing: Sequence[int], arriving: Tensor, incoming: Sequence[int]
) -> Tensor:
    placed = torch.empty_like(tensor)
    placed[arriving] = distributed.exchange(tensor[leaving], outgoing, incoming)
    return placed
