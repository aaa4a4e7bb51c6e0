"""The nearest neighbours of test features among training features, beside faiss's and lightly's: seconds and memory."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from manyviews.engine import candidates, normalize, top_k
from manyviews.evaluators.knn import predict

DIM, NEIGHBOURS, TEMPERATURE, CLASSES = 512, 200, 0.1, 10
SIZES = ["60000x10000"]
BATCH = 256
"""Queries of a batch for lightly's function, whose callers give it the batches of their loader."""
KINDS = {
    "noise": "in all directions alike",
    "classes": "around a centre for each class and far from the origin, as features are",
}
OURS, PLAIN, VOTE, FAISS, LIGHTLY = "top_k", "top_k, float32", "predict", "faiss IndexFlatIP", "lightly knn_predict"
LIMITS = {
    "limit: products": torch.float32,
    "limit: products, bfloat16": torch.bfloat16,
    "limit: products, 8 bits": torch.int8,
}
NOTES = (
    "seconds: median (smallest–largest); the cases take turns.",
    "memory: peak resident memory over that of the process with the features in it; each in a fresh process. faiss's",
    "index is made before, so its copy of the training features is not in it.",
    f"predict and knn_predict also count the votes; knn_predict is given {BATCH} queries at a time.",
    "limit: all products and nothing else, 1,024 queries at a time.",
    "agreement: share of faiss's neighbours that are found, those that tie with the last one to 1e-6 aside; for votes,",
    "share of predictions equal to those of lightly.",
    "features: " + "; ".join(f"{name}: {text}" for name, text in KINDS.items()) + ".",
)


