"""Which classes are taken for which: a matrix where there are few, and the worst of all confusions."""

from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from manyviews.evaluators.confusion import confusion as count
from manyviews.report.findings import Findings

IN_MATRIX = 20
"""Classes beyond which a matrix is no longer read."""
WORST = 12
EXAMPLES = 4
METHODS = {"linear": "linear probe", "knn": "kNN"}
"""Whose predictions are shown: those of the first that there are."""


class Pair(NamedTuple):
    """Images of one class that were taken for another."""

    truth: int
    guess: int
    images: int
    share: float
    """Of all images of the true class."""
    examples: tuple[int, ...]
    """The first of them, by id."""


class Confusion(NamedTuple):
    """What was taken for what on the test images."""

    method: str
    """Whose predictions these are."""
    classes: tuple[int, ...]
    """The classes that images have, or were taken for, ascending."""
    counts: Int64[Tensor, "classes classes"] | None
    """Images by true class (row) and predicted class (column); None where there are too many classes to read it."""
    right: int
    total: int
    worst: tuple[Pair, ...]
    """The most frequent confusions, the most images first, then the larger share, then the lower class."""


def confusion(findings: Findings) -> Confusion | None:
    """The confusions of the linear probe on the learned features, or of kNN; None without predictions."""
    test = findings.test
    if test is None or test.labels is None:
        return None
    for method, title in METHODS.items():
        guesses = findings.evaluation.predictions.get(f"{method}/{findings.kind}")
        if guesses is not None:
            return confused(title, test.labels, guesses)
    return None


def confused(method: str, labels: Int64[Tensor, " images"], guesses: Int64[Tensor, " images"]) -> Confusion | None:
    """Counts what was taken for what; images without a label or a prediction do not count, None if all are so."""
    asked = ((labels >= 0) & (guesses >= 0)).nonzero().squeeze(1)
    if not len(asked):
        return None
    truth, guess = labels[asked], guesses[asked]
    classes = torch.cat([truth, guess]).unique()
    counts = None
    if len(classes) <= IN_MATRIX:
        rows, columns = torch.searchsorted(classes, truth), torch.searchsorted(classes, guess)
        counts = count(rows, columns, len(classes))
    sizes = torch.bincount(truth)
    wrong = truth != guess
    # By pairs, not in a matrix: of a thousand classes few of the million pairs occur.
    pairs, numbers = torch.stack([truth[wrong], guess[wrong]], 1).unique(dim=0, return_counts=True)
    confusions = [
        Pair(first, second, number, number / int(sizes[first]), ())
        for (first, second), number in zip(pairs.tolist(), numbers.tolist(), strict=True)
    ]
    worst = sorted(confusions, key=lambda pair: (-pair.images, -pair.share, pair.truth, pair.guess))[:WORST]
    shown = []
    for pair in worst:
        examples = asked[(truth == pair.truth) & (guess == pair.guess)][:EXAMPLES]
        shown.append(pair._replace(examples=tuple(examples.tolist())))
    return Confusion(method, tuple(classes.tolist()), counts, int((~wrong).sum()), len(asked), tuple(shown))
