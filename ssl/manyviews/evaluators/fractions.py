"""The linear probe from few labels: a number or share of each class, drawn several times."""

import statistics
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.data import Report
from manyviews.evaluators.linear import NEAR, search, standard
from manyviews.evaluators.logistic import LogisticFit, at_once, logistic_regression, principal_axes
from manyviews.evaluators.results.measurement import LEARNED, Measurement
from manyviews.evaluators.splits import by_class
from manyviews.system import keyed_random

FOLDS = 5
"""Folds of the cross-validation that chooses the strength."""
MANY = 2_000
"""From this number of labelled images a single fold is enough; the other four would only take time."""


class FractionSettings(Settings):
    """The numbers of labels for the linear probe, and how often they are drawn."""

    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.01, 0.1), max_length=64)
    """Shares of the labelled training images of each class; at least one image of each class."""
    shots: tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...] = Field((5,), max_length=64)
    """Numbers of labelled images of each class; of a class that has fewer, all."""
    draws: int = Field(5, ge=2, le=1000)
    """Draws of the labelled images; mean and standard deviation of their accuracies are reported."""
    regularisations: tuple[Annotated[float, Field(gt=0, le=1e9)], ...] = Field(
        (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0), min_length=1, max_length=64
    )
    """Strengths of half the squared weights beside the mean cross-entropy; each draw's own labels choose."""
    single: float = Field(0.1, gt=0, le=1e9)
    """The strength with one image of each class, if none can be held out for a choice."""


def fractions(
    train: Float[Tensor, "train dim"],
    labels: Int[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
    classes: int,
    settings: FractionSettings,
    *,
    seed: int = 0,
    kind: str = LEARNED,
    report: Report | None = None,
) -> tuple[Measurement, ...]:
    """Measures the linear probe from few labels: first shares, then numbers of each class.

    Each is the mean of several draws. The images of a draw are a pure function of labels, seed and number of the draw:
    all kinds of features get the same ones, and a smaller share is part of a larger one. Features are standardised by
    all training images, labelled or not. The strength is chosen by cross-validation on the draw's own labelled images,
    equal accuracies going to the stronger one; the probe is then fitted on all of these. A draw that repeats the images
    of an earlier one, as 5 of each class do if no class has more, reuses its accuracy. Images labelled −1 are left out.

    Raises:
        ValueError: if no training image, or no test image, has a label.
    """
    known = test_labels >= 0
    test = test.to(train.device)
    if not known.any() or not (labels >= 0).any():
        raise ValueError("few labels are drawn from labelled training images and judged on labelled test images")
    scaled = standard(train)
    test, test_labels = scaled(test[known]), test_labels[known]
    measurements = []
    cases: list[tuple[str, float | int]] = [(f"{100 * share:g} %", share) for share in sorted(settings.shares)]
    cases += [(f"{shots} of each class", shots) for shots in sorted(settings.shots)]
    axes, done, total = None, 0, len(cases) * settings.draws
    fitted: dict[bytes, tuple[float, float]] = {}

    def tick(_: int) -> None:
        if report is not None:
            report("few labels", done, total)

    for name, amount in cases:
        results = []
        for number in range(settings.draws):
            chosen, ranks = draw(labels, amount, seed=seed, number=number)
            key = chosen.numpy().tobytes()
            if key in fitted:
                done += 1
                results.append(fitted[key])
                continue
            features = scaled(train[chosen])
            if axes is None and len(features) >= features.shape[1]:
                # The same axes serve all draws: they only speed up the fits.
                axes = principal_axes(features)
            own = axes if len(features) >= features.shape[1] else None
            fit, strength = _probe(features, labels[chosen], ranks, classes, settings, own, tick)
            fitted[key] = (fit.predict(test)[0].cpu() == test_labels).double().mean().item(), strength
            results.append(fitted[key])
            done += 1
            tick(0)
        accuracies, strengths = (list(each) for each in zip(*results, strict=True))
        measurements.append(mean_of_draws(kind, name, len(chosen), accuracies, strengths))
    return tuple(measurements)


def mean_of_draws(
    kind: str, name: str, labelled: int, accuracies: Sequence[float], strengths: Sequence[float]
) -> Measurement:
    """Returns the mean accuracy over draws, with the sample's standard deviation (n − 1)."""
    mean, deviation = statistics.fmean(accuracies), statistics.stdev(accuracies)
    details = {"accuracies": [*accuracies], "regularisations": [*strengths]}
    return Measurement("fractions", kind, name, mean, n=labelled, deviation=deviation, details=details)


def draw(
    labels: Int[Tensor, " images"], amount: float | int, *, seed: int, number: int
) -> tuple[Int[Tensor, " chosen"], Int[Tensor, " chosen"]]:
    """Draws images to label, ascending, and the rank of each in the shuffled order of its class.

    `amount` is a number of images of each class if it is an int; else the share of each class, at least one image.
    Images labelled −1 are never drawn.
    """
    shuffled = keyed_random.uniform(torch.arange(len(labels)), seed, number).argsort(stable=True)
    order, ranks = by_class(shuffled, labels)
    counts = labels[order].bincount()
    wanted = torch.full_like(counts, amount) if isinstance(amount, int) else (counts * amount).round().clamp(min=1)
    drawn = ranks < wanted[labels[order]]
    chosen, sorting = order[drawn].sort()
    return chosen, ranks[drawn][sorting]


def _probe(
    features: Tensor,
    labels: Tensor,
    ranks: Tensor,
    classes: int,
    settings: FractionSettings,
    axes: Tensor | None,
    report: Callable[[int], object],
) -> tuple[LogisticFit, float]:
    """Fits the probe of one draw, with the strength that has the most hits on its folds."""
    folds = min(FOLDS, 1 + int(ranks.max()))
    if folds < 2:
        single = torch.tensor([settings.single])
        return logistic_regression(features, labels, single, classes, report=report), settings.single
    axes = principal_axes(features) if axes is None else axes
    strengths = sorted(settings.regularisations, reverse=True)
    # The only image of a class is never held out.
    several = labels.bincount(minlength=classes)[labels] > 1
    held = torch.stack([several & (ranks % folds == fold) for fold in range(folds if len(labels) < MANY else 1)])

    def judge(grid: Tensor, _: LogisticFit | None, __: int) -> tuple[LogisticFit, Tensor]:
        # All strengths on all folds at once, each problem with a mask of the images that it sees.
        fit = logistic_regression(
            features,
            labels,
            grid.repeat(len(held)),
            classes,
            used=~held.repeat_interleave(len(grid), 0),
            axes=axes,
            tolerance=NEAR,
            report=report,
        )
        right = (fit.predict(features) == labels.to(features.device)).unflatten(0, (len(held), len(grid)))
        hits = (right & held[:, None].to(features.device)).sum((0, 2))
        return LogisticFit(*(each[: len(grid)] for each in fit)), hits.cpu()

    size = max(1, at_once(len(features), classes, features.shape[1] + 1) // len(held))
    best, _, start = search(torch.tensor(strengths, dtype=features.dtype), size, judge)
    strength = torch.tensor([strengths[best]], dtype=features.dtype)
    fit = logistic_regression(features, labels, strength, classes, start=start, axes=axes, report=report)
    return fit, strengths[best]
