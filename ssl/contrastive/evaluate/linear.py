"""The linear probe: how much of the classes a straight cut through the features finds."""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from contrastive.config import Settings
from contrastive.evaluate.held_out import hold_out
from contrastive.evaluate.logistic import LogisticFit, logistic_regression, principal_axes

NEAR = 3e-4
"""How near its minimum, in nats, a strength is judged: the rest moves far fewer held-out images than chance does."""


class LinearSettings(Settings):
    """The grid of which the best strength on held-out training images is used."""

    regularisations: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0), min_length=1
    )
    """Strengths of half the squared weights beside the mean cross-entropy; scikit-learn's 1 / (C × images)."""


class LinearResult(NamedTuple):
    """The test predictions and what they were made with."""

    predictions: Int[Tensor, " queries"]
    regularisation: float
    validation: float
    """Accuracy of the chosen strength on the held-out training images."""
    converged: bool


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
) -> LinearResult:
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
    """
    strengths = sorted(settings.regularisations, reverse=True)
    best, validation, start, axes = 0, float("nan"), None, None
    if len(strengths) > 1:
        kept, held = hold_out(train_labels, share=share, seed=seed)
        scaled = standard(train[kept])
        features, grid = scaled(train[kept]), torch.tensor(strengths, dtype=train.dtype)
        axes = principal_axes(features)
        fit = logistic_regression(features, train_labels[kept], grid, classes, axes=axes, tolerance=NEAR)
        hits = (fit.predict(scaled(train[held])) == train_labels[held]).sum(1)
        best = int(hits.argmax())
        validation = hits[best].item() / len(held)
        start = LogisticFit(*(each[best : best + 1] for each in fit))
        if len(kept) < train.shape[1]:
            # More images may reach further.
            axes = None
        del features
    labelled = train_labels >= 0
    scaled = standard(train[labelled])
    strength = torch.tensor([strengths[best]], dtype=train.dtype)
    fit = logistic_regression(
        scaled(train[labelled]), train_labels[labelled], strength, classes, start=start, axes=axes
    )
    return LinearResult(fit.predict(scaled(test))[0], strengths[best], validation, bool(fit.converged.all()))