class Problem(NamedTuple):
    """Features of length 1, and the classes of those to be found."""

    train: Tensor
    labels: Tensor
    test: Tensor


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes to measure."""
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[_size(size) for size in SIZES],
        type=_size,
        metavar="TRAINxTEST",
        help=f"training and test features ({', '.join(SIZES)})",
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[DIM], metavar="D", help=f"their dimensions ({DIM})")
    parser.add_argument("--neighbours", type=int, default=NEIGHBOURS, metavar="K", help=f"neighbours ({NEIGHBOURS})")
    parser.add_argument("--features", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of features (all)")


def run(options: argparse.Namespace) -> harness.Report:
    """Measures every kind of features at every size."""
    rows: list[dict[str, harness.Value]] = []
    for kind in options.features:
        for size in options.sizes:
            for dim in options.dims:
                rows += _measure(kind, *size, dim, options.neighbours, options.repetitions)
    return harness.Report(
        title=f"The {options.neighbours} nearest of all training features for each test feature, float32",
        rows=rows,
        notes=NOTES,
        packages=("faiss-cpu", "lightly"),
    )


def _measure(kind: str, train: int, test: int, dim: int, k: int, repetitions: int) -> list[dict[str, harness.Value]]:
    shape = kind, train, test, dim, k
    works, skipped = {}, {}
    for name in (OURS, PLAIN, FAISS, VOTE, LIGHTLY, *LIMITS):
        try:
            works[name] = prepare(name, *shape)
        except harness.RivalMissingError as problem:
            skipped[name] = str(problem)
    answers = {name: work() for name, work in works.items()}
    times = harness.seconds(works, repetitions, warm_up=False)
    rows: list[dict[str, harness.Value]] = []
    for name in (OURS, PLAIN, FAISS, VOTE, LIGHTLY, *LIMITS):
        row: dict[str, harness.Value] = {"by": name, "features": kind, "train": train, "test": test, "d": dim}
        if name in works:
            ours = times[VOTE if name in (VOTE, LIGHTLY) else OURS].median
            row |= {"seconds": times[name], "times ours": times[name].median / ours}
        else:
            row["seconds"] = skipped[name]
        if name in works and name not in LIMITS:
            row["memory (MiB)"] = harness.peak_mebibytes(prepare, name, *shape)
            if name in (VOTE, LIGHTLY) and LIGHTLY in works:
                row["agreement"] = f"{(answers[name] == answers[LIGHTLY]).double().mean():.6f}"
            elif FAISS in works and name not in (VOTE, LIGHTLY):
                row["agreement"] = (
                    f"{_agreement(answers[name], answers[FAISS], problem_of(kind, train, test, dim)):.6f}"
                )
        rows.append(row)
    return rows


def problem_of(kind: str, train: int, test: int, dim: int) -> Problem:
    """Features of one kind, the same for each call."""
    generator = torch.Generator().manual_seed(0)
    centres, origin = torch.randn(CLASSES, dim, generator=generator), torch.randn(dim, generator=generator)
    labels = torch.arange(train + test) % CLASSES
    features = torch.randn(train + test, dim, generator=generator)
    if kind == "classes":
        features += centres[labels] + 3 * origin
    features = normalize(features)
    return Problem(features[:train].clone(), labels[:train], features[train:].clone())


def prepare(name: str, kind: str, train: int, test: int, dim: int, k: int) -> Callable[[], Tensor]:
    """One search with its features, as work that gives the neighbours, the predictions, or the last products."""
    problem = problem_of(kind, train, test, dim)
    match name:
        case _ if name == OURS:
            return lambda: top_k(problem.test, problem.train, k)[1]
        case _ if name == PLAIN:
            return lambda: _in_float32(problem, k)
        case _ if name == VOTE:
            return lambda: _votes(problem, k)
        case _ if name == FAISS:
            return _faiss(problem, k)
        case _ if name == LIGHTLY:
            return _lightly(problem, k)
        case _:
            return _products(problem, LIMITS[name])


def _in_float32(problem: Problem, k: int) -> Tensor:
    """As on a CPU without fast products of integers."""
    before, candidates.multiplies_integers = candidates.multiplies_integers, lambda: False
    try:
        return top_k(problem.test, problem.train, k)[1]
    finally:
        candidates.multiplies_integers = before


def _votes(problem: Problem, k: int) -> Tensor:
    grid = {"neighbours": (k,), "temperatures": (TEMPERATURE,)}
    return predict(problem.test, problem.train, problem.labels, classes=CLASSES, **grid)[0, 0]


def _faiss(problem: Problem, k: int) -> Callable[[], Tensor]:
    index = harness.rival("faiss", "IndexFlatIP")(problem.train.shape[1])
    harness.rival("faiss", "omp_set_num_threads")(torch.get_num_threads())
    index.add(problem.train.numpy())
    return lambda: torch.from_numpy(index.search(problem.test.numpy(), k)[1])


def _lightly(problem: Problem, k: int) -> Callable[[], Tensor]:
    knn_predict = harness.rival("lightly.utils.benchmarking", "knn_predict")
    bank = problem.train.T.contiguous()
    arguments = {"num_classes": CLASSES, "knn_k": k, "knn_t": TEMPERATURE}

    def work() -> Tensor:
        batches = problem.test.split(BATCH)
        return torch.cat([knn_predict(batch, bank, problem.labels, **arguments)[:, 0] for batch in batches])

    return work


def _products(problem: Problem, kind: torch.dtype) -> Callable[[], Tensor]:
    integers = kind == torch.int8
    train, test = ((127 * part if integers else part).to(kind) for part in (problem.train, problem.test))
    found = torch.empty(1024, len(train), dtype=torch.int32 if integers else kind)
    multiply = torch._int_mm if integers else torch.mm

    def work() -> Tensor:
        for batch in test.split(1024):
            multiply(batch, train.T, out=found[: len(batch)])
        return found

    return work


def _agreement(found: Tensor, expected: Tensor, problem: Problem) -> float:
    missing = 0
    for query, own, others in zip(problem.test, found, expected, strict=True):
        lost = others[~torch.isin(others, own)]
        if len(lost):
            last = (problem.train[own].double() @ query.double()).min()
            missing += int((problem.train[lost].double() @ query.double() > last + 1e-6).sum())
    return 1 - missing / expected.numel()


def _size(text: str) -> tuple[int, int]:
    train, _, test = text.partition("x")
    return int(train), int(test)
