"""Measures every kind of features by the same tasks and the same protocol."""

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import torch
from jaxtyping import Int
from torch import Tensor

from manyviews.data import Report
from manyviews.evaluators.distance import Cosine, MappedFeatures, Metric, MetricPairs, map_features, takes_classes
from manyviews.evaluators.failures import OnFailure, catch_failure
from manyviews.evaluators.fractions import FractionSettings
from manyviews.evaluators.one_task import Inputs, Outcome, group, probe
from manyviews.evaluators.protocol import Gallery, ProtocolSettings, fitting_images, refusals, searches
from manyviews.evaluators.ranking import leads_of_rankings
from manyviews.evaluators.relevance import RankingExamples, Relevance
from manyviews.evaluators.results.intervals import paired_difference, weighted_difference
from manyviews.evaluators.results.measurement import (
    PROBES,
    TASKS,
    Difference,
    Evaluation,
    Measurement,
    Task,
    in_order,
    is_learned,
    label,
)
from manyviews.evaluators.splits import Prediction
from manyviews.evaluators.verification import Pairs
from manyviews.features.placing import placed
from manyviews.linear_metrics import LinearMetric


def compare(
    features: Mapping[str, tuple[Tensor | None, Tensor]],
    train_labels: Int[Tensor, " train"],
    test_labels: Int[Tensor, " test"],
    protocol: ProtocolSettings | None = None,
    *,
    tasks: Sequence[Task] = ("knn", "linear"),
    gallery: Gallery | None = None,
    pairs: Pairs | None = None,
    relevance: Relevance | None = None,
    thresholds: Mapping[str, float] | None = None,
    few: FractionSettings | None = None,
    metric: Metric | None = None,
    metric_pairs: MetricPairs | None = None,
    distances: Mapping[str, Metric] | None = None,
    keep: Callable[[str, LinearMetric], object] | None = None,
    augmented: Callable[[str], Prediction] | None = None,
    report: Callable[[str], object] | None = None,
    progress: Report | None = None,
    on_failure: OnFailure | None = None,
) -> Evaluation:
    """Measures every kind of features by the same tasks and the same protocol.

    Collective: all ranks pass the same features and get the same evaluation; they share the search for neighbours.
    Test labels meet predictions at the very end; nothing is chosen by them. Images labelled −1 are left out. A metric
    is fitted on the gallery's training images without those that are held out for the choice of k and temperature:
    images that it has already pulled together would spoil that choice. The linear probes do not use the metric. Where
    there is a GPU with room for the features of a kind, they are measured on it.

    `features` holds, by kind, those of training [train, dim] and test images [test, dim]. The leading kind (see
    `in_order`) is compared with each other one; training features may be None if no task takes them (`takes_training`).
    `gallery` defaults to all test images; `pairs`, by positions in the test images and then the training images, to
    drawn pairs of the gallery; and `metric` to the cosine; `distances` replaces it for single kinds. A metric that
    names a file of relations is fitted on `metric_pairs`. `relevance` is what rankings are judged by, `thresholds`
    those of an earlier verification for k=threshold, by kind. `keep` gets each kind with its fitted metric.
    `augmented` returns the prediction of the probe on augmented images of a kind. If a task fails on a kind,
    `on_failure` is called and the kind is left out; without it the exception is raised.

    Raises:
        ValueError: if features and labels differ in number, features are not finite, no test image has a label, or the
            gallery has fewer than 2 classes.
    """
    protocol, few, metric = protocol or ProtocolSettings(), few or FractionSettings(), metric or Cosine()
    if gallery is None:
        gallery = Gallery(torch.arange(len(test_labels)), "seen in training", torch.arange(len(train_labels)))
    listed = pairs is not None
    for reason in refusals(tasks, gallery, train_labels, test_labels, protocol, metric, listed=listed).values():
        raise ValueError(reason)
    labelled = gallery.images[test_labels[gallery.images] >= 0]
    shown = labelled if len(labelled) else gallery.images
    by_metric = metric if any(map(searches, tasks)) else Cosine()
    fitting = fitting_images(gallery, train_labels, protocol) if takes_classes(by_metric) else gallery.fitting
    measurements: list[Measurement] = []
    right: dict[tuple[str, str], Tensor] = {}
    shares: dict[tuple[str, str], Tensor] = {}
    predictions: dict[str, Tensor] = {}
    hits: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    examples: dict[str, RankingExamples] = {}
    for kind, (train, test) in features.items():
        if train is not None:
            train = placed(train, 2)
            _check(kind, train, train_labels, "training")
        test = placed(test)
        _check(kind, test, test_labels, "test")
        if report is not None:
            report(f"measuring {label(kind)} features: {test.shape[1]:,} numbers for each image")
        used = (distances or {}).get(kind, by_metric)
        mapped: MappedFeatures | None = None
        with catch_failure(f"metric={used.name}", kind, on_failure):
            mapped = map_features(used, train, test, train_labels, fitting, pairs=metric_pairs, report=progress)
            if keep is not None and mapped.fitted is not None:
                keep(kind, mapped.fitted)
        labels = train_labels, test_labels
        of_kind = kind, train, test, mapped
        limit = (thresholds or {}).get(kind)
        inputs = Inputs(*of_kind, *labels, shown, pairs, relevance, limit, protocol, few, augmented, progress)
        for task in [task for task in get_args(Task) if task in tasks]:
            outcome: Outcome | None = None
            if report is not None and task not in PROBES and mapped is not None:
                report(f"{task} of {label(kind)} features")
            with catch_failure(task, kind, on_failure):
                outcome = probe(task, inputs) if task in PROBES else group(task, inputs)
            if outcome is None:
                continue
            measurements += outcome.measurements
            if outcome.right is not None:
                right[task, kind] = outcome.right
            if outcome.shares is not None:
                shares[task, kind] = outcome.shares
            for numbers, by_name in ((outcome.right, hits), (outcome.predictions, predictions)):
                if numbers is not None and outcome.images is not None:
                    of_all = by_name[f"{task}/{kind}"] = torch.full((len(test_labels),), -1)
                    of_all[outcome.images] = numbers.long()
            if outcome.values is not None and outcome.images is not None:
                of_all = values[f"{task}/{kind}"] = torch.full((len(test_labels),), torch.nan)
                of_all[outcome.images] = outcome.values.float()
            if outcome.examples is not None:
                examples[kind] = outcome.examples
    differences: list[Difference] = []
    for task in get_args(Task):
        first, *others = in_order(features, task)
        # The baselines, then the other layer.
        differences += [
            Difference(first, other, task, *paired_difference(right[task, first], right[task, other]))
            for other in sorted(others, key=is_learned)
            if (task, first) in right and (task, other) in right
        ]
        for other in sorted(others, key=is_learned):
            if (task, first) in shares and (task, other) in shares:
                (own, weights), (others_own, _) = shares[task, first], shares[task, other]
                differences.append(Difference(first, other, task, *weighted_difference(own, others_own, weights)))
    differences += leads_of_rankings(values, in_order(features, "ranking"), seed=protocol.seed)
    measurements.sort(key=lambda own: (TASKS.index(own.task), in_order(features, own.task).index(own.features)))
    compared = {"images": len(shown), "classes": test_labels[labelled].unique().tolist(), "origin": gallery.origin}
    return Evaluation(tuple(measurements), tuple(differences), compared, predictions, hits, values, examples)


def _check(kind: str, features: Tensor, labels: Tensor, split: str) -> None:
    if len(features) != len(labels):
        raise ValueError(f"{kind}: {len(features)} {split} features for {len(labels)} labels")
    if not torch.isfinite(features).all():
        raise ValueError(f"{kind}: some {split} features are not finite")
