"""Every kind of features measured by the same tasks and the same protocol."""

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import torch
from jaxtyping import Int
from torch import Tensor

from manyviews.evaluators.alone import Failed, alone
from manyviews.evaluators.distance import Cosine, MappedFeatures, Metric, Report, apply, is_fitted
from manyviews.evaluators.protocol import PROBES, Gallery, ProtocolSettings, Task
from manyviews.evaluators.requirements import fitting_images, refusals, searches
from manyviews.evaluators.results.intervals import paired_difference
from manyviews.evaluators.results.kinds import in_order, is_learned, label
from manyviews.evaluators.results.measurement import Difference, Evaluation, Measurement
from manyviews.evaluators.splits import Prediction
from manyviews.evaluators.tasks import Inputs, Outcome, measure
from manyviews.linear_metrics import LinearMetric


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
    augmented: Callable[[str], Prediction] | None = None,
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
    for reason in refusals(tasks, gallery, train_labels, test_labels, protocol, metric).values():
        raise ValueError(reason)
    shown = gallery.images[test_labels[gallery.images] >= 0]
    facts = {"images": len(shown), "classes": test_labels[shown].unique().tolist(), "origin": gallery.origin}
    by_metric = metric if any(map(searches, tasks)) else Cosine()
    fitting = fitting_images(gallery, train_labels, protocol) if is_fitted(by_metric) else gallery.fitting
    inputs = Inputs(train_labels, test_labels, shown, protocol, augmented, progress)
    measurements: list[Measurement] = []
    right: dict[tuple[str, str], Tensor] = {}
    predictions: dict[str, Tensor] = {}
    hits: dict[str, Tensor] = {}
    for kind, (train, test) in features.items():
        if train is not None:
            _check(kind, train, train_labels, "training")
        _check(kind, test, test_labels, "test")
        if report is not None:
            report(f"measuring {label(kind)} features: {test.shape[1]:,} numbers for each image")
        used = (distances or {}).get(kind, by_metric)
        searched: MappedFeatures | None = None
        with alone(f"metric={used.name}", kind, failed):
            searched = apply(used, train, test, train_labels, fitting, report=progress)
            if keep is not None and searched.fitted is not None:
                keep(kind, searched.fitted)
        for task in [task for task in get_args(Task) if task in tasks]:
            outcome: Outcome | None = None
            if report is not None and task not in PROBES and searched is not None:
                report(f"{task} of {label(kind)} features")
            with alone(task, kind, failed):
                outcome = measure(task, kind, (train, test), searched, inputs)
            if outcome is None:
                continue
            measurements += outcome.measurements
            if outcome.right is not None:
                right[task, kind] = outcome.right
                if outcome.images is not None:
                    hits[f"{task}/{kind}"] = _fill(outcome.right, outcome.images, len(test_labels))
                    if outcome.guesses is not None:
                        predictions[f"{task}/{kind}"] = _fill(outcome.guesses, outcome.images, len(test_labels))
    differences: list[Difference] = []
    order: dict[tuple[str, str], int] = {}
    for task in get_args(Task):
        first, *others = in_order(features, task)
        order |= {(task, kind): len(order) + place for place, kind in enumerate((first, *others))}
        # The baselines, then the other layer.
        differences += [
            Difference(first, other, task, *paired_difference(right[task, first], right[task, other]))
            for other in sorted(others, key=is_learned)
            if (task, first) in right and (task, other) in right
        ]
    measurements.sort(key=lambda own: order[own.task, own.features])
    return Evaluation(tuple(measurements), tuple(differences), facts, predictions, hits)


def _fill(values: Tensor, images: Tensor, count: int) -> Tensor:
    """Values of some of the images, at their places among all; −1 elsewhere."""
    filled = torch.full((count,), -1)
    filled[images] = values.long()
    return filled


def _check(kind: str, features: Tensor, labels: Tensor, split: str) -> None:
    if len(features) != len(labels):
        raise ValueError(f"{kind}: {len(features)} {split} features for {len(labels)} labels")
    if not torch.isfinite(features).all():
        raise ValueError(f"{kind}: some {split} features are not finite")
