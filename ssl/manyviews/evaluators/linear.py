"""The linear probe: logistic regression on frozen features."""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.data import Report
from manyviews.evaluators.logistic import (
    MOST_LOGITS,
    MOST_REMEMBERED,
    LogisticFit,
    at_once,
    logistic_regression,
    principal_axes,
)
from manyviews.evaluators.splits import Prediction, hold_out
from manyviews.features.placing import placed

NEAR = 3e-4
"""Tolerance, in nats, of the fits that choose a strength: the rest moves far fewer held-out images than chance does."""
UNCHOSEN = 0.1
"""If no class has a second image to hold out, the strength of the grid nearest to this one is used."""
ENOUGH = 2
"""Strengths in a row without improvement that end the search of a grid which is too large for the memory."""


class LinearSettings(Settings):
    """The grid of strengths; the best one on held-out training images is used."""

    regularisations: tuple[Annotated[float, Field(gt=0, le=1e9)], ...] = Field(
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0), min_length=1, max_length=64
    )
    """Strengths of half the squared weights beside the mean cross-entropy; scikit-learn's 1 / (C × images)."""


class Standard(NamedTuple):
    """Mean and 1 / deviation per feature, of the training part only; 0 for constant ones."""

    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]

    def __call__(self, features: Float[Tensor, "images dim"]) -> Float[Tensor, "images dim"]:
        """Standardises features; those that do not vary in the training part become 0."""
        return (features - self.mean).mul_(self.scale)


def standard(features: Float[Tensor, "images dim"]) -> Standard:
    """Fits a standardisation of each feature to zero mean and unit variance."""
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    deviation = variance.sqrt()
    # A constant varies by the rounding of its mean; scaled up, it would be a feature made of noise.
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

    The strength is chosen on held-out training images, `share` of each class; equal validation accuracies go to the
    stronger regularisation. Training images labelled −1 are left out. All is computed where the training features are,
    or on the CPU if they are on a GPU without room for it; the predictions are on the CPU.
    """
    if train.device.type == "cuda":
        # Beside the features there are standardised and rotated ones, and five arrays of logits.
        train = placed(train, 3, 20 * max(MOST_LOGITS, len(train) * classes) + 8 * MOST_REMEMBERED)
    strengths = sorted(settings.regularisations, reverse=True)
    best = min(range(len(strengths)), key=lambda index: abs(math.log(strengths[index] / UNCHOSEN)))
    validation, start, axes = None, None, None
    kept, held = hold_out(train_labels, share=share, seed=seed, one_each=True)
    total = len(strengths) + 1
    test = test.to(train.device)
    if len(strengths) > 1 and len(held):
        features = train[kept]
        scaled = standard(features)
        features = scaled(features)
        axes, held_out = principal_axes(features), train_labels[held]

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
            return fit, (fit.predict(scaled(train[held])).cpu() == held_out).sum(1)

        grid = torch.tensor(strengths, dtype=train.dtype)
        best, hits, start = search(grid, at_once(len(kept), classes, train.shape[1] + 1), judge)
        validation = hits / len(held)
        if len(kept) < train.shape[1]:
            # More images may span more directions.
            axes = None
        del features
    labelled = train_labels >= 0
    features = train if labelled.all() else train[labelled]
    scaled = standard(features)
    strength = torch.tensor([strengths[best]], dtype=train.dtype)
    fit = logistic_regression(
        scaled(features),
        train_labels[labelled],
        strength,
        classes,
        start=start,
        axes=axes,
        report=None if report is None else lambda done: report("strengths of the probe", total - 1 + done, total),
    )
    return Prediction(fit.predict(scaled(test))[0].cpu(), {"regularisation": strengths[best]}, validation)


def search(
    strengths: Float[Tensor, " grid"],
    size: int,
    judge: Callable[[Float[Tensor, " part"], LogisticFit | None, int], tuple[LogisticFit, Int[Tensor, " part"]]],
) -> tuple[int, int, LogisticFit]:
    """Returns index, hits and fit of the strength with the most hits, the first of equal ones.

    The descending strengths are fitted in parts of `size`, each from the last fit of the part before: `judge` gets a
    part, the fit to start from and the number of strengths before it, and returns the fits and their hits. The search
    ends after `ENOUGH` strengths without improvement: the weaker ones that follow take minutes each with many classes.
    """
    best, most, chosen, since, before = 0, -1, None, 0, 0
    begin: LogisticFit | None = None
    for part in strengths.split(size):
        fit, hits = judge(part, begin, before)
        since += len(part)
        if int(hits.max()) > most:
            index = int(hits.argmax())
            best, most, since = before + index, int(hits[index]), 0
            chosen = LogisticFit(*(each[index : index + 1] for each in fit))
        if since >= ENOUGH:
            break
        before += len(part)
        following = min(size, len(strengths) - before)
        begin = LogisticFit(*(each[-1:].repeat(max(following, 1), *[1] * (each.ndim - 1)) for each in fit))
    assert chosen is not None, "a grid is never empty"
    return best, most, chosen
