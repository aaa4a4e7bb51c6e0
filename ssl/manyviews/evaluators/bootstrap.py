"""How sure a difference between methods is, over draws of the test images and of the seeds that each method had."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

RESAMPLES = 10_000
COUNTS = 1 << 24
"""Numbers held at once: 128 MiB."""


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
