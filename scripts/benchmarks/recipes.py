"""All recipes at equal time: kNN and linear accuracy on the test images, over several seeds."""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import harness
from manyviews import recipe as recipes

PROTOCOL = "protocol.linear.regularisations=[0.001,0.003,0.01,0.03]"
"""A part of the grid, for time's sake."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, and for how long."""
    parser.add_argument("--minutes", type=float, default=1.5, help="of training, for each run (1.5)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe on each set of images (3)")
    parser.add_argument("--data", nargs="+", default=["sample", "fashion_mnist"], help="sets of images")
    parser.add_argument("--recipes", nargs="+", default=recipes.names(), help="by name (all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the cores (1)")
    parser.add_argument("--keep", type=Path, help="folder for the runs; those already measured there are not run again")


def run(options: argparse.Namespace) -> harness.Report:
    """Trains and measures every recipe from the command line, as a user would; the baselines once for each set."""
    jobs = [(data, recipe, seed) for data, seed, recipe in product(options.data, range(options.seeds), options.recipes)]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        place = options.keep or Path(scratch)
        threads = max(1, (os.cpu_count() or 1) // options.jobs)
        first = options.recipes[0]
        reports = list(
            pool.map(
                lambda job: _measure(
                    place, *job, minutes=options.minutes, threads=threads, baselines=job[1:] == (first, 0)
                ),
                jobs,
            )
        )
    rows: list[dict[str, harness.Value]] = []
    for data in options.data:
        measured = [(job, report) for job, report in zip(jobs, reports, strict=True) if job[0] == data]
        of = {name: [report for job, report in measured if job[1] == name] for name in options.recipes}
        rows += [_row(data, name, reports, "learned") for name, reports in of.items()]
        once = [report for job, report in measured if job[1:] == (first, 0)]
        rows += [_row(data, kind, once, kind) for kind in ("random weights", "raw pixels")]
    notes = (
        f"{options.minutes:g} minutes of training for each run, {threads} threads, {options.jobs} runs at once.",
        "Accuracy on the test images in %: median (smallest-largest) over seeds; everything chosen on a part of train.",
    )
    return harness.Report(title="Recipes at equal time", rows=rows, notes=notes, packages=("timm",))


def _measure(
    place: Path, data: str, recipe: str, seed: int, *, minutes: float, threads: int, baselines: bool
) -> dict[str, Any]:
    folder = place / harness.file_name(f"{data} {recipe} {seed}")
    if not (folder / "evaluation.json").exists():
        words = [f"data={data}", f"seed={seed}", f"train.minutes={minutes}", f"train.threads={threads}"]
        measure = ["evaluate", str(folder), f"baselines={str(baselines).lower()}", PROTOCOL]
        harness.commands(threads, ["pretrain", recipe, *words, "train.monitor=0", f"output={folder}"], measure)
    report: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    report["epochs"] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["epoch"]
    return report


def _row(data: str, name: str, reports: Sequence[dict[str, Any]], kind: str) -> dict[str, harness.Value]:
    row: dict[str, harness.Value] = {"images": data, "recipe": name}
    row["epochs"] = harness.Spread.of([report["epochs"] for report in reports]).median if kind == "learned" else None
    for method in ("knn", "linear"):
        rows = [own for report in reports for own in report["measurements"] if own["metric"] == "accuracy"]
        own_rows = [own for own in rows if (own["task"], own["features"]) == (method, kind)]
        row[method] = harness.Spread.of([100 * own["value"] for own in own_rows])
    row["seeds"] = len(reports)
    return row
