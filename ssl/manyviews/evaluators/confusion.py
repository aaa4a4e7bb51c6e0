"""The confusion matrix and most confident mistakes of a classifier, and their pictures."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from manyviews.evaluators.lettering import lettering, shortened

MOST_NUMBERS = 25
"""Most classes for which the picture writes a number into each cell."""
COLUMNS = 6
"""Mistakes in a row of their picture."""
MOST_NAMES = 60
"""Most classes that the picture names."""


def confusion(
    labels: Int[Tensor, " images"], predictions: Int[Tensor, " images"], classes: int
) -> Int[Tensor, "classes classes"]:
    """Counts images by true class (row) and predicted class (column), numbered from 0.

    Examples:
        >>> confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2).tolist()
        [[1, 0], [1, 1]]
    """
    return (labels * classes + predictions).bincount(minlength=classes**2).view(classes, classes)


def worst(
    logits: Float[Tensor, "images classes"], labels: Int[Tensor, " images"], most: int
) -> tuple[Int[Tensor, " mistakes"], Float[Tensor, " mistakes"]]:
    """Returns indices and probabilities of the most confident mistakes, in descending order."""
    probabilities, predictions = logits.softmax(1).max(1)
    wrong = (predictions != labels).nonzero().flatten()
    order = probabilities[wrong].argsort(descending=True, stable=True)[:most]
    return wrong[order], probabilities[wrong[order]]


def confusion_picture(
    matrix: Int[Tensor, "classes classes"], classes: Sequence[str], dpi: int = 100
) -> UInt8[Tensor, "3 rows columns"]:
    """Draws the confusion matrix, a row for each true class; darker: a larger share of it."""
    number = len(classes)
    shares = (100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    totals = matrix.sum(1).tolist()
    names = [shortened(name) for name in classes] if number <= MOST_NAMES else []
    side = min(3.5 + 0.45 * number, 14) + 0.09 * max(map(len, names), default=0)
    with lettering(names):
        figure = Figure((side, side), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.set_title("Images by true and predicted class")
        if names:
            axes.set_xticks(range(number), names, rotation=90)
            axes.set_yticks(range(number), [f"{name} ({total:,})" for name, total in zip(names, totals, strict=True)])
        if number <= MOST_NUMBERS:
            for row, column in matrix.nonzero().tolist():
                colour = "white" if shares[row, column] > 50 else "black"
                axes.text(
                    column, row, str(int(matrix[row, column])), ha="center", va="center", color=colour, fontsize=8
                )
    return as_pixels(figure, dpi)


def mistakes_picture(
    images: UInt8[Tensor, "mistakes channels size size"], captions: Sequence[tuple[str, str]]
) -> UInt8[Tensor, "3 rows columns"]:
    """Draws images with 1 or 3 channels in a grid, each under the two lines of its caption."""
    rows = max(1, -(-len(images) // COLUMNS))
    titles = [f"{shortened(above)}\n{shortened(below)}" for above, below in captions]
    with lettering(titles):
        figure = Figure((2.0 * COLUMNS, 2.45 * rows), layout="constrained")
        figure.suptitle("True class → predicted class and its probability")
        if not len(images):
            figure.text(0.5, 0.5, "no image was mistaken", ha="center", va="center")
        for index, (image, caption) in enumerate(zip(images, titles, strict=True), start=1):
            axes = figure.add_subplot(rows, COLUMNS, index)
            pixels = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
            axes.imshow(pixels, interpolation="nearest" if len(pixels) < 100 else "antialiased")
            axes.set_axis_off()
            axes.set_title(caption, fontsize=9)
        return as_pixels(figure)


def as_pixels(figure: Figure, dpi: int = 100) -> UInt8[Tensor, "3 rows columns"]:
    """Renders a figure on white."""
    figure.set_facecolor("white")
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    # matplotlib warns if a layout does not fit into a small figure.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
