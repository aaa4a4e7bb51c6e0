"""Intervals for what is measured on a draw of images: of proportions, of means, and of differences of methods."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import binomtest
from torch import Tensor

NORMAL_95 = 1.959963984540054
RESAMPLES = 10_000
COUNTS = 1 << 24
"""Numbers held at once: 128 MiB."""


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


def bootstrap_differences(
    methods: Sequence[Bool[Tensor, "_ images"]], *, seed: int, resamples: int = RESAMPLES
) -> list[tuple[float, float, float]]:
    """How far each method but the first is ahead of the first, with the 95 % interval of the paired bootstrap.

    The interval is that of the percentiles (Efron & Tibshirani 1993, chapter 13) of what `resampled` finds.

    Args:
        methods: of each, which images were right: a row for each of its runs, the images the same for all.
        seed: of the draws.
        resamples: how many draws.

    Returns:
        For each method after the first: the difference of the mean accuracies, and both ends of its interval.
    """
    means = [float(hits.double().mean()) for hits in methods]
    drawn = resampled(methods, seed=seed, resamples=resamples)
    found = []
    for place in range(1, len(methods)):
        differences = drawn[:, place] - drawn[:, 0]
        low, high = np.quantile(differences.numpy(), [0.025, 0.975]).tolist()
        found.append((means[place] - means[0], low, high))
    return found


def resampled(
    methods: Sequence[Bool[Tensor, "_ images"]], *, seed: int, resamples: int = RESAMPLES
) -> Float[Tensor, "resamples methods"]:
    """The mean accuracy of each method in draws of the images, the same for all runs, and of each method's runs.

    Of k runs of a method k − 1 are drawn, which gives their mean the spread that it has (Rao & Wu 1988); k drawn of few
    would make it too small. A single run says nothing of other seeds: it stays as it is. Drawing images and runs
    counts what is peculiar to one image in one run more than once, so that the spread is rather too large than too
    small (Owen 2007, The pigeonhole bootstrap).
    """
    generator = np.random.default_rng(seed)
    whole = torch.cat(list(methods))
    # Images that the same runs have right are alike: how often each pattern is drawn is all that matters.
    patterns, counts = whole.unique(dim=1, return_counts=True)
    images, right = whole.shape[1], patterns.double().T.numpy()
    shares = counts.double().numpy() / images
    blocks = [
        generator.multinomial(images, shares, size=part) @ right / images for part in _parts(resamples, len(shares))
    ]
    accuracies = np.concatenate(blocks)
    columns, first = [], 0
    for hits in methods:
        own = accuracies[:, first : first + len(hits)]
        first += len(hits)
        if len(hits) > 1:
            chosen = generator.integers(len(hits), size=(resamples, len(hits) - 1))
            own = np.take_along_axis(own, chosen, axis=1)
        columns.append(own.mean(axis=1))
    return torch.from_numpy(np.stack(columns, axis=1))


def _parts(resamples: int, patterns: int) -> Iterator[int]:
    """Numbers of resamples that are drawn at once."""
    most = max(1, COUNTS // patterns)
    for start in range(0, resamples, most):
        yield min(most, resamples - start)
