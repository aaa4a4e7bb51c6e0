"""The findings of an evaluation: a run, its images, features and measurements."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from manyviews.data import Images
from manyviews.evaluators.failures import Failure
from manyviews.evaluators.results.measurement import Evaluation, in_order
from manyviews.system import keyed_random
from manyviews.system.files import spelled
from manyviews.views import StandardView


class Findings(NamedTuple):
    """A run and its evaluation; what is None or empty is left out of the report."""

    folder: Path
    """The run's folder, with its configuration, metrics, preview and list of unreadable files."""
    train: Images
    test: Images | None
    features: Mapping[str, tuple[Tensor | None, Tensor]]
    """By kind, the learned ones first: features of the training images (None if not computed) and the images shown."""
    evaluation: Evaluation = Evaluation()
    points: Mapping[str, tuple[Tensor, Tensor]] = {}
    """Maps of the learned features by method: ids of images shown [m], and their points [m, 2]."""
    warnings: tuple[str, ...] = ()
    layers: str = ""
    """A sentence on the layer that images are compared by; empty if one layer was measured."""
    failures: tuple[Failure, ...] = ()
    view: StandardView | None = None
    """What the backbone sees of an image, as which images are shown; None: the whole shorter side."""
    also: tuple[tuple[str, Evaluation], ...] = ()
    """Earlier results of the same weights and images, after the settings that differ: protocol.seed=1."""

    @property
    def shown(self) -> Images:
        """The test images, or the training images if there are no others."""
        return self.train if self.test is None else self.test

    @property
    def kind(self) -> str:
        """The kind of features that images are compared by."""
        return next(iter(self.features))

    @property
    def width(self) -> int:
        """The width of the backbone's features, or else of the leading kind."""
        return self.features[in_order(self.features)[0]][1].shape[1]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes of training and shown images."""
        return max(self.train.classes, self.shown.classes, key=len)

    def class_name(self, number: int) -> str:
        """Returns the name of a class, or its number if it has none."""
        if number < 0:
            return "no class"
        return spelled(self.classes[number]) if number < len(self.classes) else f"class {number}"


def drawn(ids: Int64[Tensor, " images"], most: int, *key: int) -> Int64[Tensor, " drawn"]:
    """Samples up to `most` distinct ids, in an order by each id and the key alone."""
    return ids[keyed_random.uniform(ids, *key).argsort(stable=True)[:most]]


def has_labels(labels: Tensor | None) -> bool:
    """Returns whether any image has a class."""
    return labels is not None and bool(torch.any(labels >= 0))


def labels_of(images: Images) -> Int64[Tensor, " images"]:
    """Returns the class of each image, −1 without one."""
    return images.labels if images.labels is not None else torch.full((len(images),), -1)
