"""What a report tells of: a run, what was measured on it, and the images to show it by."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from manyviews.data import Images
from manyviews.evaluators.failures import Failure
from manyviews.evaluators.results.measurement import Evaluation, leading
from manyviews.system import keyed_random
from manyviews.system.files import spelled


class Also(NamedTuple):
    """Results of the same weights and images by other settings."""

    title: str
    """Which settings: protocol.seed=1."""
    evaluation: Evaluation


class Findings(NamedTuple):
    """A run and all that is known of it; what is None or empty is left out of the report."""

    folder: Path
    """The run; its configuration, metrics, preview and list of unreadable files are read from here."""
    train: Images
    test: Images | None
    features: Mapping[str, tuple[Tensor | None, Tensor]]
    """By kind, the learned ones first: of the training images (None if not computed) and of the images shown."""
    evaluation: Evaluation = Evaluation()
    points: Mapping[str, tuple[Tensor, Tensor]] = {}
    """Maps of the learned features by method: ids among the images shown [m], and their points [m, 2]."""
    warnings: tuple[str, ...] = ()
    layers: str = ""
    """By which layer images are compared, and why, in a sentence; empty where one was measured."""
    failures: tuple[Failure, ...] = ()
    """Tasks that could not be measured."""
    also: tuple["Also", ...] = ()
    """What was measured before of the same weights and images in another way."""

    @property
    def shown(self) -> Images:
        """The images that pictures are made of: the test images, or the training images where there are no others."""
        return self.train if self.test is None else self.test

    @property
    def kind(self) -> str:
        """What the learned features are called that images are compared by."""
        return next(iter(self.features))

    @property
    def width(self) -> int:
        """The width of the backbone's features, or of those that there are in their stead."""
        return self.features[leading(self.features)][1].shape[1]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that training and shown images have, as far as they have names."""
        return max(self.train.classes, self.shown.classes, key=len)

    def class_name(self, number: int) -> str:
        """What to call a class: its name, or its number where it has none."""
        if number < 0:
            return "no class"
        return spelled(self.classes[number]) if number < len(self.classes) else f"class {number}"


def drawn(ids: Int64[Tensor, " images"], most: int, *key: int) -> Int64[Tensor, " drawn"]:
    """At most so many of some distinct ids, in an order that is a pure function of each id and the key."""
    return ids[keyed_random.uniform(ids, *key).argsort(stable=True)[:most]]


def has_labels(labels: Tensor | None) -> bool:
    """Whether any image has a class."""
    return labels is not None and bool(torch.any(labels >= 0))


def labels_of(images: Images) -> Int64[Tensor, " images"]:
    """The class of each image, −1 where there is none."""
    return images.labels if images.labels is not None else torch.full((len(images),), -1)
