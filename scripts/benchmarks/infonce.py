"""The in-batch loss with its gradient, beside lightly's and pytorch-metric-learning's: seconds and peak memory."""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from manyviews.objectives.in_batch import nt_xent

DIM, TEMPERATURE = 128, 0.1
SIZES = (2_048, 16_384, 131_072)
MEBIBYTE = 2**20
PLAIN = "plain torch"
"""The whole matrix of scores, as a few lines of torch make it."""
RIVALS: dict[str, Callable[[int], float]] = {
    # Bytes at the peak as a function of the embeddings: N×N matrices of float32, counted by measuring smaller sizes.
    "lightly NTXentLoss": lambda size: 4.25 * size**2 * 4,
    # All positive pairs times all negative pairs: cubic.
    "pytorch-metric-learning NTXentLoss": lambda size: 4.3 * size**3 * 4,
    # With one positive per anchor the same value, and only quadratic.
    "pytorch-metric-learning SupConLoss": lambda size: 11.4 * size**2 * 4,
}


NOTES = (
    "seconds: median (smallest–largest); the cases take turns.",
    "memory: peak resident memory over that of the process with the embeddings in it; each in a fresh process.",
    "limit: only the products (half a matrix of scores in forward; in backward again, and two products with it),",
    "at the rate of a 2,048-cubed float32 product in the same run (median).",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes to measure."""
    sizes = ", ".join(f"{size:,}" for size in SIZES)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=SIZES,
        metavar="N",
        help=f"embeddings, two views of N/2 images ({sizes})",
    )


def run(options: argparse.Namespace) -> harness.Report:
    """Measures every size; the large one once, for it takes a minute."""
    rows: list[dict[str, harness.Value]] = []
    for size in options.sizes:
        rows += _measure(size, options.repetitions if size <= 16_384 else 1)
    return harness.Report(
        title=f"NT-Xent, forward and backward, float32, d = {DIM}, temperature {TEMPERATURE}",
        rows=rows,
        notes=NOTES,
        packages=("lightly", "pytorch-metric-learning"),
    )


def _measure(size: int, repetitions: int) -> list[dict[str, harness.Value]]:
    works: dict[str, Callable[[], object]] = {"manyviews": prepare("manyviews", size)}
    skipped: dict[str, str] = {}
    for name, estimate in RIVALS.items():
        needed, there = estimate(size) / MEBIBYTE, harness.available_mebibytes()
        if needed > 0.8 * there:
            skipped[name] = f"needs about {needed / 1024:,.0f} GiB, {there / 1024:,.0f} GiB are free"
            continue
        try:
            works[name] = prepare(name, size)
        except harness.RivalMissingError as problem:
            skipped[name] = str(problem)
    square = torch.randn(2048, 2048)
    times = harness.seconds({**works, "product": lambda: square @ square}, repetitions, warm_up=size <= 16_384)
    limit = 4 * size**2 * DIM / (2 * 2048**3 / times.pop("product").median)
    ours = times["manyviews"].median
    memory = {name: harness.peak_mebibytes(prepare, name, size) for name in times}
    rows: list[dict[str, harness.Value]] = []
    for name in ("manyviews", *RIVALS):
        row: dict[str, harness.Value] = {"loss": name, "embeddings": size}
        if name in times:
            row |= {
                "seconds": times[name],
                "times ours": times[name].median / ours,
                "memory (MiB)": memory[name],
            }
            if (used := memory[name]) and (own := memory["manyviews"]):
                row["memory, times ours"] = used / own
        else:
            row["seconds"] = skipped[name]
        rows.append(row)
    rows.append({"loss": "limit", "embeddings": size, "seconds": limit, "times ours": limit / ours})
    return rows


def prepare(name: str, size: int, device: str = "cpu") -> Callable[[], object]:
    """One loss with its inputs, as work that ends with the gradient."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(size // 2, DIM, generator=generator) for _ in range(2)]
    loss = _loss(name, size, device)
    embeddings = torch.stack(views).to(device).requires_grad_()
    del views

    def work() -> None:
        embeddings.grad = None
        torch.autograd.backward(loss(embeddings))
        assert embeddings.grad is not None
        assert math.isfinite(float(embeddings.grad[0, 0, 0]))

    return work


def _loss(name: str, size: int, device: str) -> Callable[[Tensor], Tensor]:
    ids = torch.arange(size // 2, device=device)
    match name:
        case "manyviews":
            return lambda views: nt_xent(views, ids, TEMPERATURE).total
        case _ if name == PLAIN:
            return _plain
        case "lightly NTXentLoss":
            lightly = harness.rival("lightly.loss", "NTXentLoss")(temperature=TEMPERATURE)
            return lambda views: lightly(views[0], views[1])
        case _:
            metric = harness.rival("pytorch_metric_learning.losses", name.split()[1])(temperature=TEMPERATURE)
            return lambda views: metric(views.flatten(0, 1), ids.repeat(2))


def _plain(views: Tensor) -> Tensor:
    unit = F.normalize(views.flatten(0, 1), dim=1)
    scores = unit @ unit.T / TEMPERATURE
    scores = scores.masked_fill(torch.eye(len(unit), dtype=torch.bool, device=unit.device), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(unit), device=unit.device).roll(len(unit) // 2))
