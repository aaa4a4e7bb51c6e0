"""What the page and TensorBoard both show: neighbours, confusions, similarities of pairs and maps."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from manyviews.evaluators.confusion import as_pixels, confusion, confusion_picture
from manyviews.evaluators.distance import similarity_of_pairs
from manyviews.evaluators.splits import by_class
from manyviews.report import plots
from manyviews.report.findings import Findings, drawn, labels_of
from manyviews.report.neighbours import Query, look_alikes, queries
from manyviews.report.pictures import MOST_POINTS, TITLES, legend
from manyviews.system import keyed_random

IN_MATRIX = 20
"""Classes beyond which a confusion matrix is not readable."""
WORST, EXAMPLES = 12, 4
"""Confusions that are listed, and images shown of each."""
METHODS = {"linear": "linear probe", "knn": "kNN"}
"""Tasks whose predictions are shown: the first that was measured."""
PAIRS, DPI = 8_000, 110


class Confused(NamedTuple):
    """Images of one class that were predicted as another."""

    truth: int
    prediction: int
    images: int
    share: float
    """Of all images of the true class."""
    examples: tuple[int, ...]
    """Ids of the first of them."""


class Confusions(NamedTuple):
    """Predicted by true class on the test images."""

    method: str
    classes: tuple[int, ...]
    """The true and predicted classes, ascending."""
    counts: Int64[Tensor, "classes classes"] | None
    """Images by true class (row) and predicted class (column); None with too many classes to read."""
    right: int
    total: int
    worst: tuple[Confused, ...]
    """The most frequent confusions: most images first, then the larger share, then the lower class."""


class Contents(NamedTuple):
    """Queries and figures of a report."""

    random: tuple[Query, ...]
    wrong: tuple[Query, ...]
    """Images that kNN, or else retrieval, got wrong."""
    alike: tuple[Query, ...]
    """Mistakes beside the most similar image of another class."""
    confusions: Confusions | None
    matrix: UInt8[Tensor, "3 height width"] | None
    """The picture of the confusion matrix, with few classes."""
    histogram: Figure | None
    views_at: float | None
    """The mean cosine of two views of one image."""
    maps: Mapping[str, UInt8[Tensor, "3 height width"]]
    """Pictures of the 2-D maps by title."""


def contents_of(findings: Findings, seed: int) -> Contents:
    """Computes the contents of a report on the learned features; a pure function of findings and seed."""
    random, wrong = queries(findings, seed)
    confusions = confusions_of(findings)
    matrix = None
    if confusions is not None and confusions.counts is not None:
        names = [findings.class_name(number) for number in confusions.classes]
        matrix = confusion_picture(confusions.counts, names, DPI)
    alignment = next(findings.evaluation.of("geometry", features=findings.kind, metric="alignment"), None)
    # The squared distance of unit features is 2 − 2 cos.
    views_at = None if alignment is None else 1 - alignment.value / 2
    cosines = similarities(findings.features[findings.kind][1], findings.shown.labels, seed)
    mark = None if views_at is None else ("two views of an image", views_at)
    histogram = plots.histogram(cosines, mark) if cosines else None
    alike, maps = look_alikes(findings, seed), _maps(findings, seed)
    return Contents(random, wrong, alike, confusions, matrix, histogram, views_at, maps)


def confusions_of(findings: Findings) -> Confusions | None:
    """Returns the confusions of the linear probe on the learned features, or of kNN; None without predictions."""
    test = findings.test
    if test is None or test.labels is None:
        return None
    for method, title in METHODS.items():
        predictions = findings.evaluation.predictions.get(f"{method}/{findings.kind}")
        if predictions is not None:
            return count_confusions(title, test.labels, predictions)
    return None


def count_confusions(
    method: str, labels: Int64[Tensor, " images"], predictions: Int64[Tensor, " images"]
) -> Confusions | None:
    """Counts predicted by true classes; images labelled or predicted −1 do not count, None if there are no others."""
    counted = ((labels >= 0) & (predictions >= 0)).nonzero().squeeze(1)
    if not len(counted):
        return None
    truth, predicted = labels[counted], predictions[counted]
    classes = torch.cat([truth, predicted]).unique()
    counts = None
    if len(classes) <= IN_MATRIX:
        rows, columns = torch.searchsorted(classes, truth), torch.searchsorted(classes, predicted)
        counts = confusion(rows, columns, len(classes))
    sizes = torch.bincount(truth)
    wrong = truth != predicted
    # By pairs, not in a matrix: of a thousand classes few of the million pairs occur.
    pairs, numbers = torch.stack([truth[wrong], predicted[wrong]], 1).unique(dim=0, return_counts=True)
    confused = [
        Confused(first, second, number, number / int(sizes[first]), ())
        for (first, second), number in zip(pairs.tolist(), numbers.tolist(), strict=True)
    ]
    confused.sort(key=lambda pair: (-pair.images, -pair.share, pair.truth, pair.prediction))
    worst = []
    for pair in confused[:WORST]:
        examples = counted[(truth == pair.truth) & (predicted == pair.prediction)][:EXAMPLES]
        worst.append(pair._replace(examples=tuple(examples.tolist())))
    return Confusions(method, tuple(classes.tolist()), counts, int((~wrong).sum()), len(counted), tuple(worst))


def similarities(
    features: Float[Tensor, "images dim"], labels: Int64[Tensor, " images"] | None, seed: int, pairs: int = PAIRS
) -> dict[str, Float[Tensor, " pairs"]]:
    """Computes cosines of sampled pairs: "same class" and "different classes", or "two images" without labels.

    Kinds without a pair are left out; no image is paired with itself. Pairs of the same class are sampled by an image,
    then another one of its class, with replacement. A pure function of the arguments.
    """
    ids = torch.arange(len(features)) if labels is None else (labels >= 0).nonzero().squeeze(1)
    if labels is None or len(ids) < 2:
        sampled = {"two images": torch.stack(_pairs(torch.zeros(len(features), dtype=torch.int64), pairs, seed), 1)}
    else:
        own = labels[ids]
        first, second = _pairs(own, pairs, seed)
        left, right = _pairs(torch.zeros_like(own), pairs, seed + 1)
        differ = own[left] != own[right]
        sampled = {
            "same class": torch.stack([ids[first], ids[second]], 1),
            "different classes": torch.stack([ids[left[differ]], ids[right[differ]]], 1),
        }
    return {name: similarity_of_pairs(features, own, "cosine").float() for name, own in sampled.items() if len(own)}


def _pairs(groups: Int64[Tensor, " images"], pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples pairs of two different indices of the same group."""
    order, ranks_of_order = by_class(torch.arange(len(groups)), groups)
    counts = groups.bincount()
    sizes, starts = counts[groups], (counts.cumsum(0) - counts)[groups]
    ranks = torch.empty_like(order)
    ranks[order] = ranks_of_order
    paired = (sizes > 1).nonzero().squeeze(1)
    if not len(paired):
        return paired, paired
    draws = torch.arange(pairs)
    first = paired[_below(keyed_random.uniform(draws, seed, 4), torch.tensor(len(paired)))]
    # One rank fewer, and from the image's own rank one further: all other images of the group are equally likely.
    step = _below(keyed_random.uniform(draws, seed, 5), sizes[first] - 1)
    step = step + (step >= ranks[first])
    return first, order[starts[first] + step]


def _below(uniform: Tensor, count: Tensor) -> Tensor:
    """Maps uniforms in [0, 1) to integers below `count`."""
    return torch.minimum((uniform.double() * count).long(), count - 1)


def _maps(findings: Findings, seed: int) -> dict[str, Tensor]:
    pictures = {}
    for method, (ids, points) in findings.points.items():
        rows = (points.isfinite().all(1)).nonzero().squeeze(1)
        if not len(rows):
            continue
        rows = drawn(rows, MOST_POINTS, seed, 7)
        groups, of_each = legend(findings, labels_of(findings.shown)[ids[rows]])
        colours = [groups[group].colour for group in of_each.tolist()] if groups else [plots.PALETTE[0]] * len(rows)
        names = {group.name: group.colour for group in groups}
        pictures[TITLES.get(method, method)] = as_pixels(plots.scatter(points[rows].float(), colours, names), DPI)
    return pictures
