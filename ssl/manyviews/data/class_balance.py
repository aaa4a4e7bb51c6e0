"""What batches hold for losses over classes: positives and negatives of each image, counted before the first step."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from torch import Tensor

from manyviews.data.sampler import Order

MOST_BATCHES = 500
"""Batches of the first epoch that are counted: as many are a fair sample of a longer one."""


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
