"""Intervals for what is measured on a draw of images: of proportions, of means, and of paired differences."""

import math

from jaxtyping import Bool, Float
from scipy.stats import binomtest
from torch import Tensor

NORMAL_95 = 1.959963984540054


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): never outside [0, 1], sound near both ends."""
    low, high = binomtest(correct, total).proportion_ci(method="wilson")
    return float(low), float(high)


def mean_interval(values: Float[Tensor, " values"]) -> tuple[float, float]:
    """The 95 % interval of a mean of numbers in [0, 1], by its standard error: the normal one, for many values.

    A single value says nothing of the spread: its interval is all of [0, 1].
    """
    if len(values) < 2:
        return 0.0, 1.0
    mean, reach = values.double().mean().item(), NORMAL_95 * values.double().std().item() / math.sqrt(len(values))
    return max(0.0, mean - reach), min(1.0, mean + reach)


def paired_difference(first: Bool[Tensor, " images"], second: Bool[Tensor, " images"]) -> tuple[float, float, float]:
    """The difference of two accuracies on the same images and its 95 % interval (Agresti and Min 2005).

    Only images on which the two disagree count, so the interval is tighter than that of two separate samples; half an
    image is added to each of the four cells.
    """
    total = len(first)
    gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
    adjusted = total + 2
    middle = (gained - lost) / adjusted
    reach = NORMAL_95 * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / adjusted) / adjusted
    return (gained - lost) / total, max(-1.0, middle - reach), min(1.0, middle + reach)
