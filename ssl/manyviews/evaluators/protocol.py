"""The protocol of an evaluation, and the tasks that the labels rule out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int, Int64
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.evaluators.augmented import AugmentedSettings
from manyviews.evaluators.clustering import ClusteringSettings
from manyviews.evaluators.distance import Metric, is_fitted, takes_classes
from manyviews.evaluators.few_shot import FewShotSettings, refuse_episodes
from manyviews.evaluators.knn import MOST_HELD_OUT, KnnSettings
from manyviews.evaluators.linear import LinearSettings
from manyviews.evaluators.ranking import RankingSettings
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
    ranking: RankingSettings = RankingSettings()
    clustering: ClusteringSettings = ClusteringSettings()
    verification: VerificationSettings = VerificationSettings()
    few_shot: FewShotSettings = FewShotSettings()
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of each class's training images that is held out to choose k, temperature and regularisation."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of that sample, of the queries of ranking, the starts of k-means, the pairs of verification and the episodes
    of few_shot."""


class Gallery(NamedTuple):
    """The test images that retrieval, ranking, clustering, verification and few_shot compare with each other."""

    images: Int64[Tensor, " gallery"]
    origin: str
    """A remark on their classes, such as "never seen in training"."""
    fitting: Int64[Tensor, " fitting"]
    """Ids of the training images that a metric may be fitted on: of other classes, if these are to be unseen."""


WITHOUT_LABELS: frozenset[Task] = frozenset({"ranking", "clustering"})
"""Tasks that need no labels; what they take instead is looked for elsewhere."""


def refusals(
    tasks: Sequence[Task],
    gallery: Gallery,
    train_labels: Int[Tensor, " train"],
    test_labels: Int[Tensor, " test"],
    protocol: ProtocolSettings,
    metric: Metric | None,
    *,
    listed: bool = False,
) -> dict[Task, str]:
    """Returns the tasks that these labels make impossible, in order, each with the reason.

    `listed` is whether pairs to verify are given, for which no labels are needed.
    """
    labels = test_labels[gallery.images]
    labels = labels[labels >= 0]
    reasons: dict[Task, str] = {}
    by_labels = [task for task in tasks if task not in WITHOUT_LABELS or (task == "clustering" and len(labels))]
    by_labels = [task for task in by_labels if task != "verification" or not listed]
    labelled = bool((test_labels >= 0).any())
    if not labelled:
        reasons |= dict.fromkeys(by_labels, "no test image has a label")
    by_distance = [task for task in tasks if searches(task)]
    if takes_classes(metric) and by_distance:
        try:
            fitting_images(gallery, train_labels, protocol)
        except ValueError as problem:
            reasons |= dict.fromkeys(by_distance, str(problem))
    classes = len(labels.unique())
    if labelled and classes < 2:
        reason = (
            f"{plural(len(labels), 'test image')} of {plural(classes, 'class', 'classes')} are to be compared with "
            "each other; name 2 classes or more"
        )
        reasons |= dict.fromkeys(GROUPING & set(by_labels), reason)
    elif labelled:
        checks: dict[Task, Callable[[], object]] = {
            "verification": lambda: draw_pairs(labels, protocol.verification, seed=protocol.seed),
            "few_shot": lambda: refuse_episodes(labels, protocol.few_shot),
        }
        for task, check in checks.items():
            if task in by_labels:
                try:
                    check()
                except ValueError as problem:
                    reasons[task] = str(problem)
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
