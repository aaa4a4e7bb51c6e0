"""One step of a memory bank, exact and estimated: time and memory beside the original layout of NCE and the limit."""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from manyviews.objectives import Bank, Population
from manyviews.objectives.sharded_rows import unit_rows

DIM, QUERIES, NEGATIVES, TEMPERATURE, MOMENTUM = 128, 256, 4096, 0.07, 0.5
SIZES = (60_000, 1_281_167)
MEBIBYTE = 2**20
OURS: dict[str, dict[str, object]] = {
    "exact softmax, float32 bank": {},
    "exact softmax, bfloat16 bank": {"storage": "bfloat16"},
    "NCE, 4,096 shared noise rows": {"estimator": "nce", "negatives": NEGATIVES},
    "NCE, 4,096 noise rows per image": {"estimator": "nce", "negatives": NEGATIVES, "shared": False},
    "InfoNCE, 4,096 shared noise rows": {"estimator": "infonce", "negatives": NEGATIVES},
}
ORIGINAL, PLAIN = "NCE, 4,096 rows per image, original layout", "exact softmax, plain full logits"
HEADLINE = ["exact softmax, float32 bank", "exact softmax, bfloat16 bank", ORIGINAL]
NOTES = (
    f"One step: forward, backward and update, {QUERIES} queries, d = {DIM}.",
    "seconds: median (smallest–largest); exact softmax and original NCE take turns with the product that is the limit,",
    "then the other estimates, then the full logits by themselves.",
    "step memory: peak resident memory over that of the process with bank and queries in it; in a fresh process.",
    "limit: the two products of the exact softmax, scores and weighted rows, in float32 at the rate of a 2,048-cubed",
    "product in the same run (median).",
    "original layout: rows gathered to queries × (noise + 1) × d, products and exponentials as in the authors' code",
    "(lemniscate.pytorch, lib/NCEAverage.py), with uniform draws in place of the alias method, and Z given.",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes to measure."""
    sizes = ", ".join(f"{size:,}" for size in SIZES)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help=f"rows ({sizes})")


def run(options: argparse.Namespace) -> harness.Report:
    """Measures every size."""
    rows: list[dict[str, harness.Value]] = []
    for size in options.sizes:
        rows += _measure(size, options.repetitions)
    return harness.Report(title="A step of instance discrimination over a memory bank", rows=rows, notes=NOTES)


def _measure(size: int, repetitions: int) -> list[dict[str, harness.Value]]:
    names = (*OURS, ORIGINAL, PLAIN)
    times: dict[str, harness.Spread] = {}
    products: list[harness.Spread] = []
    # Three banks in memory at a time, and the case that fills the memory by itself: no other case pays for it.
    for group in (HEADLINE, [name for name in names if name not in HEADLINE and name != PLAIN], [PLAIN]):
        square = torch.randn(2048, 2048)
        works = {name: prepare(name, size) for name in group}
        times |= harness.seconds({**works, "product": lambda square=square: square @ square}, repetitions)
        products.append(times.pop("product"))
        del works
    limit = 4 * QUERIES * size * DIM / (2 * 2048**3 / products[0].median)
    rival = times[ORIGINAL]
    rows: list[dict[str, harness.Value]] = []
    for name, spread in ((name, times[name]) for name in names):
        width = 2 if OURS.get(name, {}).get("storage") == "bfloat16" else 4
        rows.append(
            {
                "step": name,
                "rows": size,
                "seconds": spread,
                "of the original NCE": spread.median / rival.median,
                "limit / time": limit / spread.median if name.startswith("exact") else None,
                "bank (MiB)": size * DIM * width / MEBIBYTE,
                "step memory (MiB)": harness.peak_mebibytes(prepare, name, size),
            }
        )
    rows.append({"step": "limit", "rows": size, "seconds": limit, "of the original NCE": limit / rival.median})
    return rows


def prepare(name: str, size: int, queries: int = QUERIES, device: str = "cpu") -> Callable[[], object]:
    """One case with its bank and queries, as work that ends with the bank updated."""
    drawn = torch.randn(1, queries, DIM, generator=torch.Generator().manual_seed(0))
    embeddings = drawn.to(device).requires_grad_()
    ids = torch.randperm(size, generator=torch.Generator().manual_seed(1))[:queries].to(device)
    if name in OURS:
        objective = Bank.model_validate({"temperature": TEMPERATURE, "momentum": MOMENTUM, **OURS[name]}).build(
            dim=DIM, population=Population(torch.arange(size)), seed=0
        )
        objective = objective.to(device)
        steps = iter(range(1 << 30))

        def step() -> None:
            embeddings.grad = None
            loss: Tensor = objective(embeddings, ids, None, next(steps)).total
            torch.autograd.backward(loss)
            objective.update(embeddings.detach(), ids, None)
            assert embeddings.grad is not None
            assert math.isfinite(float(loss.detach()))

        return step

    rows = unit_rows(slice(0, size), DIM, seed=0).to(device)
    loss_of = _original_nce if name == ORIGINAL else _full_logits

    def rival() -> None:
        embeddings.grad = None
        unit = F.normalize(embeddings[0], dim=1)
        loss = loss_of(unit, ids, rows)
        torch.autograd.backward(loss)
        with torch.no_grad():
            moved = MOMENTUM * rows[ids] + (1 - MOMENTUM) * unit
            rows.index_copy_(0, ids, F.normalize(moved, dim=1))
        assert embeddings.grad is not None
        assert math.isfinite(float(loss.detach()))

    return rival


def _full_logits(queries: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(queries @ rows.T / TEMPERATURE, ids)


def _original_nce(queries: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    count = len(queries)
    drawn = torch.randint(len(rows), (count, NEGATIVES + 1), device=rows.device)
    drawn[:, 0] = ids
    weight = rows.index_select(0, drawn.flatten()).view(count, NEGATIVES + 1, DIM)
    normaliser = len(rows) * math.exp(0.5 / (DIM * TEMPERATURE**2))
    probability = torch.bmm(weight, queries.unsqueeze(2)).squeeze(2).div(TEMPERATURE).exp().div(normaliser)
    share = NEGATIVES / len(rows)
    data = probability[:, 0].div(probability[:, 0] + share + 1e-7).log().sum()
    noise = (share / (probability[:, 1:] + share + 1e-7)).log().sum()
    return -(data + noise) / count
