"""Which images a kind of features finds alike: the neighbours of some queries, and look-alikes of other classes."""

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
"""Queries that are drawn from all images shown, and from those that kNN got wrong."""
SEARCHED = 400
"""Images that are looked up for look-alikes of another class: the search is what a report costs."""
ALIKE = 12


class Neighbour(NamedTuple):
    """An image that was found."""

    id: int
    label: int
    cosine: float
    right: bool | None
    """Whether it has the query's class; None where either has none."""


class Query(NamedTuple):
    """An image that was looked up, and what is nearest to it, nearest first."""

    id: int
    label: int
    guess: int | None
    """The class that kNN gave it, where it was wrong."""
    near: tuple[Neighbour, ...]


class Searched(NamedTuple):
    """Where neighbours are looked for."""

    images: Images
    features: Float[Tensor, "images dim"]
    own: bool
    """Whether these are the images shown themselves, so that each would find itself first."""


def searched(findings: Findings) -> Searched:
    """The training images where their features are known and others are shown, else the images shown."""
    train, shown = findings.features[findings.kind]
    if findings.test is None or train is None:
        return Searched(findings.shown, shown, own=True)
    return Searched(findings.train, train, own=False)


def queries(findings: Findings, seed: int) -> tuple[tuple[Query, ...], tuple[Query, ...]]:
    """Some images drawn at random and some that kNN got wrong, each with its nearest neighbours by cosine."""
    count = len(findings.shown)
    random = drawn(torch.arange(count), RANDOM, seed, 1)
    hits, guesses = _outcomes(findings)
    missed = (hits == 0).nonzero().squeeze(1) if hits is not None else random[:0]
    wrong = drawn(missed[~torch.isin(missed, random)], WRONG, seed, 2)
    found = look_up(findings, torch.cat([random, wrong]))
    if guesses is not None and hits is not None:
        found = [query._replace(guess=int(guesses[query.id])) if hits[query.id] == 0 else query for query in found]
    return tuple(found[: len(random)]), tuple(found[len(random) :])


def look_up(findings: Findings, ids: Int64[Tensor, " queries"], k: int = NEIGHBOURS) -> list[Query]:
    """The k images nearest to each of the images shown that `ids` names; fewer where there are not so many."""
    place = searched(findings)
    k = min(k, len(place.features) - place.own)
    labels = labels_of(findings.shown)
    if k < 1 or not len(ids):
        return [Query(int(index), int(labels[index]), None, ()) for index in ids]
    shown = findings.features[findings.kind][1]
    everything = torch.arange(len(place.features))
    cosines, places = top_k(
        shown[ids],
        place.features,
        k,
        query_ids=ids if place.own else None,
        key_ids=everything if place.own else None,
        cosine=True,
    )
    labels_found = labels_of(place.images)[places]
    found = []
    for query, label, *row in zip(
        *(each.tolist() for each in (ids, labels[ids], places, labels_found, cosines)), strict=True
    ):
        near = (
            Neighbour(image, other, cosine, None if min(label, other) < 0 else label == other)
            for image, other, cosine in zip(*row, strict=True)
        )
        found.append(Query(query, label, None, tuple(near)))
    return found


def look_alikes(findings: Findings, seed: int) -> tuple[Query, ...]:
    """Images with the one of another class that they are most like, the most alike first.

    They are looked for among those that the linear probe, or kNN, got wrong, of many of these among as many as are
    drawn. Here stand mistakes of the labels, and images that two classes have a right to.
    """
    if findings.test is None:
        return ()
    hits = _first(findings, ("linear", "knn"), findings.evaluation.hits)
    if hits is None:
        return ()
    found = []
    for query in look_up(findings, drawn((hits == 0).nonzero().squeeze(1), SEARCHED, seed, 3)):
        other = next((neighbour for neighbour in query.near if neighbour.right is False), None)
        if other is not None:
            found.append(query._replace(near=(other,)))
    return tuple(sorted(found, key=lambda query: (-query.near[0].cosine, query.id))[:ALIKE])


def _outcomes(findings: Findings) -> tuple[Tensor | None, Tensor | None]:
    """Of each image shown, whether kNN (or else retrieval) was right, and kNN's class for it."""
    if findings.test is None:
        return None, None
    hits = _first(findings, ("knn", "retrieval"), findings.evaluation.hits)
    return hits, _first(findings, ("knn",), findings.evaluation.predictions)


def _first(findings: Findings, methods: tuple[str, ...], among: Mapping[str, Tensor]) -> Tensor | None:
    return next((among[f"{name}/{findings.kind}"] for name in methods if f"{name}/{findings.kind}" in among), None)
