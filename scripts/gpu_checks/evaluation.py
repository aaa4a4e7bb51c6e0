"""Stage 9: nearest neighbours and a linear probe of as many features as ImageNet has images."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_checks.ceilings import gemm
from gpu_checks.measure import Row, Setup, at_most, attempted
from manyviews.evaluators.knn import predict
from manyviews.evaluators.linear import LinearSettings, linear

SECONDS = 2.0
NEIGHBOURS, TEMPERATURE = 20, 0.07
SIGNAL = 0.3
"""Length of the centre of a class beside the noise of an image, in each dimension."""


class Problem(NamedTuple):
    """Made-up features on the device, with their classes, which stay on the CPU as those of images do."""

    train: Tensor
    labels: Tensor
    test: Tensor
    truth: Tensor
    classes: int

    @property
    def title(self) -> str:
        """A readable text of the sizes."""
        return f"{len(self.train):,} × {self.train.shape[1]:,}"

    def accuracy(self, predictions: Tensor) -> float:
        """The share of right answers."""
        return float((predictions.cpu() == self.truth).double().mean())


def rows(setup: Setup) -> Iterator[Row]:
    """Measures kNN of all test features, its answers beside plain products, and the probe with one strength."""
    problem = made_up(setup)
    yield from attempted("kNN", partial(neighbours, setup, problem))
    yield from attempted("linear probe", partial(_probe, setup, problem))


def neighbours(setup: Setup, problem: Problem) -> Iterator[Row]:
    """Times kNN, and compares its answers with those of plain products."""
    vote = partial(predict, neighbours=(NEIGHBOURS,), temperatures=(TEMPERATURE,), classes=problem.classes)
    answers: list[Tensor] = []

    def search() -> None:
        answers.append(vote(problem.test, problem.train, problem.labels)[0, 0])

    what = f"kNN of {len(problem.test):,} among {problem.title}"
    limit = 2 * problem.train.numel() * len(problem.test) / gemm(setup)
    seconds, note = setup.seconds(search, repetitions=3, most=6.0), f"products alone, in bf16, {limit:.2g} s"
    yield Row(what, seconds, "s", note=note) if setup.small else at_most(what, seconds, SECONDS, "s", note)
    if (peak := setup.peak(search)) is not None:
        yield Row(f"{what}: memory beyond the features", peak, "GiB")
    few = problem.test[: setup.pick(500, 50)]
    other = float((answers[-1][: len(few)].cpu() != _plain(few, problem).cpu()).double().mean())
    yield Row("kNN: answers other than of plain products", other, "", "≤ 0.005", other <= 0.005, check=True)
    yield Row("kNN: accuracy on made-up classes", problem.accuracy(answers[-1]))


def _probe(setup: Setup, problem: Problem) -> Iterator[Row]:
    settings, actual = LinearSettings(regularisations=(0.1,)), list[Tensor]()

    def probe() -> None:
        fitted = linear(problem.train, problem.labels, problem.test, problem.classes, settings)
        actual.append(fitted.predictions)

    seconds = setup.once(probe)
    what = f"linear probe of {problem.title}, {problem.classes:,} classes"
    yield Row(what, seconds, "s", note="one strength, cold start")
    yield Row("linear probe: accuracy on made-up classes", problem.accuracy(actual[-1]))


def made_up(setup: Setup) -> Problem:
    """Features around a centre for each class, drawn on the device."""
    train, test, dim, classes = setup.pick((1_281_167, 50_000, 2048, 1000), (600, 50, 16, 10))
    torch.manual_seed(0)
    centres = torch.randn(classes, dim, device=setup.device)

    def features(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % classes
        rows = torch.randn(count, dim, device=setup.device)
        # In place, for the training features alone take 10.5 GB.
        for part, own in zip(rows.split(1 << 16), labels.split(1 << 16), strict=True):
            part += SIGNAL * centres[own.to(setup.device)]
        return rows, labels

    return Problem(*features(train), *features(test), classes)


def _plain(queries: Tensor, problem: Problem) -> Tensor:
    """The weighted vote from one product in float32."""
    scores = F.normalize(queries, dim=1) @ problem.train.T / problem.train.norm(dim=1)
    nearest, rows = scores.topk(NEIGHBOURS, dim=1)
    votes = queries.new_zeros(len(queries), problem.classes, dtype=torch.float64)
    weights = ((nearest - nearest[:, :1]).double() / TEMPERATURE).exp()
    return votes.scatter_add_(1, problem.labels.to(rows.device)[rows], weights).argmax(1)
