"""Which images are in which batch: a pure function of the seed and the step, the same on every rank."""

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from manyviews.system.keyed_random import numpy_generator
from manyviews.system.plural import plural


def order(num_images: int, seed: int, epoch: int) -> Int64[Tensor, " images"]:
    """The order of all ids in an epoch: a permutation that depends on the seed and the epoch alone."""
    permutation = numpy_generator("order", seed, epoch).permutation(num_images)
    return torch.from_numpy(permutation.astype(np.int64))


class Order:
    """The global batches of an endless run over `num_images` images, found by their step.

    No id comes twice in an epoch. The rest of an epoch's order that does not fill a batch (another rest in each epoch)
    is dropped, or is a smaller last batch if it has at least `smallest` images; in either case the batches depend on
    these numbers alone, so that all ranks take equally many steps.

    Args:
        num_images: how many there are; their ids are the numbers below it.
        batch_size: images of a full batch.
        seed: with the epoch it determines the order.
        smallest: the fewest images of a last batch; None drops each that is not full.

    Raises:
        ValueError: fewer images than a batch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, *, smallest: int | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"a batch of {plural(batch_size, 'image')} is empty; use at least 1")
        if num_images < batch_size:
            raise ValueError(
                f"{plural(num_images, 'image')} are fewer than a batch of {batch_size}; "
                f"use a batch size of at most {num_images}, or more images"
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        full, rest = divmod(num_images, batch_size)
        kept = rest if smallest is not None and rest >= max(smallest, 1) else 0
        self.steps_per_epoch = full + (kept > 0)
        self.images_per_epoch = full * batch_size + kept
        self._epoch = -1
        self._ids = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> tuple[int, Int64[Tensor, " batch"]]:
        """The epoch of a step, counted from 0, and the ids of its global batch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._ids = epoch, self._arrange(epoch)
        return epoch, self._ids[index * self.batch_size : (index + 1) * self.batch_size]

    def images(self, step: int) -> int:
        """How many images the steps before this one took."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch * self.images_per_epoch + index * self.batch_size

    def _arrange(self, epoch: int) -> Int64[Tensor, " images"]:
        return order(self.num_images, self.seed, epoch)
