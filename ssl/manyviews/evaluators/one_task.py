"""Measures one task on one kind of features."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyviews.data import Report
from manyviews.evaluators.clustering import measure_clusters
from manyviews.evaluators.distance import MappedFeatures
from manyviews.evaluators.few_shot import measure_episodes
from manyviews.evaluators.fractions import FractionSettings, fractions
from manyviews.evaluators.knn import knn
from manyviews.evaluators.linear import linear
from manyviews.evaluators.protocol import ProtocolSettings
from manyviews.evaluators.ranking import measure_ranking
from manyviews.evaluators.relevance import RankingExamples, Relevance
from manyviews.evaluators.results.intervals import mean_interval, wilson
from manyviews.evaluators.results.measurement import (
    Measurement,
    Task,
    label,
)
from manyviews.evaluators.retrieval import retrieve
from manyviews.evaluators.splits import Prediction, balanced_accuracy, num_classes, uneven
from manyviews.evaluators.verification import Pairs, draw_pairs, measure_pairs


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
    """Labelled test images that are compared with each other; all of them if none is labelled."""
    pairs: Pairs | None
    """Listed pairs to verify."""
    relevance: Relevance | None
    threshold: float | None
    """At which images are of one class, by an earlier verification."""
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
    values: Float[Tensor, " tested"] | None = None
    """Graded results of these images."""
    examples: RankingExamples | None = None


def probe(task: Task, inputs: Inputs) -> Outcome | None:
    """Measures the accuracy of predicted classes; None if its features are missing."""
    kind, train, test, mapped, train_labels, test_labels, *_, protocol, few, augmented, progress = inputs
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


def group(task: Task, inputs: Inputs) -> Outcome | None:
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
    if task == "ranking":
        assert inputs.relevance is not None
        ranked = measure_ranking(inputs.kind, mapped.test, inputs.relevance, protocol.ranking, **how)
        return Outcome(
            ranked.measurements, ranked.right, ranked.queries, values=ranked.values, examples=ranked.examples
        )
    if task == "clustering":
        classes = labels if bool((labels >= 0).any()) else None
        threshold = inputs.threshold
        measured, result = measure_clusters(
            inputs.kind, features, classes, protocol.clustering, threshold=threshold, **how
        )
        return Outcome(measured, images=shown, predictions=result.groups, values=result.distances)
    # Recall@1 is the leading metric.
    grid = tuple(sorted({1, *protocol.retrieval.recall_at}))
    settings = protocol.retrieval.model_copy(update={"recall_at": grid})
    retrieved = retrieve(features, labels, settings=settings, nearness=nearness)
    n, details = len(retrieved.queries), {"left_out": retrieved.left_out}
    means = {"R-precision": retrieved.r_precision, "MAP@R": retrieved.map_at_r}
    means |= {f"NDCG@{k}": values for k, values in zip(settings.ndcg_at, retrieved.ndcg, strict=True)}
    rows = [
        (f"Recall@{k}", hits.double().mean().item(), *wilson(int(hits.sum()), n))
        for k, hits in zip(grid, retrieved.recall, strict=True)
    ]
    rows += [(name, values.mean().item(), *mean_interval(values)) for name, values in means.items()]
    dim, distance = features.shape[1], mapped.metric
    measurements = tuple(
        Measurement(task, inputs.kind, name, value, low, high, n, None, dim, distance, details)
        for name, value, low, high in rows
    )
    return Outcome(measurements, retrieved.recall[0], shown[retrieved.queries])
