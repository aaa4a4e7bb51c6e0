"""Every kind of features measured by the same tasks and the same protocol."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from manyviews.evaluators import measurement as tell
from manyviews.evaluators.alone import Failed, alone
from manyviews.evaluators.augmented import AugmentedResult
from manyviews.evaluators.clustering import clustering
from manyviews.evaluators.intervals import paired_difference, wilson
from manyviews.evaluators.kinds import LAYERS, in_order, is_learned, label, leading
from manyviews.evaluators.knn import MOST_HELD_OUT, knn
from manyviews.evaluators.learned_distance import Cosine, Measured, Metric, Report, apply, is_fitted
from manyviews.evaluators.linear import linear
from manyviews.evaluators.measurement import LEADING, Figures, Grouping
from manyviews.evaluators.protocol import Gallery, ProtocolSettings, Task
from manyviews.evaluators.retrieval import retrieve
from manyviews.evaluators.scores import COMPARED, Difference, Evaluation, Method, Score
from manyviews.evaluators.splits import balanced_accuracy, hold_out_some, num_classes, uneven
from manyviews.evaluators.verification import draw_pairs, verify
from manyviews.linear_metrics import LinearMetric
from manyviews.system.plural import plural

PROBES: tuple[Task, ...] = ("knn", "linear", "augmented")
"""Tasks that predict the classes of test images; those of `LEADING` compare test images with each other."""


def compare(
    features: Mapping[str, tuple[Tensor | None, Tensor]],
    train_labels: Int[Tensor, " train"],
    test_labels: Int[Tensor, " test"],
    protocol: ProtocolSettings | None = None,
    *,
    tasks: Sequence[Task] = ("knn", "linear"),
    gallery: Gallery | None = None,
    metric: Metric | None = None,
    distances: Mapping[str, Metric] | None = None,
    keep: Callable[[str, LinearMetric], object] | None = None,
    augmented: Callable[[str], AugmentedResult] | None = None,
    report: Callable[[str], object] | None = None,
    progress: Report | None = None,
    failed: Failed | None = None,
) -> Evaluation:
    """Measures every kind of features by the same tasks and the same protocol.

    All processes come together, with the same features, and get the same evaluation: neighbours are searched by all.
    Test labels meet predictions at the very end; nothing is chosen by them. Images labelled −1 are left out. A fitted
    metric sees the gallery's training images without those that are held out for the choice of k and temperature, so
    that the choice is not made on images that it has already pulled together; the linear probe does without it.

    Args:
        features: by kind, those of the training [train, dim] and of the test images [test, dim]; the leading kind (see
            `kinds.leading`) is compared with each other one. Where no task takes training images (see
            `takes_training`) they may be None.
        train_labels: classes of the training images.
        test_labels: classes of the test images.
        protocol: grids, share held out, seed.
        tasks: what is measured.
        gallery: which test images are compared with each other; all without.
        metric: the distance by which neighbours are found; the cosine without.
        distances: the distance of some kinds, in its stead.
        keep: given each fitted metric, by kind of features.
        augmented: the probe on augmented images of a kind of features, which takes its backbone; if it is a task.
        report: told what is measured next.
        progress: told how far a fit has come.
        failed: called where a task fails on a kind of features, which then lacks it; without, that is raised.

    Raises:
        ValueError: if features and labels do not match in number, are not finite, no test image has a label, or the
            gallery has fewer than 2 classes.
    """
    protocol, metric = protocol or ProtocolSettings(), metric or Cosine()
    everything = Gallery(torch.arange(len(test_labels)), "seen in training", torch.arange(len(train_labels)))
    gallery = gallery or everything
    check(tasks, gallery, train_labels, test_labels, protocol, metric)
    labelled = (test_labels >= 0).nonzero().squeeze(1)
    shown = gallery.images[test_labels[gallery.images] >= 0]
    facts = {"images": len(shown), "classes": test_labels[shown].unique().tolist(), "origin": gallery.origin}
    # The probes do without it.
    by_metric = metric if set(tasks) - {"linear", "augmented"} else Cosine()
    fitting = _fitting(gallery, train_labels, protocol) if is_fitted(by_metric) else gallery.fitting
    scores: list[Score] = []
    figures: list[Figures] = []
    hits: dict[tuple[Task, str], Tensor] = {}
    predictions: dict[str, Tensor] = {}
    of_each: dict[str, Tensor] = {}
    for kind, (train, test) in features.items():
        if train is not None:
            _check(kind, train, train_labels, "training")
        _check(kind, test, test_labels, "test")
        if report is not None:
            report(f"measuring {label(kind)} features: {test.shape[1]:,} numbers for each image")
        used, layer = (distances or {}).get(kind, by_metric), LAYERS.get(kind)
        measured: Measured | None = None
        with alone(f"metric={used.name}", kind, failed):
            measured = apply(used, train, test, train_labels, fitting, report=progress)
            if keep is not None and measured.fitted is not None:
                keep(kind, measured.fitted)
        truth = test_labels[labelled]
        for task in PROBES:
            if task not in tasks or train is None:
                continue
            with alone(task, kind, failed):
                found = _classified(
                    task, kind, (train, test), measured, train_labels, test_labels, protocol, augmented, progress
                )
                if found is not None:
                    score, guesses = found
                    scores.append(
                        replace(
                            score,
                            layer=layer,
                            metric=used.name if task == "knn" else None,
                            balanced=balanced_accuracy(guesses, truth) if uneven(truth) else None,
                        )
                    )
                    right = hits[task, kind] = guesses == truth
                    predictions[f"{task}/{kind}"] = _among(guesses, labelled, len(test_labels))
                    of_each[f"{task}/{kind}"] = _among(right, labelled, len(test_labels))
        for grouping in LEADING:
            if grouping not in tasks or measured is None:
                continue
            if report is not None:
                report(f"{grouping} of {label(kind)} features")
            with alone(grouping, kind, failed):
                own, correct, queries = _grouped(grouping, kind, measured, shown, test_labels[shown], protocol)
                figures.append(replace(own, layer=layer, metric=used.name))
                if correct is not None:
                    hits[grouping, kind] = correct
                if correct is not None and queries is not None:
                    of_each[f"{grouping}/{kind}"] = _among(correct, shown[queries], len(test_labels))
    differences: list[Difference] = []
    for task in COMPARED:
        first, *others = in_order(features, task)
        # The baselines, then the other layer.
        differences += [
            Difference(first, other, task, *paired_difference(hits[task, first], hits[task, other]))
            for other in sorted(others, key=is_learned)
            if (task, first) in hits and (task, other) in hits
        ]
    scores.sort(key=lambda own: own.features != leading(features))
    order = list(LEADING)
    figures.sort(key=lambda own: order.index(own.task))
    return Evaluation(protocol, metric, tuple(scores), tuple(figures), tuple(differences), facts, predictions, of_each)


def check(
    tasks: Sequence[Task],
    gallery: Gallery,
    train_labels: Int[Tensor, " train"],
    test_labels: Int[Tensor, " test"],
    protocol: ProtocolSettings,
    metric: Metric | None,
) -> None:
    """Refuses what the labels alone show to be impossible, before any image is encoded.

    Raises:
        ValueError: if no test image has a label, the gallery has fewer than 2 classes, or too few pairs for
            verification, or a metric has fewer than 2 classes to be fitted on.
    """
    for reason in refusals(tasks, gallery, train_labels, test_labels, protocol, metric).values():
        raise ValueError(reason)


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
        found |= {task: reason for task in LEADING if task in tasks}
    elif "verification" in tasks:
        try:
            draw_pairs(labels, protocol.verification, seed=protocol.seed)
        except ValueError as problem:
            found["verification"] = str(problem)
    if metric is not None and is_fitted(metric) and set(tasks) - {"linear", "augmented"}:
        try:
            _fitting(gallery, train_labels, protocol)
        except ValueError as problem:
            found |= {task: str(problem) for task in tasks if task not in ("linear", "augmented", *found)}
    return {task: found[task] for task in tasks if task in found}


def takes_training(tasks: Sequence[Task], metric: Metric | None) -> bool:
    """Whether the features of training images are needed."""
    return bool({"knn", "linear", "augmented"} & set(tasks)) or (metric is not None and is_fitted(metric))


def _fitting(gallery: Gallery, labels: Tensor, protocol: ProtocolSettings) -> Tensor:
    kept, _ = hold_out_some(labels, share=protocol.held_out, seed=protocol.seed, most=MOST_HELD_OUT)
    fitting = gallery.fitting[torch.isin(gallery.fitting, kept)]
    if len(labels[fitting].unique()) < 2:
        raise ValueError(
            "a metric is fitted on training images of 2 classes or more, and there are none beside the classes that "
            "are to stay unseen; leave more classes to it, or use metric=cosine"
        )
    return fitting


def _classified(
    task: Task,
    kind: str,
    features: tuple[Tensor, Tensor],
    measured: Measured | None,
    train_labels: Tensor,
    test_labels: Tensor,
    protocol: ProtocolSettings,
    augmented: Callable[[str], AugmentedResult] | None,
    progress: Report | None,
) -> tuple[Score, Tensor] | None:
    """The score of a task that predicts classes, with those of the labelled test images; None where it has no input."""
    labelled = test_labels >= 0
    truth, classes = test_labels[labelled], num_classes(train_labels, test_labels)
    share, seed = protocol.held_out, protocol.seed
    num_train, dim = int((train_labels >= 0).sum()), features[0].shape[1]
    counts = {"num_train": num_train, "num_test": len(truth), "dim": dim}
    if task == "knn" and measured is not None and measured.train is not None:
        near = knn(
            measured.train,
            train_labels,
            measured.test[labelled],
            classes,
            protocol.knn,
            share=share,
            seed=seed,
            nearness=measured.nearness,
            shared=True,
        )
        chosen = {"neighbours": near.neighbours, "temperature": near.temperature}
        return _score(kind, "knn", near.predictions == truth, near.validation, counts, chosen), near.predictions
    if task == "linear":

        def report(what: str, done: int, total: int) -> None:
            if progress is not None:
                progress(f"{what}, {label(kind)} features", done, total)

        train, test = features[0], features[1][labelled]
        probe = linear(train, train_labels, test, classes, protocol.linear, share=share, seed=seed, report=report)
        chosen = {"regularisation": probe.regularisation}
        return _score(kind, "linear", probe.predictions == truth, probe.validation, counts, chosen), probe.predictions
    if task == "augmented" and augmented is not None:
        on_crops = augmented(kind)
        guesses, chosen = on_crops.predictions[labelled], {"rate": on_crops.rate, "decay": on_crops.decay}
        return _score(kind, "augmented", guesses == truth, on_crops.validation, counts, chosen), guesses
    return None


def _grouped(
    task: Grouping, kind: str, measured: Measured, shown: Tensor, labels: Tensor, protocol: ProtocolSettings
) -> tuple[Figures, Tensor | None, Tensor | None]:
    """The figures of a task among test images, which queries or pairs were right, and which images the queries."""
    gallery, dim, nearness = measured.test[shown], measured.test.shape[1], measured.nearness
    if task == "retrieval":
        # Recall@1 is what features are compared by.
        grid = tuple(sorted({1, *protocol.retrieval.recall_at}))
        looked_at = protocol.retrieval.model_copy(update={"recall_at": grid})
        result = retrieve(gallery, labels, settings=looked_at, nearness=nearness)
        return tell.of_retrieval(kind, dim, result, looked_at), result.recall[0], result.queries
    if task == "clustering":
        groups = clustering(gallery, labels, protocol.clustering, nearness=nearness, seed=protocol.seed)
        return tell.of_clustering(kind, dim, groups, len(gallery)), None, None
    pairs = draw_pairs(labels, protocol.verification, seed=protocol.seed)
    judged = verify(gallery, pairs, protocol.verification, nearness=nearness)
    return tell.of_verification(kind, dim, judged), judged.correct, None


def _score(
    kind: str, method: Method, hits: Tensor, validation: float, counts: Mapping[str, Any], chosen: Mapping[str, Any]
) -> Score:
    correct = int(hits.sum())
    low, high = wilson(correct, len(hits))
    return Score(kind, method, correct / len(hits), low, high, validation, **counts, **chosen)


def _among(values: Tensor, images: Tensor, count: int) -> Tensor:
    """Values of some of the images, at their places among all; −1 elsewhere."""
    placed = torch.full((count,), -1)
    placed[images] = values.long()
    return placed


def _check(kind: str, features: Tensor, labels: Tensor, split: str) -> None:
    if len(features) != len(labels):
        raise ValueError(f"{kind}: {len(features)} {split} features for {len(labels)} labels")
    if not torch.isfinite(features).all():
        raise ValueError(f"{kind}: some {split} features are not finite")
