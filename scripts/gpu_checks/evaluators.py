"""A part of stage 2: evaluators and linear metrics, each on features of ten classes on both devices."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_checks.measure import Row, Setup, agreement, attempted, error
from manyviews.evaluators.clustering import clustering
from manyviews.evaluators.fractions import FractionSettings, fractions
from manyviews.evaluators.gains import ndcg
from manyviews.evaluators.geometry import geometry, neighbourhood_overlap
from manyviews.evaluators.knn import predict
from manyviews.evaluators.linear import LinearSettings, linear
from manyviews.evaluators.retrieval import retrieve
from manyviews.evaluators.verification import draw_pairs, verify
from manyviews.linear_metrics import LMNN, MMC, Mahalanobis

CLASSES = 10
FITTED, NARROW = 400, 32
"""Images and dimensions for the linear metrics, whose fits on a CPU take minutes with thousands."""
GRID = LinearSettings(regularisations=(0.01, 0.1))


class Features(NamedTuple):
    """Training and test features with their classes."""

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor


def products(metric: Mahalanobis | MMC | LMNN, data: Features) -> Tensor:
    """Products of all pairs after the fitted map: a rotation of it means the same."""
    train, test = (rows[:FITTED, :NARROW] for rows in (data.train, data.test))
    mapped = metric.fit(train, data.train_labels[:FITTED]).transform(test)
    return mapped @ mapped.T


CASES: dict[str, tuple[float, Callable[[Features], object]]] = {
    "kNN: other answers": (
        2e-3,
        lambda data: predict(
            data.test, data.train, data.train_labels, neighbours=(5, 20), temperatures=(0.07,), classes=CLASSES
        ),
    ),
    "linear probe: other answers": (
        5e-3,
        lambda data: linear(data.train, data.train_labels, data.test, CLASSES, GRID).predictions,
    ),
    "fractions of the labels": (
        5e-3,
        lambda data: [
            own.value
            for own in fractions(
                data.train,
                data.train_labels,
                data.test,
                data.test_labels,
                CLASSES,
                FractionSettings(shares=(), shots=(5,), draws=2),
            )
        ],
    ),
    "retrieval: MAP@R": (2e-3, lambda data: [retrieve(data.test, data.test_labels).map_at_r.mean().item()]),
    "geometry": (
        2e-3,
        lambda data: [own.value for own in geometry("features", data.test, (data.test, data.train), seed=0)],
    ),
    "neighbourhood overlap": (2e-3, lambda data: [neighbourhood_overlap(data.train, data.train[:, ::2], 10)]),
    "verification: area under the curve": (
        2e-3,
        lambda data: [verify(data.test, draw_pairs(data.test_labels)).auc],
    ),
    "clustering: mutual information": (2e-2, lambda data: [clustering(data.test, data.test_labels).nmi]),
    "ranking: NDCG": (2e-3, lambda data: ndcg(data.train.abs(), data.test, 10)),
    **{f"linear metric: {metric.name}": (2e-2, partial(products, metric)) for metric in (Mahalanobis(), MMC(), LMNN())},
}


def rows(setup: Setup) -> Iterator[Row]:
    """Compares each evaluator; of answers the share that differs, of figures the relative error."""
    count, dim = setup.pick(4000, 200), setup.pick(256, 8)
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % CLASSES
    features = torch.randn(CLASSES, dim, generator=generator)[labels] + torch.randn(count, dim, generator=generator)
    half = count // 2
    here = Features(features[:half], features[half:], labels[:half], labels[half:])
    # Labels stay on the CPU, where the images are listed.
    there = here._replace(train=here.train.to(setup.device), test=here.test.to(setup.device))
    for name in CASES:
        yield from attempted(f"evaluator: {name}", partial(_compared, name, here, there))


def _compared(name: str, here: Features, there: Features) -> Iterator[Row]:
    tolerance, compute = CASES[name]
    actual, expected = (torch.as_tensor(compute(data)).cpu() for data in (there, here))
    shares = not expected.is_floating_point()
    different = float((actual != expected).double().mean()) if shares else error(actual, expected)
    yield agreement(f"evaluator: {name}", different, tolerance)
