"""Every kind of features measured by the same tasks and the same protocol."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from contrastive.distances import LinearMetric
from contrastive.evaluate import figures as tell
from contrastive.evaluate.augmented import AugmentedResult
from contrastive.evaluate.clustering import clustering
from contrastive.evaluate.figures import Figures
from contrastive.evaluate.held_out import hold_out, num_classes
from contrastive.evaluate.intervals import paired_difference, wilson
from contrastive.evaluate.kinds import GROUPING, LAYERS, in_order, is_learned, leading
from contrastive.evaluate.knn import MOST_HELD_OUT, knn
from contrastive.evaluate.linear import linear
from contrastive.evaluate.metric import Cosine, Measured, Metric, Report, apply, is_fitted
from contrastive.evaluate.protocol import Gallery, ProtocolSettings, Task
from contrastive.evaluate.retrieval import retrieve
from contrastive.evaluate.scores import COMPARED, Difference, Evaluation, Method, Score
from contrastive.evaluate.verification import draw_pairs, verify


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
    fitting = _fitting(gallery, train_labels, protocol) if is_fitted(metric) else gallery.fitting
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
            report(f"measuring {kind} features: {test.shape[1]} numbers for each image")
        used = (distances or {}).get(kind, metric)
        measured = apply(used, train, test, train_labels, fitting, report=progress)
        if keep is not None and measured.fitted is not None:
            keep(kind, measured.fitted)
        if train is not None:
            found = _classify(kind, (train, test[labelled]), measured, train_labels, test_labels, tasks, protocol)
            truth = test_labels[labelled]
            if "augmented" in tasks and augmented is not None:
                found.append(_augmented(kind, augmented(kind), truth, labelled, train_labels, test.shape[1]))
            for score, guesses in found:
                by = used.name if score.method == "knn" else None
                scores.append(replace(score, layer=LAYERS.get(kind), metric=by))
                right = hits[score.method, kind] = guesses == truth
                predictions[f"{score.method}/{kind}"] = _among(guesses, labelled, len(test_labels))
                of_each[f"{score.method}/{kind}"] = _among(right, labelled, len(test_labels))
        for own, correct, queries in _group(kind, measured, shown, test_labels[shown], tasks, protocol):
            figures.append(replace(own, layer=LAYERS.get(kind), metric=used.name))
            if correct is not None:
                hits[own.task, kind] = correct
            if correct is not None and queries is not None:
                of_each[f"{own.task}/{kind}"] = _among(correct, shown[queries], len(test_labels))
    differences: list[Difference] = []
    for task in COMPARED:
        first, *others = in_order(features, task)
        # The baselines, then the other layer.
        differences += [
            Difference(first, other, task, *paired_difference(hits[task, first], hits[task, other]))
            for other in sorted(others, key=is_learned)
            if (task, first) in hits
        ]
    scores.sort(key=lambda own: own.features != leading(features))
    order = list(dict.fromkeys(own.task for own in figures))
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
    if not len(test_labels) or int(test_labels.max()) < 0:
        raise ValueError("no test image has a label")
    labels = test_labels[gallery.images]
    labels = labels[labels >= 0]
    classes = len(labels.unique())
    if GROUPING & set(tasks) and classes < 2:
        raise ValueError(
            f"{len(labels)} test images of {classes} class{'' if classes == 1 else 'es'} are to be compared with each "
            "other; name 2 classes or more"
        )
    if "verification" in tasks:
        draw_pairs(labels, protocol.verification, seed=protocol.seed)
    if metric is not None and is_fitted(metric):
        _fitting(gallery, train_labels, protocol)


def takes_training(tasks: Sequence[Task], metric: Metric | None) -> bool:
    """Whether the features of training images are needed."""
    return bool({"knn", "linear", "augmented"} & set(tasks)) or (metric is not None and is_fitted(metric))


def _fitting(gallery: Gallery, labels: Tensor, protocol: ProtocolSettings) -> Tensor:
    kept, _ = hold_out(labels, share=protocol.held_out, seed=protocol.seed, most=MOST_HELD_OUT)
    fitting = gallery.fitting[torch.isin(gallery.fitting, kept)]
    if len(labels[fitting].unique()) < 2:
        raise ValueError(
            "a metric is fitted on training images of 2 classes or more, and there are none beside the classes that "
            "are to stay unseen; leave more classes to it, or use metric=cosine"
        )
    return fitting


def _classify(
    kind: str,
    features: tuple[Tensor, Tensor],
    measured: Measured,
    train_labels: Tensor,
    test_labels: Tensor,
    tasks: Sequence[Task],
    protocol: ProtocolSettings,
) -> list[tuple[Score, Tensor]]:
    """The scores of kNN and of the linear probe, each with the predicted classes of the labelled test images."""
    labelled = test_labels >= 0
    truth, classes = test_labels[labelled], num_classes(train_labels, test_labels)
    num_train, share, seed = int((train_labels >= 0).sum()), protocol.held_out, protocol.seed
    counts = {"num_train": num_train, "num_test": len(truth), "dim": features[0].shape[1]}
    found = []
    if "knn" in tasks:
        assert measured.train is not None
        test = measured.test[labelled]
        near = knn(
            measured.train,
            train_labels,
            test,
            classes,
            protocol.knn,
            share=share,
            seed=seed,
            nearness=measured.nearness,
            shared=True,
        )
        right = near.predictions == truth
        chosen = {"neighbours": near.neighbours, "temperature": near.temperature}
        found.append((_score(kind, "knn", right, near.validation, counts, chosen), near.predictions))
    if "linear" in tasks:
        probe = linear(features[0], train_labels, features[1], classes, protocol.linear, share=share, seed=seed)
        right = probe.predictions == truth
        chosen = {"regularisation": probe.regularisation}
        found.append((_score(kind, "linear", right, probe.validation, counts, chosen), probe.predictions))
    return found


def _augmented(
    kind: str, probe: AugmentedResult, truth: Tensor, labelled: Tensor, train_labels: Tensor, dim: int
) -> tuple[Score, Tensor]:
    counts = {"num_train": int((train_labels >= 0).sum()), "num_test": len(truth), "dim": dim}
    guesses, chosen = probe.predictions[labelled], {"rate": probe.rate, "decay": probe.decay}
    return _score(kind, "augmented", guesses == truth, probe.validation, counts, chosen), guesses


def _group(
    kind: str, measured: Measured, shown: Tensor, labels: Tensor, tasks: Sequence[Task], protocol: ProtocolSettings
) -> list[tuple[Figures, Tensor | None, Tensor | None]]:
    """The figures of the tasks among test images, which queries or pairs were right, and which images the queries."""
    gallery, dim, nearness = measured.test[shown], measured.test.shape[1], measured.nearness
    found: list[tuple[Figures, Tensor | None, Tensor | None]] = []
    if "retrieval" in tasks:
        # Recall@1 is what features are compared by.
        grid = tuple(sorted({1, *protocol.retrieval.recall_at}))
        looked_at = protocol.retrieval.model_copy(update={"recall_at": grid})
        result = retrieve(gallery, labels, settings=looked_at, nearness=nearness)
        found.append((tell.of_retrieval(kind, dim, result, looked_at), result.recall[0], result.queries))
    if "clustering" in tasks:
        groups = clustering(gallery, labels, protocol.clustering, nearness=nearness, seed=protocol.seed)
        found.append((tell.of_clustering(kind, dim, groups, len(gallery)), None, None))
    if "verification" in tasks:
        pairs = draw_pairs(labels, protocol.verification, seed=protocol.seed)
        judged = verify(gallery, pairs, protocol.verification, nearness=nearness)
        found.append((tell.of_verification(kind, dim, judged), judged.correct, None))
    return found


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
