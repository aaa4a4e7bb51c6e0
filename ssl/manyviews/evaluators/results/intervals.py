"""95 % intervals of proportions, means and differences over draws of the test images."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import binomtest
from scipy.stats import t as student
from torch import Tensor

NORMAL_95 = 1.959963984540054
RESAMPLES, RESAMPLES_OF_MEANS = 10_000, 2_000
COUNTS = 1 << 24
"""Numbers held at once: 128 MiB."""


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Computes the 95 % interval of a proportion (Wilson 1927), valid near 0 and 1.

    Examples:
        >>> [round(end, 3) for end in wilson(8, 10)]
        [0.49, 0.943]
    """
    low, high = binomtest(correct, total).proportion_ci(method="wilson")
    return float(low), float(high)


def mean_interval(values: Float[Tensor, " values"]) -> tuple[float, float]:
    """Computes the 95 % interval of a mean of numbers in [0, 1], normal, by its standard error.

    The interval of a single value is all of [0, 1].
    """
    if len(values) < 2:
        return 0.0, 1.0
    mean, reach = values.double().mean().item(), NORMAL_95 * values.double().std().item() / math.sqrt(len(values))
    return max(0.0, mean - reach), min(1.0, mean + reach)


def student_interval(values: Float[Tensor, " values"]) -> tuple[float, float]:
    """Computes the 95 % interval of a mean of independent numbers in [0, 1] (Student 1908).

    Examples:
        >>> [round(end, 3) for end in student_interval(torch.tensor([0.5, 0.6, 0.7]))]
        [0.352, 0.848]
    """
    mean, spread = values.double().mean().item(), values.double().std().item() / math.sqrt(len(values))
    reach = float(student.ppf(0.975, len(values) - 1)) * spread
    return max(0.0, mean - reach), min(1.0, mean + reach)


def weighted_difference(
    first: Float[Tensor, " images"], second: Float[Tensor, " images"], weights: Float[Tensor, " images"]
) -> tuple[float, float, float]:
    """Computes a difference of two sums over the same images, and its 95 % interval over draws of the images.

    `weights` add up to 1, and an image adds as much to a sum at most. Linearised variance of a ratio (Cochran 1977,
    section 6.8), Student's t.

    Examples:
        >>> weighted_difference(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.5]))
        (0.5, -1.0, 1.0)
    """
    used = weights > 0
    leads, weights, count = (first - second)[used], weights[used], int(used.sum())
    difference = leads.sum().item()
    if count < 2:
        return difference, -1.0, 1.0
    spread = math.sqrt(count / (count - 1) * (leads - weights * difference).square().sum().item())
    reach = float(student.ppf(0.975, count - 1)) * spread
    return difference, max(-1.0, difference - reach), min(1.0, difference + reach)


def paired_difference(first: Bool[Tensor, " images"], second: Bool[Tensor, " images"]) -> tuple[float, float, float]:
    """Computes a difference of accuracies on the same images, and its 95 % interval.

    Only images on which the two disagree count, so the interval is tighter than that of two separate samples; half an
    image is added to each of the four cells (Agresti and Min 2005).

    Examples:
        >>> paired_difference(torch.tensor([True, True]), torch.tensor([True, False]))[0]
        0.5
    """
    total = len(first)
    gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
    adjusted = total + 2
    middle = (gained - lost) / adjusted
    reach = NORMAL_95 * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / adjusted) / adjusted
    return (gained - lost) / total, max(-1.0, middle - reach), min(1.0, middle + reach)


def bootstrap_means(
    values: Float[Tensor, "queries figures"], *, seed: int, resamples: int = RESAMPLES_OF_MEANS
) -> list[tuple[float, float]]:
    """Computes the 95 % bootstrap interval of each column's mean, over draws of the rows.

    The interval is that of the percentiles (Efron & Tibshirani 1993, chapter 13). All columns are resampled by the same
    draws.

    Examples:
        >>> bootstrap_means(torch.ones(3, 1), seed=0)
        [(1.0, 1.0)]
    """
    generator, rows = np.random.default_rng(seed), values.double().numpy()
    count = len(rows)
    at_once = max(1, COUNTS // count)
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    shares = np.full(count, 1 / count)
    means = np.concatenate([generator.multinomial(count, shares, size) @ rows / count for size in sizes])
    return [(float(low), float(high)) for low, high in np.quantile(means, [0.025, 0.975], axis=0).T]


def bootstrap_differences(
    methods: Sequence[Bool[Tensor, "_ images"]], *, seed: int, resamples: int = RESAMPLES
) -> list[tuple[float, float, float]]:
    """Computes the lead of each later method over the first, with its paired bootstrap interval.

    The interval is that of the percentiles (Efron & Tibshirani 1993, chapter 13) of `resampled`. Each method is a
    matrix of hits with a row for each of its runs, on the same images for all. Returns (difference of mean accuracies,
    lower end, upper end) for each method after the first.
    """
    means = [float(hits.double().mean()) for hits in methods]
    drawn = resampled(methods, seed=seed, resamples=resamples)
    results = []
    for index in range(1, len(methods)):
        differences = drawn[:, index] - drawn[:, 0]
        low, high = np.quantile(differences.numpy(), [0.025, 0.975]).tolist()
        results.append((means[index] - means[0], low, high))
    return results


def resampled(
    methods: Sequence[Bool[Tensor, "_ images"]], *, seed: int, resamples: int = RESAMPLES
) -> Float[Tensor, "resamples methods"]:
    """Computes mean accuracies in bootstrap draws of the images and of each method's runs.

    k − 1 of a method's k runs are drawn, which gives their mean the right spread (Rao & Wu 1988); k would make it too
    small. A single run is kept. Drawing both images and runs counts the interaction of an image and a run more than
    once, which makes the spread too large rather than too small (Owen 2007, The pigeonhole bootstrap).
    """
    generator = np.random.default_rng(seed)
    whole = torch.cat(list(methods))
    # Images that the same runs have right are interchangeable: only the count of each pattern matters.
    patterns, counts = whole.unique(dim=1, return_counts=True)
    images, right = whole.shape[1], patterns.double().T.numpy()
    shares = counts.double().numpy() / images
    at_once = max(1, COUNTS // len(shares))
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    accuracies = np.concatenate([generator.multinomial(images, shares, size) @ right / images for size in sizes])
    columns, first = [], 0
    for hits in methods:
        own = accuracies[:, first : first + len(hits)]
        first += len(hits)
        if len(hits) > 1:
            chosen = generator.integers(len(hits), size=(resamples, len(hits) - 1))
            own = np.take_along_axis(own, chosen, axis=1)
        columns.append(own.mean(axis=1))
    return torch.from_numpy(np.stack(columns, axis=1))
