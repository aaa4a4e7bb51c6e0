"""Few labels: the linear probe on a few images of each class, or on a share of the labels, drawn several times."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from rich import box
from rich.table import Table
from torch import Tensor

from manyviews.config import Settings
from manyviews.evaluators.kinds import label
from manyviews.evaluators.linear import NEAR, Report, search, standard
from manyviews.evaluators.logistic import LogisticFit, at_once, logistic_regression, principal_axes
from manyviews.system import keyed_random

FOLDS = 5
"""Parts of the labelled images of which each is held out once, for the choice of the strength."""
MANY = 2_000
"""From so many labelled images one part held out tells enough, and the other four would only take time."""


class FractionSettings(Settings):
    """How many labels the linear probe is given where labels are few, and how often they are drawn."""

    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.01, 0.1), max_length=64)
    """Shares of the labelled training images, of each class alike; at least one image of each class."""
    shots: tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...] = Field((5,), max_length=64)
    """Numbers of labelled images of each class; of a class that has fewer, all."""
    draws: int = Field(5, ge=2, le=1000)
    """Draws of the labelled images, of whose accuracies mean and standard deviation are reported."""
    regularisations: tuple[Annotated[float, Field(gt=0, le=1e9)], ...] = Field(
        (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0), min_length=1, max_length=64
    )
    """Strengths of half the squared weights beside the mean cross-entropy; each draw's own labels choose."""
    single: float = Field(0.1, gt=0, le=1e9)
    """The strength where there is one image of each class, so that none can be held out for a choice."""


@dataclass(frozen=True)
class FractionResult:
    """The accuracies of the probe on the whole test set, one for each draw of its labelled training images."""

    name: str
    """"1 %", or "5 of each class"."""
    images: int
    """Labelled images of one draw."""
    accuracies: tuple[float, ...]
    regularisations: tuple[float, ...] = ()
    """The strength that each draw chose."""

    @property
    def mean(self) -> float:
        """The mean accuracy over the draws."""
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        """The standard deviation of the accuracy over the draws, of the sample (n − 1)."""
        return statistics.stdev(self.accuracies)


