"""What the tests of mining share: batches, and triples found by loops over all (anchor, positive, negative)."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from manyviews.objectives.mining import (
    All,
    Batch,
    DistanceWeighted,
    Easiest,
    Hard,
    Hardest,
    Random,
    Sampling,
    SemiHard,
    WithinMargin,
    batch_of,
    choose,
)

Triple = tuple[int, int, int]
REPEATED = torch.tensor([3, 3, 3, 8, 5, 5, 0, 9, 5, 3])
"""One id four times, one three times, three alone; over two views all have a positive."""
SAMPLERS: list[Sampling] = [
    *(All(), All(positives="hard"), Random(), Easiest(), SemiHard(), SemiHard(fallback=None)),
    *(Hard(), Hardest(), DistanceWeighted(), WithinMargin(margin=0.8, squared=True)),
]
every_sampler = pytest.mark.parametrize("kind", SAMPLERS, ids=lambda kind: kind.name)


def rival(module: str) -> Any:
    """A module of another library, whose import may warn; skips the test where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module)


def embeddings(views: int = 2, batch: int = 10, dim: int = 5, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, batch, dim, generator=generator, dtype=torch.float64).requires_grad_()


def prepared(z: Tensor, ids: Tensor, *, normalized: bool = True, seed: int = 3, step: int = 7) -> Batch:
    return batch_of(z, ids, normalized=normalized, seed=seed, step=step)


def sampled(sampling: Sampling, batch: Batch, tile: int = 1000) -> list[Triple]:
    """The triples that the samplers give, tile by tile; all negatives are listed."""
    found = []
    for start in range(0, len(batch.anchors), tile):
        rows = slice(start, min(start + tile, len(batch.anchors)))
        triples = choose(sampling, batch, rows, batch.anchors[rows].detach() @ batch.candidates.detach().T)
        mates = batch.mates(rows)
        for row in range(rows.stop - rows.start):
            others = sorted(set(range(len(batch.candidates))) - set(mates[row].tolist()))
            for column in triples.chosen[row].nonzero()[:, 0].tolist():
                negatives = others if triples.negatives is None else [int(triples.negatives[row, column])]
                found += [(start + row, int(triples.positives[row, column]), negative) for negative in negatives]
    return found


def by_loops(name: str, which: str, distances: Tensor, ids: Tensor, fallback: str | None = "easiest") -> list[Triple]:
    """The triples of the samplers that draw nothing, from a table of distances."""
    table, count, found = distances.tolist(), len(ids), []
    for a in range(count):
        near = table[a].__getitem__
        positives = [p for p in range(count) if ids[p] == ids[a] and p != a]
        negatives = [n for n in range(count) if ids[n] != ids[a]]
        if not positives or not negatives:
            continue
        if which != "all":
            positives = [(min if which == "easy" else max)(positives, key=near)]
        easiest, hardest = max(negatives, key=near), min(negatives, key=near)
        for p in positives:
            farther = [n for n in negatives if near(n) > near(p)]
            match name:
                case "all":
                    found += [(a, p, n) for n in negatives]
                case "easiest":
                    found.append((a, p, easiest))
                case "hardest":
                    found.append((a, p, hardest))
                case "hard":
                    found += [(a, p, hardest)] if near(hardest) < near(p) else []
                case _ if farther:
                    found.append((a, p, min(farther, key=near)))
                case _ if fallback:
                    found.append((a, p, easiest if fallback == "easiest" else hardest))
    return found


def table_of(z: Tensor, *, normalized: bool = True) -> Tensor:
    """Distances between all embeddings, one by one, with gradient."""
    rows = z.flatten(0, 1)
    if normalized:
        rows = rows / rows.square().sum(1, keepdim=True).sqrt()
    gaps = rows[:, None] - rows
    # The distance of a row to itself is nobody's business, and its root has no derivative.
    return (gaps.square().sum(2) + torch.eye(len(rows), dtype=rows.dtype)).sqrt()


def compare(found: Tensor, expected: Tensor, *leaves: Tensor, rtol: float = 1e-9) -> None:
    """Values and gradients of two losses."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-12)


def compare_kinds(terms: dict[str, Tensor], kinds: list[str]) -> None:
    """The shares of easy, semi-hard and hard triples with those that were listed."""
    for name in ("easy", "semi_hard", "hard"):
        assert terms[name].item() == pytest.approx(kinds.count(name) / len(kinds), abs=1e-12)
