"""Batch samplers: the ids of a batch are a pure function of the seed and the step."""

from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from manyviews.system.keyed_random import numpy_generator
from manyviews.system.plural import plural

MOST_BATCHES = 500
"""Batches of the first epoch that `composition` counts."""


def order(num_images: int, seed: int, epoch: int) -> Int64[Tensor, " images"]:
    """A permutation of all ids, which depends on the seed and the epoch alone."""
    permutation = numpy_generator("order", seed, epoch).permutation(num_images)
    return torch.from_numpy(permutation.astype(np.int64))


class Order:
    """Batch sampler without end over ids below `num_images`; global batches by step.

    No id comes twice in an epoch. The rest of an epoch that does not fill a batch, another one in each epoch, is
    dropped, or is a smaller last batch if it has at least `smallest` images. All ranks take equally many steps.

    Examples:
        >>> Order(10, 4, seed=0).batch(2)[0], Order(10, 4, seed=0).steps_per_epoch
        (1, 2)

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
        """The epoch of a step, from 0, and the ids of its global batch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._ids = epoch, self._arrange(epoch)
        return epoch, self._ids[index * self.batch_size : (index + 1) * self.batch_size]

    def images(self, step: int) -> int:
        """Number of images in the batches before this step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch * self.images_per_epoch + index * self.batch_size

    def _arrange(self, epoch: int) -> Int64[Tensor, " images"]:
        return order(self.num_images, self.seed, epoch)


class ClassOrder(Order):
    """Batch sampler of P classes with K images each; K is `per_class`.

    In an epoch the images of each class are shuffled and cut into groups; each batch gets groups of different classes,
    as many batches as can be filled, and no image comes twice. The images that are left over differ between epochs.
    `left_out` counts images that never come: those of label -1, and of classes with fewer than `per_class` images.

    Raises:
        ValueError: the batch is not a multiple of `per_class`, or there are too few classes to fill it.

    Examples:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> labels[ClassOrder(labels, 4, 2, seed=0).batch(0)[1]].bincount()
        tensor([2, 2])
    """

    def __init__(self, labels: Int64[Tensor, " images"], batch_size: int, per_class: int, seed: int) -> None:
        if batch_size % per_class or batch_size < per_class:
            nearest = max(round(batch_size / per_class), 1) * per_class
            raise ValueError(
                f"a batch of {batch_size} images cannot have {per_class} of each of its classes; use a batch of "
                f"{nearest}"
            )
        self.per_class, self.classes_per_batch = per_class, batch_size // per_class
        self._labels = labels.numpy()
        sizes = np.bincount(self._labels[self._labels >= 0])
        self._groups = sizes // per_class
        usable = int((self._groups > 0).sum())
        if usable < self.classes_per_batch:
            classes = plural(self.classes_per_batch, "class", "classes")
            raise ValueError(
                f"a batch of {batch_size} images with {per_class} of each class takes {classes}, but {usable} have as "
                f"many images; {way_out(sizes, batch_size, per_class)}"
            )
        super().__init__(len(labels), batch_size, seed)
        self.left_out = int(sizes[self._groups == 0].sum()) + int((self._labels < 0).sum())
        self.steps_per_epoch = self._steps()
        self.images_per_epoch = self.steps_per_epoch * batch_size

    def _steps(self) -> int:
        """The most batches that can be filled with at most one group of each class."""

        def too_many(steps: int) -> bool:
            return bool(np.minimum(self._groups, steps).sum() < steps * self.classes_per_batch)

        most = int(self._groups.sum()) // self.classes_per_batch
        return bisect_left(range(1, most + 1), True, key=too_many)

    def _arrange(self, epoch: int) -> Int64[Tensor, " images"]:
        generator = numpy_generator("class", self.seed, epoch)
        steps, per_class = self.steps_per_epoch, self.per_class
        shuffled = generator.permutation(self.num_images)
        by_class = shuffled[np.argsort(self._labels[shuffled], kind="stable")]
        by_class = by_class[self._labels[by_class] >= 0]
        starts = np.concatenate([[0], np.cumsum(np.bincount(self._labels[by_class]))])
        usable = np.minimum(self._groups, steps)
        owners = np.repeat(np.arange(len(usable)), usable)
        kept = generator.permutation(len(owners))[: steps * self.classes_per_batch]
        left = np.bincount(owners[kept], minlength=len(usable))
        firsts = np.empty((steps, self.classes_per_batch), dtype=np.int64)
        for step in range(steps):
            # Weighted by the groups left, to run out together; a class with one for each batch left is due.
            with np.errstate(divide="ignore"):
                keys = generator.random(len(left)) ** (1 / left)
            keys[left == 0] = -1
            keys[left == steps - step] = 2
            chosen = np.argpartition(-keys, self.classes_per_batch - 1)[: self.classes_per_batch]
            left[chosen] -= 1
            firsts[step] = starts[chosen] + per_class * left[chosen]
        images = by_class[firsts[:, :, None] + np.arange(per_class)].reshape(steps, self.batch_size)
        # Shuffled within the batch: each rank gets a part of it, for the statistics of its batch norms.
        return torch.from_numpy(generator.permuted(images, axis=1).astype(np.int64).ravel())


def way_out(sizes: np.ndarray[Any, np.dtype[np.int64]], batch_size: int, per_class: int) -> str:
    """Message with the largest batch that such classes fill with at least two images of each."""
    fitting = [
        (classes * number, classes, number)
        for number in range(2, max(per_class, 2) + 1)
        if (classes := min(int((sizes >= number).sum()), batch_size // number)) >= 2
    ]
    if not fitting:
        return (
            "no two classes have two images each for positive pairs; add images of each class, or use ids=images "
            "without train.images_per_class, as in the recipes called …_instances"
        )
    size, _, number = max(fitting)
    return f"use train.batch_size={size} train.images_per_class={number}, or add images of each class"


class Composition(NamedTuple):
    """Counts over the batches of the first epoch, at most 500 of them."""

    batches: int
    without_positives: int
    """Batches in which no image has a positive, which is another view or another image of its class."""
    without_negatives: int
    """Batches of one class."""
    negatives: float
    """Mean number of embeddings of other classes per anchor."""


def composition(order: Order, ids: Int[Tensor, " images"], *, views: int, paired: bool = False) -> Composition:
    """Counts positives (equal ids) and negatives in the batches of the first epoch.

    `views` is the number per image. `paired`: as in the N-pair loss, the embeddings of a class form pairs, and the
    negatives of an anchor are the second embeddings of the pairs of other classes.
    """
    classes = ids.numpy()
    counted = min(order.steps_per_epoch, MOST_BATCHES)
    without_positives, without_negatives, total, anchors = 0, 0, 0, 0
    for step in range(counted):
        sizes = views * np.unique(classes[order.batch(step)[1].numpy()], return_counts=True)[1]
        without_positives += bool(sizes.max() < 2)
        without_negatives += len(sizes) < 2
        sizes = sizes // 2 if paired else sizes
        total += int((sizes * (sizes.sum() - sizes)).sum())
        anchors += int(sizes.sum())
    return Composition(counted, without_positives, without_negatives, total / max(anchors, 1))
