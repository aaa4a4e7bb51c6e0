"""What tasks need of the images: which ones the labels alone rule out, and which take features of training images."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from manyviews.evaluators.distance import Metric, is_fitted
from manyviews.evaluators.knn import MOST_HELD_OUT
from manyviews.evaluators.protocol import PROBES, Gallery, ProtocolSettings, Task
from manyviews.evaluators.results.kinds import GROUPING
from manyviews.evaluators.splits import hold_out_some
from manyviews.evaluators.verification import draw_pairs
from manyviews.system.plural import plural


def refusals(
    tasks: Sequence[Task],
    gallery: Gallery,
    train_labels: Int[Tensor, " train"],
    test_labels: Int[Tensor, " test"],
    protocol: ProtocolSettings,
    metric: Metric | None,
) -> dict[Task, str]:
    """The tasks that the labels alone show to be impossible, each with the reason, in the order of the tasks."""
    found: dict[Task, str] = {}
    if not len(test_labels) or int(test_labels.max()) < 0:
        return dict.fromkeys(tasks, "no test image has a label")
    labels = test_labels[gallery.images]
    labels = labels[labels >= 0]
    classes = len(labels.unique())
    if classes < 2:
        reason = (
            f"{plural(len(labels), 'test image')} of {plural(classes, 'class', 'classes')} are to be compared with "
            "each other; name 2 classes or more"
        )
        found |= dict.fromkeys(GROUPING, reason)
    elif "verification" in tasks:
        try:
            draw_pairs(labels, protocol.verification, seed=protocol.seed)
        except ValueError as problem:
            found["verification"] = str(problem)
    by_distance = [task for task in tasks if searches(task)]
    if metric is not None and is_fitted(metric) and by_distance:
        try:
            fitting_images(gallery, train_labels, protocol)
        except ValueError as problem:
            found = dict.fromkeys(by_distance, str(problem)) | found
    return {task: found[task] for task in tasks if task in found}


def searches(task: Task) -> bool:
    """Whether a task goes by distances of features; the linear probes do without."""
    return task not in ("linear", "augmented")


def takes_training(tasks: Sequence[Task], metric: Metric | None) -> bool:
    """Whether the features of training images are needed."""
    return bool(set(PROBES) & set(tasks)) or (metric is not None and is_fitted(metric))


def fitting_images(gallery: Gallery, labels: Int[Tensor, " train"], protocol: ProtocolSettings) -> Int[Tensor, " some"]:
    """The training images that a metric is fitted on: the gallery's, without those held out for the choices of kNN.

    Raises:
        ValueError: if they have fewer than 2 classes.
    """
    kept, _ = hold_out_some(labels, share=protocol.held_out, seed=protocol.seed, most=MOST_HELD_OUT)
    fitting = gallery.fitting[torch.isin(gallery.fitting, kept)]
    if len(labels[fitting].unique()) < 2:
        raise ValueError(
            "a metric is fitted on training images of 2 classes or more, and there are none beside the classes that "
            "are to stay unseen; leave more classes to it, or use metric=cosine"
        )
    return fitting