def fractions(
    train: Float[Tensor, "train dim"],
    labels: Int[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
    classes: int,
    settings: FractionSettings,
    *,
    seed: int = 0,
    report: Report | None = None,
) -> tuple[FractionResult, ...]:
    """The accuracy of the linear probe from few labels: first the shares, then the numbers of each class, ascending.

    Which images a draw labels is a pure function of the labels, the seed and the number of the draw, so all kinds of
    features are given the same ones, and a smaller share is part of a larger one. Features are standardised by all
    training images, which are there without their labels too. The strength is chosen by folds of the draw's own
    labelled images, equal accuracies going to the stronger one; the probe is then fitted on all of these. A draw of
    the images of an earlier one, as of 5 of each class where none has more, has its accuracy.

    Args:
        train: features of the training images.
        labels: their classes; −1: unlabelled.
        test: features of the test images.
        test_labels: their classes; −1: not known, left out.
        classes: number of classes in both.
        settings: how many labels, how often drawn, which strengths.
        seed: of the draws.
        report: called with what is done, how much of it, and of how much.

    Raises:
        ValueError: if no training image, or no test image, has a label.
    """
    known = test_labels >= 0
    if not known.any() or not (labels >= 0).any():
        raise ValueError("few labels are drawn from labelled training images and judged on labelled test images")
    scaled = standard(train)
    test, test_labels = scaled(test[known]), test_labels[known]
    results = []
    cases: list[tuple[str, float | int]] = [(f"{100 * share:g} %", share) for share in sorted(settings.shares)]
    cases += [(f"{shots} of each class", shots) for shots in sorted(settings.shots)]
    axes, done, total = None, 0, len(cases) * settings.draws
    known_already: dict[bytes, tuple[float, float]] = {}

    def tick(_: int) -> None:
        if report is not None:
            report("few labels", done, total)

    for name, amount in cases:
        accuracies, strengths = [], []
        for number in range(settings.draws):
            chosen, ranks = draw(labels, amount, seed=seed, number=number)
            key = chosen.numpy().tobytes()
            if key in known_already:
                done += 1
                accuracies.append(known_already[key][0])
                strengths.append(known_already[key][1])
                continue
            features = scaled(train[chosen])
            if axes is None and len(features) >= features.shape[1]:
                # The same will do for all draws: they only make the way short.
                axes = principal_axes(features)
            own = axes if len(features) >= features.shape[1] else None
            fit, strength = _probe(features, labels[chosen], ranks, classes, settings, own, tick)
            accuracies.append((fit.predict(test)[0] == test_labels).double().mean().item())
            strengths.append(strength)
            known_already[key] = accuracies[-1], strength
            done += 1
            tick(0)
        results.append(FractionResult(name, len(chosen), tuple(accuracies), tuple(strengths)))
    return tuple(results)


def draw(
    labels: Int[Tensor, " images"], amount: float | int, *, seed: int, number: int
) -> tuple[Int[Tensor, " chosen"], Int[Tensor, " chosen"]]:
    """Which images are labelled, ascending, and the place of each in the order in which its class is drawn.

    Args:
        labels: classes; images of −1 are never drawn.
        amount: a whole number: of each class; a fraction: the share of each class, at least one image.
        seed: of all draws.
        number: of this draw.
    """
    order = keyed_random.uniform(torch.arange(len(labels)), seed, number).argsort(stable=True)
    order = order[labels[order] >= 0]
    order = order[labels[order].argsort(stable=True)]
    counts = labels[order].bincount()
    ranks = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    wanted = torch.full_like(counts, amount) if isinstance(amount, int) else (counts * amount).round().clamp(min=1)
    taken = ranks < wanted[labels[order]]
    chosen, places = order[taken].sort()
    return chosen, ranks[taken][places]


def table(results: Mapping[str, Sequence[FractionResult]]) -> Table:
    """Rows are kinds of features, columns numbers of labels; each cell is mean ± standard deviation in per cent."""
    first = next(iter(results.values()))
    title = f"Linear probe from few labels, mean ± standard deviation over {len(first[0].accuracies)} draws (%)"
    shown = Table("features", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for result in first:
        shown.add_column(f"{result.name} ({result.images:,})", justify="right", no_wrap=True)
    for number, (kind, row) in enumerate(results.items()):
        cells = [f"{100 * result.mean:.1f} ± {100 * result.deviation:.1f}" for result in row]
        shown.add_row(label(kind), *cells, style=None if number else "bold")
    return shown


def _probe(
    features: Tensor,
    labels: Tensor,
    ranks: Tensor,
    classes: int,
    settings: FractionSettings,
    axes: Tensor | None,
    report: Callable[[int], object],
) -> tuple[LogisticFit, float]:
    """The probe of one draw, fitted on all its images with the strength that has the most hits on its folds."""
    folds = min(FOLDS, 1 + int(ranks.max()))
    if folds < 2:
        single = torch.tensor([settings.single])
        return logistic_regression(features, labels, single, classes, report=report), settings.single
    axes = principal_axes(features) if axes is None else axes
    strengths = sorted(settings.regularisations, reverse=True)
    # Of a class with one image none can be held out.
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
        right = (fit.predict(features) == labels).unflatten(0, (len(held), len(grid)))
        return LogisticFit(*(each[: len(grid)] for each in fit)), (right & held[:, None]).sum((0, 2))

    size = max(1, at_once(len(features), classes, features.shape[1] + 1) // len(held))
    best, _, start = search(torch.tensor(strengths, dtype=features.dtype), size, judge)
    strength = torch.tensor([strengths[best]], dtype=features.dtype)
    fit = logistic_regression(features, labels, strength, classes, start=start, axes=axes, report=report)
    return fit, strengths[best]
