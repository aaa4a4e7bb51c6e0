"""The tasks that take labels, each on one kind of features: what it measured, and which images were right."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor

from manyviews.evaluators.clustering import clustering
from manyviews.evaluators.distance import MappedFeatures, Report
from manyviews.evaluators.knn import knn
from manyviews.evaluators.linear import linear
from manyviews.evaluators.protocol import PROBES, ProtocolSettings, Task
from manyviews.evaluators.results.intervals import mean_interval, wilson
from manyviews.evaluators.results.kinds import LAYERS, label
from manyviews.evaluators.results.measurement import Measurement
from manyviews.evaluators.retrieval import RetrievalSettings, retrieve
from manyviews.evaluators.splits import Prediction, balanced_accuracy, num_classes, uneven
from manyviews.evaluators.verification import draw_pairs, verify


class Outcome(NamedTuple):
    """What a task has measured on one kind of features."""

    measurements: tuple[Measurement, ...]
    right: Bool[Tensor, " asked"] | None = None
    """Which images, or pairs, were right; None where nothing is right or wrong."""
    images: Int[Tensor, " asked"] | None = None
    """Which test images these are; None for pairs."""
    guesses: Int[Tensor, " asked"] | None = None
    """The classes that were predicted."""


class Inputs(NamedTuple):
    """What tasks are given beside features: the same for every kind."""

    train_labels: Int[Tensor, " train"]
    test_labels: Int[Tensor, " test"]
    shown: Int[Tensor, " shown"]
    """Which labelled test images are compared with each other."""
    protocol: ProtocolSettings
    augmented: Callable[[str], Prediction] | None
    """The probe on augmented images of a kind of features."""
    progress: Report | None


def measure(
    task: Task, kind: str, features: tuple[Tensor | None, Tensor], searched: MappedFeatures | None, inputs: Inputs
) -> Outcome | None:
    """Measures one task on features of training and test images; None where it lacks the features it needs."""
    train, test = features
    if task in PROBES:
        return None if train is None else probe(task, kind, (train, test), searched, inputs)
    return None if searched is None else group(task, kind, searched, inputs)


def probe(
    task: Task, kind: str, features: tuple[Tensor, Tensor], searched: MappedFeatures | None, inputs: Inputs
) -> Outcome | None:
    """The accuracy of a task that predicts the classes of labelled test images; None where it lacks its input."""
    train_labels, test_labels, _, protocol, augmented, progress = inputs
    labelled = (test_labels >= 0).nonzero().squeeze(1)
    truth, classes = test_labels[labelled], num_classes(train_labels, test_labels)
    share, seed, dim = protocol.held_out, protocol.seed, features[0].shape[1]

    def report(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{what}, {label(kind)} features", done, total)

    if task == "knn" and searched is not None and searched.train is not None:
        found = knn(
            searched.train,
            train_labels,
            searched.test[labelled],
            classes,
            protocol.knn,
            share=share,
            seed=seed,
            nearness=searched.nearness,
            shared=True,
        )
    elif task == "linear":
        train, test = features[0], features[1][labelled]
        found = linear(train, train_labels, test, classes, protocol.linear, share=share, seed=seed, report=report)
    elif task == "augmented" and augmented is not None:
        found = augmented(kind)
        found = found._replace(predictions=found.predictions[labelled])
    else:
        return None
    right = found.predictions == truth
    details = {"validation": found.validation, "num_train": int((train_labels >= 0).sum()), **found.chosen}
    accuracy = Measurement(
        task,
        kind,
        "accuracy",
        int(right.sum()) / len(right),
        *wilson(int(right.sum()), len(right)),
        n=len(right),
        dim=dim,
        layer=LAYERS.get(kind),
        distance=searched.metric if task == "knn" and searched is not None else None,
        details=details,
    )
    measurements = [accuracy]
    if uneven(truth):
        value = balanced_accuracy(found.predictions, truth)
        measurements.append(replace(accuracy, metric="balanced accuracy", value=value, low=None, high=None, details={}))
    return Outcome(tuple(measurements), right, labelled, found.predictions)


def group(task: Task, kind: str, searched: MappedFeatures, inputs: Inputs) -> Outcome:
    """What a task measures that compares test images with each other."""
    shown, protocol = inputs.shown, inputs.protocol
    features, nearness, labels = searched.test[shown], searched.nearness, inputs.test_labels[shown]
    details: dict[str, Any] = {}
    intervals: dict[str, tuple[float | None, float | None]] = {}
    deviations: dict[str, float] = {}
    right = images = None
    if task == "retrieval":
        # Recall@1 is what features are compared by.
        grid = tuple(sorted({1, *protocol.retrieval.recall_at}))
        settings: RetrievalSettings = protocol.retrieval.model_copy(update={"recall_at": grid})
        result = retrieve(features, labels, settings=settings, nearness=nearness)
        right, images, n = result.recall[0], shown[result.queries], len(result.queries)
        details = {"left_out": result.left_out}
        recalls = {f"Recall@{k}": hits for k, hits in zip(grid, result.recall, strict=True)}
        means = {"R-precision": result.r_precision, "MAP@R": result.map_at_r}
        means |= {f"NDCG@{k}": found for k, found in zip(settings.ndcg_at, result.ndcg, strict=True)}
        values = {name: found.double().mean().item() for name, found in (recalls | means).items()}
        intervals = {name: wilson(int(hits.sum()), n) for name, hits in recalls.items()}
        intervals |= {name: mean_interval(found) for name, found in means.items()}
    elif task == "clustering":
        groups = clustering(features, labels, protocol.clustering, nearness=nearness, seed=protocol.seed)
        values, n = {"NMI": groups.nmi, "AMI": groups.ami}, len(features)
    else:
        pairs = draw_pairs(labels, protocol.verification, seed=protocol.seed)
        judged = verify(features, pairs, protocol.verification, nearness=nearness)
        right, n = judged.correct, len(judged.correct)
        accepts = {f"TAR@FAR={rate:g}": found for rate, found in judged.true_accepts.items()}
        values = {"accuracy": judged.accuracy, "AUC": judged.auc} | {name: own.mean for name, own in accepts.items()}
        deviations = {"accuracy": judged.deviation} | {name: own.deviation for name, own in accepts.items()}
    measurements = []
    for name, value in values.items():
        low, high = intervals.get(name, (None, None))
        deviation = deviations.get(name)
        where = (features.shape[1], LAYERS.get(kind), searched.metric)
        measurements.append(Measurement(task, kind, name, value, low, high, n, deviation, *where, details))
    return Outcome(tuple(measurements), right, images)
