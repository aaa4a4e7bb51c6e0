"""Mined triplets and pairs with their gradient, beside pytorch-metric-learning's: seconds and peak memory."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from manyviews.objectives import Population
from manyviews.objectives.margin import Margin
from manyviews.objectives.mining import All, Hardest
from manyviews.objectives.triplet import Triplet

DIM, PER_CLASS = 128, 4
SIZES = (256, 1_024, 4_096)
MEBIBYTE = 2**20
OURS, THEIRS = "manyviews", "pytorch-metric-learning"


class Case(NamedTuple):
    """One loss with its sampling, here and there."""

    settings: Any
    miner: str
    """Of the rival; empty: the loss has all triplets."""
    options: dict[str, Any]
    needed: Callable[[int], float]
    """Bytes at the rival's peak as a function of the embeddings, counted by measuring smaller sizes."""


def _triplets(size: int) -> float:
    # Some numbers for each triplet; and a byte for each anchor, positive and negative, while int32 counts these.
    cube = size**3 if size**3 < 2**31 else 0
    return cube + 100.0 * size**2 * (PER_CLASS - 1)


CASES = {
    "triplet, semi-hard": Case(
        Triplet(), "TripletMarginMiner", {"margin": 0.2, "type_of_triplets": "semihard"}, _triplets
    ),
    "triplet, batch-hard": Case(Triplet(sampling=Hardest()), "BatchHardMiner", {}, lambda size: 51.0 * size**2),
    "triplet, all": Case(Triplet(sampling=All()), "", {}, _triplets),
    "margin, distance-weighted": Case(Margin(), "DistanceWeightedMiner", {}, lambda size: 245.0 * size**2),
}
NOTES = (
    f"{PER_CLASS} embeddings of each class; each class around a point of its own, as after some training.",
    "seconds: median (smallest–largest); the cases take turns.",
    "memory: peak resident memory over that of the process with the embeddings in it; each in a fresh process.",
    "semi-hard: here the nearest negative farther than the positive, there all of them within the margin; it has no",
    "other semi-hard miner.",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes to measure."""
    sizes = ", ".join(f"{size:,}" for size in SIZES)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, metavar="N", help=f"embeddings in the batch ({sizes})"
    )


def run(options: argparse.Namespace) -> harness.Report:
    """Measures every loss at every size."""
    rows: list[dict[str, harness.Value]] = []
    for case in CASES:
        for size in options.sizes:
            rows += _measure(case, size, options.repetitions)
    return harness.Report(
        title=f"A step of mined triplets and pairs, forward and backward, float32, d = {DIM}",
        rows=rows,
        notes=NOTES,
        packages=(THEIRS,),
    )


def _measure(case: str, size: int, repetitions: int) -> list[dict[str, harness.Value]]:
    works = {OURS: prepare(OURS, case, size)}
    skipped = ""
    needed, there = CASES[case].needed(size) / MEBIBYTE, harness.available_mebibytes()
    if needed > 0.8 * there:
        skipped = f"needs about {needed / 1024:,.0f} GiB, {there / 1024:,.0f} GiB are free"
    else:
        try:
            works[THEIRS] = prepare(THEIRS, case, size)
        except harness.RivalMissingError as problem:
            skipped = str(problem)
    times = harness.seconds(works, repetitions)
    memory = {name: harness.peak_mebibytes(prepare, name, case, size) for name in works}
    rows: list[dict[str, harness.Value]] = []
    for name in (OURS, THEIRS):
        row: dict[str, harness.Value] = {"loss": case, "by": name, "embeddings": size}
        if name in times:
            row |= {
                "seconds": times[name],
                "times ours": times[name].median / times[OURS].median,
                "memory (MiB)": memory[name],
            }
            if (used := memory[name]) and (own := memory[OURS]):
                row["memory, times ours"] = used / own
        else:
            row["seconds"] = skipped
        rows.append(row)
    return rows


def prepare(name: str, case: str, size: int) -> Callable[[], object]:
    """One loss with its inputs, as work that ends with the gradient."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(size // PER_CLASS).repeat_interleave(PER_CLASS)
    centres = torch.randn(len(ids) // PER_CLASS, DIM, generator=generator)
    # Half of the variance is the class's: cosines of 0.5 within a class.
    embeddings = (centres[ids] + torch.randn(len(ids), DIM, generator=generator)).requires_grad_()
    loss = _ours(CASES[case], ids) if name == OURS else _theirs(CASES[case], ids)

    def work() -> None:
        embeddings.grad = None
        torch.autograd.backward(loss(embeddings))
        assert embeddings.grad is not None
        assert math.isfinite(float(embeddings.grad[0, 0]))

    return work


def _ours(case: Case, ids: Tensor) -> Callable[[Tensor], Tensor]:
    objective = case.settings.build(dim=DIM, population=Population(ids), seed=0)
    return lambda rows: objective(rows[None], ids, None, 0).total


def _theirs(case: Case, ids: Tensor) -> Callable[[Tensor], Tensor]:
    if isinstance(case.settings, Margin):
        loss = harness.rival("pytorch_metric_learning.losses", "MarginLoss")(margin=0.2, beta=1.2, learn_beta=True)
    else:
        squared = harness.rival("pytorch_metric_learning.distances", "LpDistance")(power=2)
        loss = harness.rival("pytorch_metric_learning.losses", "TripletMarginLoss")(margin=0.2, distance=squared)
    if not case.miner:
        return lambda rows: loss(rows, ids)
    options = case.options | ({} if isinstance(case.settings, Margin) else {"distance": squared})
    miner = harness.rival("pytorch_metric_learning.miners", case.miner)(**options)
    return lambda rows: loss(rows, ids, miner(rows, ids))
