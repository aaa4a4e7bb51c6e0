"""Batches for losses over classes: P classes with K images of each, and what any batches hold of classes."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from manyviews.data.sampler import Order
from manyviews.system.keyed_random import numpy_generator
from manyviews.system.plural import plural

MOST_BATCHES = 500
"""Batches of the first epoch that are counted: as many are a fair sample of a longer one."""


class ClassOrder(Order):
    """The global batches of an endless run in which each batch has `per_class` images of each of its classes.

    In an epoch the images of each class are shuffled and cut into groups; each batch gets groups of different classes,
    as many batches as can be filled, and no image comes twice. What fills no group, and groups that fill no batch, are
    others in each epoch. A class with fewer than `per_class` images never comes: `left_out` counts such images. The
    batches depend on the labels, these numbers, the seed and the step alone.

    Args:
        labels: the class of each image; −1: none, the image never comes.
        batch_size: images of a batch.
        per_class: images of each class in a batch.
        seed: with the epoch it determines the order.

    Raises:
        ValueError: if the batch is no multiple of `per_class`, or there are too few classes to fill it.
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
        """The most batches that can be filled: of each class no batch has more than one group."""
        fewest, most = 1, int(self._groups.sum()) // self.classes_per_batch
        while fewest < most:
            middle = (fewest + most + 1) // 2
            if np.minimum(self._groups, middle).sum() >= middle * self.classes_per_batch:
                fewest = middle
            else:
                most = middle - 1
        return fewest

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
        places = np.empty((steps, self.classes_per_batch), dtype=np.int64)
        for step in range(steps):
            # By their groups left, so that all run out together; a class with one for each batch left must come now.
            with np.errstate(divide="ignore"):
                keys = generator.random(len(left)) ** (1 / left)
            keys[left == 0] = -1
            keys[left == steps - step] = 2
            chosen = np.argpartition(-keys, self.classes_per_batch - 1)[: self.classes_per_batch]
            left[chosen] -= 1
            places[step] = starts[chosen] + per_class * left[chosen]
        images = by_class[places[:, :, None] + np.arange(per_class)].reshape(steps, self.batch_size)
        # Shuffled in the batch too: each process gets a part of it, and batch norms should see what is usual.
        return torch.from_numpy(generator.permuted(images, axis=1).astype(np.int64).ravel())


def way_out(sizes: np.ndarray[Any, np.dtype[np.int64]], batch_size: int, per_class: int) -> str:
    """The largest batch of at least two classes, with two images of each or more, that classes of these sizes fill.

    Neither it nor its images of each class are more than was asked for; of several the one with more classes.
    """
    fitting = [
        (classes * number, classes, number)
        for number in range(2, max(per_class, 2) + 1)
        if (classes := min(int((sizes >= number).sum()), batch_size // number)) >= 2
    ]
    if not fitting:
        return (
            "no two classes have two images each, of which pairs could be made; add images of each class, or use "
            "ids=images without train.images_per_class, as the recipes called …_instances do"
        )
    size, _, number = max(fitting)
    return f"use train.batch_size={size} train.images_per_class={number}, or add images of each class"


class Composition(NamedTuple):
    """Counts over the batches of an epoch, or the first 500 of them."""

    batches: int
    without_positives: int
    """Batches in which no image has a positive: another view, or another image of its class."""
    without_negatives: int
    """Batches of one class."""
    negatives: float
    """Embeddings of other classes for each anchor, the mean over all anchors."""


def composition(order: Order, ids: Int[Tensor, " images"], *, views: int, paired: bool = False) -> Composition:
    """Counts the positives and negatives in the batches of the first epoch; embeddings of equal ids are positives.

    Args:
        order: the batches.
        ids: the class of each image.
        views: of each image in a batch.
        paired: embeddings of a class are paired off, and the second ones of all other pairs are an anchor's negatives,
            as in the N-pair loss.
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
