"""Nearest neighbours of some images by cosine, and mistakes that look like an image of another class."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from manyviews.data import Images
from manyviews.engine import top_k
from manyviews.report.findings import Findings, drawn, labels_of

NEIGHBOURS = 8
RANDOM, WRONG = 6, 6
"""Queries sampled from all images shown, and from those that kNN got wrong."""
SEARCHED = 400
"""Mistakes that are searched for similar images of another class: the search is the main cost of a report."""
ALIKE = 12


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


def references(findings: Findings) -> tuple[Images, Float[Tensor, "images dim"], bool]:
    """Returns the images and features that neighbours are searched in, and whether these are the images shown.

    They are the training images, if their features are known and others are shown.
    """
    train, shown = findings.features[findings.kind]
    if findings.test is None or train is None:
        return findings.shown, shown, True
    return findings.train, train, False


def queries(findings: Findings, seed: int) -> tuple[tuple[Query, ...], tuple[Query, ...]]:
    """Samples images at random, and images that kNN (or else retrieval) got wrong, with their nearest neighbours."""
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
    """Finds mistakes of the linear probe, or kNN, with the most similar image of another class; most similar first.

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
