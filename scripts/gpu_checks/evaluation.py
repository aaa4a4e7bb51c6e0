"""Stage 9: nearest neighbours and a linear probe of as many features as ImageNet has images."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_checks.ceilings import gemm
from gpu_checks.measure import Row, Setup, at_most
from manyviews.evaluators.knn import predict
from manyviews.evaluators.linear import LinearSettings, linear

SECONDS = 2.0
NEIGHBOURS = 20


def rows(setup: Setup) -> Iterator[Row]:
    """Measures kNN of all test features, its answers beside plain products, and the probe with one strength."""
    train, test, dim, classes = setup.pick((1_281_167, 50_000, 2048, 1000), (600, 50, 16, 10))
    rate = gemm(setup)
    generator = torch.Generator(setup.device).manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator, device=setup.device)

    def features(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count, device=setup.device) % classes
        rows = torch.randn(count, dim, generator=generator, device=setup.device)
        # In place: the training features alone take 10.5 GB.
        for part, own in zip(rows.split(1 << 16), labels.split(1 << 16), strict=True):
            part += 0.3 * centres[own]
        return rows, labels

    (bank, labels), (queries, truth) = features(train), features(test)
    grid = {"neighbours": (NEIGHBOURS,), "temperatures": (0.07,), "classes": classes}
    answers: list[Tensor] = []

    def search() -> None:
        answers.append(predict(queries, bank, labels, **grid)[0, 0])

    title = f"of {train:,} × {test:,} × {dim:,}"
    limit = 2 * train * test * dim / rate
    seconds = setup.seconds(search, repetitions=3, most=6.0)
    note = f"products alone, in bf16, {limit:.2g} s"
    yield (
        at_most(f"kNN {title}", seconds, SECONDS, "s", note)
        if not setup.small
        else Row(f"kNN {title}", seconds, "s", note=note)
    )
    if (peak := setup.peak(search)) is not None:
        yield Row(f"kNN {title}: memory beyond the features", peak, "GiB")
    few = setup.pick(500, 50)
    other = float((answers[-1][:few].cpu() != _plain(queries[:few], bank, labels, classes).cpu()).double().mean())
    yield Row("kNN: answers other than of plain products", other, "", "≤ 0.005", other <= 0.005, check=True)
    accuracy = float((answers[-1].cpu() == truth.cpu()).double().mean())
    yield Row("kNN: accuracy on made-up classes", accuracy)
    settings = LinearSettings(regularisations=(0.1,))
    found: list[Tensor] = []

    def probe() -> None:
        found.append(linear(bank, labels, queries, classes, settings).predictions)

    setup.wait()
    seconds = setup.once(probe)
    yield Row(
        f"linear probe of {train:,} × {dim:,}, {classes:,} classes", seconds, "s", note="one strength, cold start"
    )
    accuracy = float((found[-1].cpu() == truth.cpu()).double().mean())
    yield Row("linear probe: accuracy on made-up classes", accuracy)


def _plain(queries: Tensor, bank: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The weighted vote from one product in float32."""
    scores = torch.nn.functional.normalize(queries, dim=1) @ bank.T / bank.norm(dim=1)
    nearest, rows = scores.topk(NEIGHBOURS, dim=1)
    votes = queries.new_zeros(len(queries), classes, dtype=torch.float64)
    votes.scatter_add_(1, labels[rows], ((nearest - nearest[:, :1]).double() / 0.07).exp())
    return votes.argmax(1)
