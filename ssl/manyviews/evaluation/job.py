"""What an evaluation measures: a run, the images, and which of them are compared."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from manyviews.data import Images, Split, of_classes
from manyviews.evaluation.settings import EvaluateSettings, recipe_of
from manyviews.evaluators.distance import MetricPairs
from manyviews.evaluators.failures import OnFailure
from manyviews.evaluators.pair_lists import read_pairs
from manyviews.evaluators.protocol import Gallery
from manyviews.evaluators.verification import Pairs
from manyviews.features.backbone import PretrainedBackbone
from manyviews.recipe import Recipe
from manyviews.system.console import Console

FOREIGN = "of other data than the run's"


class Job(NamedTuple):
    """A run to measure, the images to measure it on, and where messages and files go."""

    pretrained: PretrainedBackbone
    split: Split
    settings: EvaluateSettings
    console: Console
    on_failure: OnFailure
    """Called if a task fails on a kind of features, which is then left out."""
    output: Path | None
    """Folder for features, fitted metrics and clusters; None if it cannot be written to."""
    pairs: Pairs | None = None
    """Pairs to verify, by their positions in the images shown, then in the training images."""
    metric_pairs: MetricPairs | None = None
    """Pairs of training images that the metric is fitted on in place of classes."""

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return recipe_of(self.pretrained)

    @property
    def shown(self) -> Images:
        """The held-out images, or the training images if there are none."""
        return self.split.train if self.split.test is None else self.split.test

    @property
    def labelled(self) -> bool:
        """Whether training and held-out images have classes."""
        return is_labelled(self.split)

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """The classes of training images and images shown, −1 without one."""
        train, test = self.split.train.labels, self.shown.labels
        if not self.labelled or train is None or test is None:
            return torch.full((len(self.split.train),), -1), torch.full((len(self.shown),), -1)
        return train, test

    @property
    def paired(self) -> Tensor:
        """Ids of training images, other than those shown, that the pairs have."""
        images = torch.empty(0, dtype=torch.int64) if self.pairs is None else self.pairs.images.unique()
        return images[images >= len(self.shown)] - len(self.shown)


def is_labelled(split: Split) -> bool:
    """Returns whether images are held out, and they and the training images have classes."""
    return split.train.labels is not None and split.test is not None and split.test.labels is not None


def pairs_of(split: Split, settings: EvaluateSettings) -> Pairs | None:
    """Reads the pairs of the settings, of held-out or training images; None without a file.

    Raises:
        ValueError: as `read_pairs` does.
    """
    if settings.pairs is None:
        return None
    names = [*(split.train if split.test is None else split.test).names]
    names += [] if split.test is None else [*split.train.names]
    return read_pairs(settings.pairs, names, settings.protocol.verification, seed=settings.protocol.seed)


def gallery_of(job: Job, *, own: bool) -> Gallery:
    """Returns the test images of the given classes, or of the run's unseen ones, or all.

    `own` is whether the images are the run's.
    """
    train, test, recipe, settings = job.split.train, job.shown, job.recipe, job.settings
    others = torch.arange(len(train))
    classes = settings.classes or (recipe.unseen if own else ())
    if not classes:
        return Gallery(torch.arange(len(test)), "seen in training" if own else FOREIGN, others)
    named = of_classes(train, classes)
    unseen = of_classes(train, recipe.unseen) if own and recipe.unseen else others[:0]
    new = torch.isin(named, unseen)
    origin = "never seen in training" if new.all() else f"{'some of them ' if new.any() else ''}seen in training"
    return Gallery(of_classes(test, classes), origin if own else FOREIGN, others[~torch.isin(others, named)])
