"""Contents of page and TensorBoard: neighbours, confusions, similarities and maps."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from manyviews.data import Images
from manyviews.engine import top_k
from manyviews.evaluators.confusion import as_pixels, confusion, confusion_picture
from manyviews.evaluators.distance import similarity_of_pairs
from manyviews.evaluators.splits import by_class
from manyviews.report import plots
from manyviews.report.findings import Findings, drawn, labels_of
from manyviews.report.pictures import MOST_POINTS, TITLES, legend
from manyviews.report.verified import Verified, verified_of
from manyviews.system import keyed_random

NEIGHBOURS = 8
RANDOM, WRONG = 6, 6
"""Queries sampled from all images shown, and from those that kNN got wrong."""
SEARCHED = 400
"""Mistakes that are searched for similar images of another class: the search is the main cost of a report."""
ALIKE = 12
IN_MATRIX = 20
"""Classes beyond which a confusion matrix is not readable."""
WORST, EXAMPLES = 12, 4
"""Confusions that are listed, and images shown of each."""
METHODS = {"linear": "linear probe", "knn": "kNN"}
"""Tasks whose predictions are shown: the first that was measured."""
PAIRS, DPI = 8_000, 110


class Neighbour(NamedTuple):
    """A neighbour of a query."""

    id: int
    label: int
    cosine: float
    right: bool | None
    """Whether it has the query's class; None if either has none."""


class Query(NamedTuple):
    """An image and its neighbours, nearest first."""

    id: int
    label: int
    prediction: int | None
    """The class that kNN predicted, if it is wrong."""
    near: tuple[Neighbour, ...]


class Confused(NamedTuple):
    """Images of one class that were predicted as another."""

    truth: int
    prediction: int
    images: int
    share: float
    """Of all images of the true class."""
    examples: tuple[int, ...]


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
    verified: Verified | None
    """The ROC curves of pairs, and those judged wrongly."""


def contents_of(findings: Findings, seed: int) -> Contents:
    """Computes the contents of a report; a pure function of findings and seed."""
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
    return Contents(random, wrong, alike, confusions, matrix, histogram, views_at, maps, verified_of(findings))


def references(findings: Findings) -> tuple[Images, Float[Tensor, "images dim"], bool]:
    """Returns images and features to search for neighbours, and whether they are those shown.

    They are the training images, if their features are known and others are shown.
    """
    train, shown = findings.features[findings.kind]
    if findings.test is None or train is None:
        return findings.shown, shown, True
    return findings.train, train, False


def queries(findings: Findings, seed: int) -> tuple[tuple[Query, ...], tuple[Query, ...]]:
    """Samples random images, and mistakes of kNN or else retrieval, with their neighbours."""
    random = drawn(torch.arange(len(findings.shown)), RANDOM, seed, 1)
    hits = predictions = None
    if findings.test is not None:
        hits = _first(findings, ("knn", "retrieval"), findings.evaluation.hits)
        predictions = _first(findings, ("knn",), findings.evaluation.predictions)
    missed = (hits == 0).nonzero().squeeze(1) if hits is not None else random[:0]
    wrong = drawn(missed[~torch.isin(missed, random)], WRONG, seed, 2)
    both = look_up(findings, torch.cat([random, wrong]))
    if predictions is not None and hits is not None:
        both = [
            query._replace(prediction=int(predictions[query.id])) if hits[query.id] == 0 else query for query in both
        ]
    return tuple(both[: len(random)]), tuple(both[len(random) :])


def look_up(findings: Findings, ids: Int64[Tensor, " queries"]) -> list[Query]:
    """Finds up to 8 nearest neighbours of the images shown with these ids."""
    images, features, is_shown = references(findings)
    k = min(NEIGHBOURS, len(features) - is_shown)
    labels = labels_of(findings.shown)
    if k < 1 or not len(ids):
        return [Query(int(index), int(labels[index]), None, ()) for index in ids]
    # With ids no image is its own neighbour.
    query_ids, key_ids = (ids, torch.arange(len(features))) if is_shown else (None, None)
    own = findings.features[findings.kind][1][ids]
    cosines, neighbours = top_k(own, features, k, query_ids=query_ids, key_ids=key_ids, cosine=True)
    columns = (ids, labels[ids], neighbours, labels_of(images)[neighbours], cosines)
    results = []
    for query, label, *row in zip(*(column.tolist() for column in columns), strict=True):
        near = (
            Neighbour(image, other, cosine, None if min(label, other) < 0 else label == other)
            for image, other, cosine in zip(*row, strict=True)
        )
        results.append(Query(query, label, None, tuple(near)))
    return results


def look_alikes(findings: Findings, seed: int) -> tuple[Query, ...]:
    """Finds mistakes and the most similar image of another class, most similar first.

    They show wrong labels, and images that belong to two classes. Of many mistakes, a sample is searched.
    """
    hits = _first(findings, ("linear", "knn"), findings.evaluation.hits) if findings.test is not None else None
    if hits is None:
        return ()
    alike = []
    for query in look_up(findings, drawn((hits == 0).nonzero().squeeze(1), SEARCHED, seed, 3)):
        other = next((neighbour for neighbour in query.near if neighbour.right is False), None)
        if other is not None:
            alike.append(query._replace(near=(other,)))
    return tuple(sorted(alike, key=lambda query: (-query.near[0].cosine, query.id))[:ALIKE])


def _first(findings: Findings, tasks: tuple[str, ...], outcomes: Mapping[str, Tensor]) -> Tensor | None:
    names = [f"{task}/{findings.kind}" for task in tasks]
    return next((outcomes[name] for name in names if name in outcomes), None)


def confusions_of(findings: Findings) -> Confusions | None:
    """Returns the confusions of the linear probe, or else kNN; None without predictions."""
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
    """Counts predicted by true classes, without images of class −1; None if no image is left."""
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
    """Computes cosines of sampled pairs, by "same class", "different classes" or "two images".

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
