"""The linear probe: how much of the classes a straight cut through the features finds."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.evaluators.logistic import LogisticFit, at_once, logistic_regression, principal_axes
from manyviews.evaluators.splits import Prediction, hold_out_some

NEAR = 3e-4
"""How near its minimum, in nats, a strength is judged: the rest moves far fewer held-out images than chance does."""


UNCHOSEN = 0.1
"""About the strength that is used where no class has a second image, so that none can be held out for a choice."""
ENOUGH = 2
"""Strengths in a row that bring nothing better, after which a grid that is too large for the memory is left."""
Report = Callable[[str, int, int], object]


class LinearSettings(Settings):
    """The grid of which the best strength on held-out training images is used."""

    regularisations: tuple[Annotated[float, Field(gt=0, le=1e9)], ...] = Field(
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0), min_length=1, max_length=64
    )
    """Strengths of half the squared weights beside the mean cross-entropy; scikit-learn's 1 / (C × images)."""


class Standard(NamedTuple):
    """Mean and deviation per feature, of the training part only."""

    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]

    def __call__(self, features: Float[Tensor, "images dim"]) -> Float[Tensor, "images dim"]:
        """Features at zero mean and unit variance; those that do not vary in the training part are 0."""
        return (features - self.mean) * self.scale


def standard(features: Float[Tensor, "images dim"]) -> Standard:
    """The standardisation of features, each to zero mean and unit variance."""
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    deviation = variance.sqrt()
    # What a constant varies by is the rounding of its mean: to be scaled up, it would be a feature made of noise.
    still = deviation <= 1e-6 * mean.abs().clamp(min=1e-6)
    scale = torch.where(still, 0, 1 / deviation.masked_fill(still, 1))
    return Standard(mean, scale)


def linear(
    train: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    classes: int,
    settings: LinearSettings,
    *,
    share: float = 0.2,
    seed: int = 0,
    report: Report | None = None,
) -> Prediction:
    """Predicts the test images by logistic regression on all training images.

    Its strength is chosen on a held-out part of the training images. The test labels are no argument. Equal validation
    accuracies go to the stronger regularisation.

    Args:
        train: features of the training images.
        train_labels: their classes; −1: unlabelled, left out.
        test: features of the test images.
        classes: number of classes in both.
        settings: the grid.
        share: part of each class that is held out for the choice.
        seed: of the draw of that part.
        report: called with what is done, how much of it, and of how much.
    """
    strengths = sorted(settings.regularisations, reverse=True)
    best, validation, start, axes = _nearest(strengths, UNCHOSEN), None, None, None
    kept, held = hold_out_some(train_labels, share=share, seed=seed)
    total = len(strengths) + 1
    if len(strengths) > 1 and len(held):
        scaled = standard(train[kept])
        features = scaled(train[kept])
        axes = principal_axes(features)

        def judge(grid: Tensor, begin: LogisticFit | None, before: int) -> tuple[LogisticFit, Tensor]:
            fit = logistic_regression(
                features,
                train_labels[kept],
                grid,
                classes,
                start=begin,
                axes=axes,
                tolerance=NEAR,
                report=None if report is None else lambda done: report("strengths of the probe", before + done, total),
            )
            return fit, (fit.predict(scaled(train[held])) == train_labels[held]).sum(1)

        grid = torch.tensor(strengths, dtype=train.dtype)
        best, hits, start = search(grid, at_once(len(kept), classes, train.shape[1] + 1), judge)
        validation = hits / len(held)
        if len(kept) < train.shape[1]:
            # More images may reach further.
            axes = None
        del features
    labelled = train_labels >= 0
    scaled = standard(train[labelled])
    strength = torch.tensor([strengths[best]], dtype=train.dtype)
    fit = logistic_regression(
        scaled(train[labelled]),
        train_labels[labelled],
        strength,
        classes,
        start=start,
        axes=axes,
        report=None if report is None else lambda done: report("strengths of the probe", total - 1 + done, total),
    )
    return Prediction(fit.predict(scaled(test))[0], {"regularisation": strengths[best]}, validation)


def search(
    strengths: Float[Tensor, " grid"],
    size: int,
    judge: Callable[[Float[Tensor, " part"], LogisticFit | None, int], tuple[LogisticFit, Int[Tensor, " part"]]],
) -> tuple[int, int, LogisticFit]:
    """The strength with the most hits, of equal ones the first: its number, its hits and its fit.

    All strengths are judged at once, or in parts of `size` where they would take too much memory. Each part then starts
    from the last fit of the part before, and once two strengths or more have brought nothing better the search ends:
    what follows would be weaker still, and with many classes takes minutes each.

    Args:
        strengths: the grid, descending.
        size: how many are judged at once.
        judge: fits a part of the grid, from where it is told to begin, after so many strengths; with the hits of each.
    """
    best, most, chosen, since, before = 0, -1, None, 0, 0
    begin: LogisticFit | None = None
    for part in strengths.split(size):
        fit, hits = judge(part, begin, before)
        since += len(part)
        if int(hits.max()) > most:
            own = int(hits.argmax())
            best, most, since = before + own, int(hits[own]), 0
            chosen = LogisticFit(*(each[own : own + 1] for each in fit))
        if since >= ENOUGH:
            break
        before += len(part)
        following = min(size, len(strengths) - before)
        begin = LogisticFit(*(each[-1:].repeat(max(following, 1), *[1] * (each.ndim - 1)) for each in fit))
    assert chosen is not None, "a grid is never empty"
    return best, most, chosen


def _nearest(strengths: Sequence[float], wanted: float) -> int:
    """The number of the strength that is nearest to what is wanted, by their ratio."""
    return min(range(len(strengths)), key=lambda place: abs(math.log(strengths[place] / wanted)))
