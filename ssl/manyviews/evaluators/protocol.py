"""The protocol of an evaluation, and the tasks that the labels rule out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int, Int64
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.evaluators.augmented import AugmentedSettings
from manyviews.evaluators.clustering import ClusteringSettings
from manyviews.evaluators.distance import Metric, is_fitted, takes_classes
from manyviews.evaluators.knn import MOST_HELD_OUT, KnnSettings
from manyviews.evaluators.linear import LinearSettings
from manyviews.evaluators.results.measurement import GROUPING, PROBES, Task
from manyviews.evaluators.retrieval import RetrievalSettings
from manyviews.evaluators.splits import hold_out
from manyviews.evaluators.verification import VerificationSettings, draw_pairs
from manyviews.system.plural import plural


class ProtocolSettings(Settings):
    """The protocol: the same for every kind of features, and without use of the test labels."""

    knn: KnnSettings = KnnSettings()
    linear: LinearSettings = LinearSettings()
    augmented: AugmentedSettings = AugmentedSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    clustering: ClusteringSettings = ClusteringSettings()
    verification: VerificationSettings = VerificationSettings()
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of each class's training images that is held out to choose k, temperature and regularisation."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of that sample, of the starts of k-means and of the pairs of verification."""


class Gallery(NamedTuple):
    """The test images that retrieval, clustering and verification compare with each other."""

    images: Int64[Tensor, " gallery"]
    origin: str
    """A remark on their classes, such as "never seen in training"."""
    fitting: Int64[Tensor, " fitting"]
    """Ids of the training images that a metric may be fitted on: of other classes, if these are to be unseen."""


def refusals(
    tasks: Sequence[Task],
    gallery: Gallery,
    train_labels: Int[Tensor, " train"],
    test_labels: Int[Tensor, " test"],
    protocol: ProtocolSettings,
    metric: Metric | None,
) -> dict[Task, str]:
    """Returns the tasks that these labels make impossible, in order, each with the reason."""
    if not len(test_labels) or int(test_labels.max()) < 0:
        return dict.fromkeys(tasks, "no test image has a label")
    reasons: dict[Task, str] = {}
    by_distance = [task for task in tasks if searches(task)]
    if takes_classes(metric) and by_distance:
        try:
            fitting_images(gallery, train_labels, protocol)
        except ValueError as problem:
            reasons |= dict.fromkeys(by_distance, str(problem))
    labels = test_labels[gallery.images]
    labels = labels[labels >= 0]
    classes = len(labels.unique())
    if classes < 2:
        reason = (
            f"{plural(len(labels), 'test image')} of {plural(classes, 'class', 'classes')} are to be compared with "
            "each other; name 2 classes or more"
        )
        reasons |= dict.fromkeys(GROUPING, reason)
    elif "verification" in tasks:
        try:
            draw_pairs(labels, protocol.verification, seed=protocol.seed)
        except ValueError as problem:
            reasons["verification"] = str(problem)
    return {task: reasons[task] for task in tasks if task in reasons}


def searches(task: Task) -> bool:
    """Returns whether a task uses distances between features."""
    return task == "knn" or task in GROUPING


def takes_training(tasks: Sequence[Task], metric: Metric | None) -> bool:
    """Returns whether the features of training images are needed."""
    return bool(set(PROBES) & set(tasks)) or is_fitted(metric)


def fitting_images(gallery: Gallery, labels: Int[Tensor, " train"], protocol: ProtocolSettings) -> Int[Tensor, " some"]:
    """Returns the gallery's training images to fit a metric on, without those held out for kNN.

    Raises:
        ValueError: if they have fewer than 2 classes.
    """
    kept, _ = hold_out(labels, share=protocol.held_out, seed=protocol.seed, most=MOST_HELD_OUT, one_each=True)
    fitting = gallery.fitting[torch.isin(gallery.fitting, kept)]
    if len(labels[fitting].unique()) < 2:
        raise ValueError(
            "a metric is fitted on training images of 2 classes or more, and there are none beside the classes that "
            "are to stay unseen; leave more classes to it, or use metric=cosine"
        )
    return fitting
