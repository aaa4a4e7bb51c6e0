"""Measures every kind of features by the same tasks and the same protocol."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyviews.data import Report
from manyviews.evaluators.clustering import clustering
from manyviews.evaluators.distance import Cosine, MappedFeatures, Metric, is_fitted, map_features
from manyviews.evaluators.failures import OnFailure, catch_failure
from manyviews.evaluators.few_shot import measure_episodes
from manyviews.evaluators.fractions import FractionSettings, fractions
from manyviews.evaluators.knn import knn
from manyviews.evaluators.linear import linear
from manyviews.evaluators.protocol import Gallery, ProtocolSettings, fitting_images, refusals, searches
from manyviews.evaluators.results.intervals import mean_interval, paired_difference, weighted_difference, wilson
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
from manyviews.evaluators.retrieval import retrieve
from manyviews.evaluators.splits import Prediction, balanced_accuracy, num_classes, uneven
from manyviews.evaluators.verification import Pairs, draw_pairs, measure_pairs
from manyviews.features.placing import placed
from manyviews.linear_metrics import LinearMetric


class Inputs(NamedTuple):
    """One kind of features, and what its tasks take beside them."""

    kind: str
    train: Tensor | None
    test: Tensor
    mapped: MappedFeatures | None
    """Features that neighbours are searched in; None if the metric could not be fitted."""
    train_labels: Int[Tensor, " train"]
    test_labels: Int[Tensor, " test"]
    gallery: Int[Tensor, " gallery"]
    """Labelled test images that are compared with each other."""
    pairs: Pairs | None
    """Listed pairs to verify."""
    protocol: ProtocolSettings
    few: FractionSettings
    augmented: Callable[[str], Prediction] | None
    progress: Report | None


class Outcome(NamedTuple):
    """Measurements of one task on one kind of features, and its result for each image."""

    measurements: tuple[Measurement, ...]
    right: Bool[Tensor, " tested"] | None = None
    """Which images, or pairs, were right; None if nothing is right or wrong."""
    images: Int[Tensor, " tested"] | None = None
    """Which test images these are; None for pairs."""
    predictions: Int[Tensor, " tested"] | None = None
    shares: Float[Tensor, "2 images"] | None = None
    """What each image adds to the accuracy, and may add at most, if it was asked more than once."""


def compare(
    features: Mapping[str, tuple[Tensor | None, Tensor]],
    train_labels: Int[Tensor, " train"],
    test_labels: Int[Tensor, " test"],
    protocol: ProtocolSettings | None = None,
    *,
    tasks: Sequence[Task] = ("knn", "linear"),
    gallery: Gallery | None = None,
    pairs: Pairs | None = None,
    few: FractionSettings | None = None,
    metric: Metric | None = None,
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
    drawn pairs of the gallery; and `metric` to the cosine; `distances` replaces it for single kinds. `keep` gets
    each kind with its fitted metric. `augmented` returns the prediction of the probe on augmented images of a kind. If
    a task fails on a kind, `on_failure` is called and the kind is left out; without it the exception is raised.

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
    shown = gallery.images[test_labels[gallery.images] >= 0]
    by_metric = metric if any(map(searches, tasks)) else Cosine()
    fitting = fitting_images(gallery, train_labels, protocol) if is_fitted(by_metric) else gallery.fitting
    measurements: list[Measurement] = []
    right: dict[tuple[str, str], Tensor] = {}
    shares: dict[tuple[str, str], Tensor] = {}
    predictions: dict[str, Tensor] = {}
    hits: dict[str, Tensor] = {}
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
            mapped = map_features(used, train, test, train_labels, fitting, report=progress)
            if keep is not None and mapped.fitted is not None:
                keep(kind, mapped.fitted)
        labels = train_labels, test_labels
        inputs = Inputs(kind, train, test, mapped, *labels, shown, pairs, protocol, few, augmented, progress)
        for task in [task for task in get_args(Task) if task in tasks]:
            outcome: Outcome | None = None
            if report is not None and task not in PROBES and mapped is not None:
                report(f"{task} of {label(kind)} features")
            with catch_failure(task, kind, on_failure):
                outcome = _probe(task, inputs) if task in PROBES else _group(task, inputs)
            if outcome is None:
                continue
            measurements += outcome.measurements
            if outcome.right is not None:
                right[task, kind] = outcome.right
            if outcome.shares is not None:
                shares[task, kind] = outcome.shares
            for values, by_name in ((outcome.right, hits), (outcome.predictions, predictions)):
                if values is not None and outcome.images is not None:
                    of_all = by_name[f"{task}/{kind}"] = torch.full((len(test_labels),), -1)
                    of_all[outcome.images] = values.long()
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
    measurements.sort(key=lambda own: (TASKS.index(own.task), in_order(features, own.task).index(own.features)))
    compared = {"images": len(shown), "classes": test_labels[shown].unique().tolist(), "origin": gallery.origin}
    return Evaluation(tuple(measurements), tuple(differences), compared, predictions, hits)


def _check(kind: str, features: Tensor, labels: Tensor, split: str) -> None:
    if len(features) != len(labels):
        raise ValueError(f"{kind}: {len(features)} {split} features for {len(labels)} labels")
    if not torch.isfinite(features).all():
        raise ValueError(f"{kind}: some {split} features are not finite")


def _probe(task: Task, inputs: Inputs) -> Outcome | None:
    """Measures the accuracy of predicted classes; None if its features are missing."""
    kind, train, test, mapped, train_labels, test_labels, _, _, protocol, few, augmented, progress = inputs
    labelled = (test_labels >= 0).nonzero().squeeze(1)
    truth, classes = test_labels[labelled], num_classes(train_labels, test_labels)
    share, seed = protocol.held_out, protocol.seed

    def report(action: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{action}, {label(kind)} features", done, total)

    if train is None:
        return None
    if task == "fractions":
        return Outcome(
            fractions(train, train_labels, test, test_labels, classes, few, seed=seed, kind=kind, report=report)
        )
    if task == "knn" and mapped is not None and mapped.train is not None:
        result = knn(
            mapped.train,
            train_labels,
            mapped.test[labelled],
            classes,
            protocol.knn,
            share=share,
            seed=seed,
            nearness=mapped.nearness,
            shared=True,
        )
    elif task == "linear":
        tested = test[labelled]
        result = linear(train, train_labels, tested, classes, protocol.linear, share=share, seed=seed, report=report)
    elif task == "augmented" and augmented is not None:
        result = augmented(kind)
        result = result._replace(predictions=result.predictions[labelled])
    else:
        return None
    right = result.predictions == truth
    accuracy = Measurement(
        task,
        kind,
        "accuracy",
        int(right.sum()) / len(right),
        *wilson(int(right.sum()), len(right)),
        n=len(right),
        dim=train.shape[1],
        distance=mapped.metric if task == "knn" and mapped is not None else None,
        details={"validation": result.validation, "num_train": int((train_labels >= 0).sum()), **result.chosen},
    )
    measurements = [accuracy]
    if uneven(truth):
        value = balanced_accuracy(result.predictions, truth)
        measurements.append(replace(accuracy, metric="balanced accuracy", value=value, low=None, high=None, details={}))
    return Outcome(tuple(measurements), right, labelled, result.predictions)


def _group(task: Task, inputs: Inputs) -> Outcome | None:
    """Measures a task that compares test images with each other; None without their features."""
    mapped, shown, protocol = inputs.mapped, inputs.gallery, inputs.protocol
    if mapped is None:
        return None
    features, labels, nearness = mapped.test[shown], inputs.test_labels[shown], mapped.nearness
    how: dict[str, Any] = {"nearness": nearness, "distance": mapped.metric, "seed": protocol.seed}
    if task == "few_shot":
        measurements, shares = measure_episodes(inputs.kind, features, labels, protocol.few_shot, **how)
        return Outcome(measurements, shares=shares)
    if task == "verification":
        if (pairs := inputs.pairs) is None:
            pairs = draw_pairs(labels, protocol.verification, seed=protocol.seed)
            pairs = pairs._replace(images=shown[pairs.images])
        compared = mapped.test
        if mapped.train is not None and int(pairs.images.max()) >= len(compared):
            compared = torch.cat([compared, mapped.train.to(compared.device)])
        return Outcome(*measure_pairs(inputs.kind, compared, pairs, protocol.verification, **how))
    details: dict[str, Any] = {}
    rows: list[tuple[str, float, float | None, float | None, float | None]]
    right = images = None
    if task == "retrieval":
        # Recall@1 is the leading metric.
        grid = tuple(sorted({1, *protocol.retrieval.recall_at}))
        settings = protocol.retrieval.model_copy(update={"recall_at": grid})
        result = retrieve(features, labels, settings=settings, nearness=nearness)
        right, images, n = result.recall[0], shown[result.queries], len(result.queries)
        details = {"left_out": result.left_out}
        means = {"R-precision": result.r_precision, "MAP@R": result.map_at_r}
        means |= {f"NDCG@{k}": values for k, values in zip(settings.ndcg_at, result.ndcg, strict=True)}
        rows = [
            (f"Recall@{k}", hits.double().mean().item(), *wilson(int(hits.sum()), n), None)
            for k, hits in zip(grid, result.recall, strict=True)
        ]
        rows += [(name, values.mean().item(), *mean_interval(values), None) for name, values in means.items()]
    else:
        groups = clustering(features, labels, protocol.clustering, nearness=nearness, seed=protocol.seed)
        n = len(features)
        rows = [(name, value, None, None, None) for name, value in (("NMI", groups.nmi), ("AMI", groups.ami))]
    dim, distance = features.shape[1], mapped.metric
    measurements = tuple(
        Measurement(task, inputs.kind, name, value, low, high, n, deviation, dim, distance, details)
        for name, value, low, high, deviation in rows
    )
    return Outcome(measurements, right, images)
