"""Table 1 of Wu et al. 2018, and accuracy against the number of negatives: kNN on the test images, over seeds."""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness

PROTOCOL = "protocol.linear.regularisations=[0.01]"
"""The linear probe is not asked for here: one strength is the least of it."""
BATCHES, QUEUES, NOISE = (32, 64, 128, 256, 512), (64, 256, 1_024, 4_096), (1, 10, 512, 4_096)
EPOCHS = {"table": 15.0, "queue": 5.0, "in_batch": 5.0}
BASELINES = ("random weights", "raw pixels")


class Case(NamedTuple):
    """What is trained, from the command line as a user would."""

    part: str
    name: str
    negatives: int | None
    words: tuple[str, ...]
    published: float | None = None
    """kNN accuracy on CIFAR-10 in Wu et al. 2018, table 1."""


def _table() -> list[Case]:
    bank, published = "instance_discrimination", dict(zip(NOISE, (42.5, 63.4, 78.4, 80.4), strict=True))
    return [
        Case("table", "parametric softmax", None, (bank, "objective.estimator=parametric"), 63.0),
        *(
            Case(
                "table",
                f"NCE m = {number:,}",
                number,
                (
                    bank,
                    "objective.estimator=nce",
                    f"objective.negatives={number}",
                    "objective.shared=false",
                ),
                published[number],
            )
            for number in NOISE
        ),
        Case("table", "exact softmax", None, (bank, "objective.estimator=exact"), 80.8),
    ]


def _queue() -> list[Case]:
    # One view as query, the other as key; the batch is that of the smallest queue.
    words = ("moco", "objective.symmetric=false", f"train.batch_size={min(QUEUES)}")
    return [Case("queue", f"queue of {size:,}", size, (*words, f"objective.size={size}")) for size in QUEUES]


def _in_batch() -> list[Case]:
    # The rate grows with the root of the batch, as is usual for Adam: each batch size has a rate made for it.
    words = ("simclr", "optim.scale=sqrt")
    return [
        Case("in_batch", f"batch of {size}", 2 * size - 2, (*words, f"train.batch_size={size}")) for size in BATCHES
    ]


PARTS: dict[str, Callable[[], list[Case]]] = {"table": _table, "queue": _queue, "in_batch": _in_batch}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, for how long and how often."""
    default = ", ".join(f"{name} {number:g}" for name, number in EPOCHS.items())
    parser.add_argument("--epochs", type=float, metavar="N", help=f"of training, for each run ({default})")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each case (3)")
    parser.add_argument("--data", default="sample", help="images: sample (10,000 of Fashion-MNIST), fashion_mnist, …")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=int, default=cores, metavar="N", help=f"runs at once, each with its share of the cores ({cores})"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="for the runs; those already measured there are not run again"
    )
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="of the benchmark (all)")


def run(options: argparse.Namespace) -> harness.Report:
    """Trains and measures every case with every seed, and says where the order is not the expected one."""
    cases = [case for part in options.parts for case in PARTS[part]()]
    jobs = [(case, seed) for seed in range(options.seeds) for case in cases]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        place = options.keep or Path(scratch)
        reports = list(pool.map(lambda job: _measure(place, *job, options, baselines=job == jobs[0]), jobs))
    measured: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    for (case, _), report in zip(jobs, reports, strict=True):
        measured[case.name].append(report)
    rows = [_row(case, measured[case.name]) for case in cases]
    rows += [_baseline(kind, reports[0]) for kind in BASELINES]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    notes = [
        f"{options.data}, light_resnet; {threads} threads for each run, {options.jobs} runs at once.",
        "kNN accuracy on the test images in %, k and temperature chosen on a part of the training images.",
        "deviation: over seeds (n - 1). published: kNN on CIFAR-10, Wu et al. 2018, table 1.",
        "Within a part all cases see equally many images, and but for in_batch take equally many steps; there the rate",
        "grows with the root of the batch.",
        "NCE draws noise for each image, as in the paper.",
        *_verdicts(cases, {name: _accuracies(found) for name, found in measured.items()}),
    ]
    return harness.Report(title="Accuracy and the number of negatives", rows=rows, notes=notes, packages=("timm",))


def _measure(place: Path, case: Case, seed: int, options: argparse.Namespace, *, baselines: bool) -> dict[str, Any]:
    epochs = options.epochs or EPOCHS[case.part]
    folder = place / harness.file_name(f"{options.data} {epochs:g} {case.name} {seed}")
    if not (folder / "evaluation.json").exists():
        threads = max(1, (os.cpu_count() or 1) // options.jobs)
        recipe, *words = case.words
        words += [f"data={options.data}", f"seed={seed}", f"train.epochs={epochs}", f"train.threads={threads}"]
        # A run that was cut off goes on.
        words += ["train.monitor=0", "train.preview=0", f"output={folder}", "resume=true"]
        measure = ["evaluate", str(folder), f"baselines={str(baselines).lower()}", PROTOCOL]
        harness.commands(threads, ["pretrain", recipe, *words], measure)
    report: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line][-1]
    return report | {"epochs": last["epoch"], "seconds": last["seconds"], "negatives": last["negatives"]}


def _accuracies(reports: Sequence[dict[str, Any]], kind: str = "learned") -> list[float]:
    rows = [own for report in reports for own in report["measurements"] if own["metric"] == "accuracy"]
    return [100 * own["value"] for own in rows if (own["task"], own["features"]) == ("knn", kind)]


def _row(case: Case, reports: Sequence[dict[str, Any]]) -> dict[str, harness.Value]:
    found = _accuracies(reports)
    return {
        "part": case.part,
        "case": case.name,
        "negatives": round(reports[0]["negatives"]),
        "published": case.published,
        "kNN, mean": round(statistics.mean(found), 2),
        "deviation": round(statistics.stdev(found), 2) if len(found) > 1 else None,
        "kNN, median": harness.Spread.of(found),
        "epochs": round(reports[0]["epochs"], 2),
        "training (s)": harness.Spread.of([report["seconds"] for report in reports]).median,
    }


def _baseline(kind: str, report: dict[str, Any]) -> dict[str, harness.Value]:
    return {"part": "baseline", "case": kind, "kNN, mean": round(_accuracies([report], kind)[0], 2)}


def _verdicts(cases: Sequence[Case], found: dict[str, list[float]]) -> list[str]:
    """For each part the pairs whose order by the mean is not the expected one: the paper's, or more being better."""
    lines: list[str] = []
    for part in dict.fromkeys(case.part for case in cases):
        expected = {
            case.name: case.published if case.published is not None else float(case.negatives or 0)
            for case in cases
            if case.part == part
        }
        rule = "the paper's order" if part == "table" else "the order by the number of negatives"
        differing = []
        for better, worse in combinations(sorted(expected, key=lambda name: -expected[name]), 2):
            one, two = found[better], found[worse]
            if statistics.mean(one) >= statistics.mean(two):
                continue
            overlap = "" if max(one) < min(two) else ", though seeds overlap"
            differing.append(
                f"{worse} ({statistics.mean(two):.2f}) is ahead of {better} ({statistics.mean(one):.2f}){overlap}"
            )
        pairs = len(expected) * (len(expected) - 1) // 2
        lines.append(
            f"{part}: {len(differing)} of {pairs} pairs are not in {rule}: {'; '.join(differing)}."
            if differing
            else f"{part}: all {pairs} pairs are in {rule}."
        )
    return lines
