"""Fine-tuning from few labels: a pretrained backbone beside training from scratch and the linear probe."""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from manyviews.evaluators.fractions import FractionSettings, fractions

SCRATCH = ("scratch=true", "mode=full", "layer_decay=1")
"""Random weights: no reason to spare the first layers, and no features for a head to begin from."""
RATES = (0.001, 0.003, 0.01, 0.03)
EPOCHS, STEPS = 20, 300
"""The budget of both: passes over the labelled images, and fewest steps."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is fine-tuned, and how often."""
    parser.add_argument("--run", type=Path, help="a run to fine-tune (one is pretrained with the quickstart recipe)")
    parser.add_argument("--minutes", type=float, default=3.0, help="of that pretraining (3)")
    parser.add_argument("--data", default="fashion_mnist", help="the images (fashion_mnist)")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.01, 0.1], help="of the labels (0.01 0.1)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, with other labels too (3)")
    parser.add_argument("--longer", type=int, default=3, help="so many times the budget from scratch (3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each with its share of the cores (2)")
    parser.add_argument("--keep", type=Path, help="folder for the runs; those already measured there are not run again")


def run(options: argparse.Namespace) -> harness.Report:
    """Pretrains, fine-tunes and trains from scratch by the words of the command line."""
    with tempfile.TemporaryDirectory() as scratch:
        place = options.keep or Path(scratch)
        pretrained = options.run or place / "pretrained"
        if options.run is None and not (pretrained / "done").exists():
            words = [f"data={options.data}", f"train.minutes={options.minutes}", "train.monitor=0"]
            harness.commands(os.cpu_count() or 1, ["pretrain", "quickstart", *words, f"output={pretrained}"])
        rows = _rows(pretrained, place, options)
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    notes = (
        f"Accuracy on all test images in %: mean and deviation over {options.seeds} seeds, which draw the labels too.",
        f"A fifth of the labels is held out to choose the epoch; budget: {EPOCHS} epochs, at least {STEPS} steps.",
        f"From scratch: no layer-wise rates; of the rates {rates} the best by held-out accuracy of the first seed.",
    )
    return harness.Report(title="Fine-tuning from few labels", rows=rows, notes=notes, packages=("timm",))


def _rows(pretrained: Path, place: Path, options: argparse.Namespace) -> list[Mapping[str, harness.Value]]:
    threads, seeds = max(1, (os.cpu_count() or 1) // options.jobs), range(options.seeds)

    def tune(name: str, times: int, fraction: float, seed: int, *words: str) -> dict[str, Any]:
        folder = place / f"{name}-{times}x-{fraction:g}-{seed}"
        if not (folder / "result.json").exists():
            words += (f"data={options.data}", f"fraction={fraction}", f"seed={seed}", f"threads={threads}")
            # What was interrupted before goes on.
            words += (f"epochs={times * EPOCHS}", f"min_steps={times * STEPS}", f"output={folder}", "resume=true")
            harness.commands(threads, ["finetune", str(pretrained), *words])
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return found

    def scratch(rate: float, times: int, fraction: float, seed: int) -> dict[str, Any]:
        return tune(f"scratch-{rate:g}", times, fraction, seed, *SCRATCH, f"rate={rate}")

    def held_out(fraction: float, rate: float) -> float:
        accuracy: float = tried[fraction, rate].result()["best_accuracy"]
        return accuracy

    rows: list[Mapping[str, harness.Value]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        probes = pool.submit(_probes, pretrained, place, options, threads)
        pairs = list(product(options.fractions, seeds))
        tuned = {pair: pool.submit(tune, "finetuned", 1, *pair) for pair in pairs}
        tried = {
            (fraction, rate): pool.submit(scratch, rate, 1, fraction, 0)
            for fraction, rate in product(options.fractions, RATES)
        }
        best = {fraction: max(RATES, key=partial(held_out, fraction)) for fraction in options.fractions}
        budgets = sorted({1, options.longer})
        plain = {
            (times, *pair): pool.submit(scratch, best[pair[0]], times, *pair) for times, pair in product(budgets, pairs)
        }
        for fraction in options.fractions:
            cases = {"fine-tuned": [tuned[fraction, seed].result() for seed in seeds]}
            for times in budgets:
                name = f"from scratch, {times} × the budget, rate {best[fraction]:g}"
                cases[name] = [plain[times, fraction, seed].result() for seed in seeds]
            labels = cases["fine-tuned"][0]["images"]["labelled"]
            rows.append(_row(labels, "linear probe on frozen features", probes.result()[fraction]))
            for name, results in cases.items():
                seconds = statistics.median(found["seconds"] for found in results)
                rows.append(_row(labels, name, [found["accuracy"] for found in results]) | {"seconds": seconds})
    return rows


def _row(labels: int, name: str, accuracies: Sequence[float]) -> dict[str, harness.Value]:
    percent = [100 * accuracy for accuracy in accuracies]
    deviation = statistics.stdev(percent) if len(percent) > 1 else None
    row: dict[str, harness.Value] = {
        "labels": f"{labels:,}",
        "method": name,
        "mean": f"{statistics.fmean(percent):.1f}",
    }
    return row | {"deviation": None if deviation is None else f"{deviation:.1f}", "seeds": len(percent)}


def _probes(pretrained: Path, place: Path, options: argparse.Namespace, threads: int) -> dict[float, list[float]]:
    """The accuracies of the linear probe by fraction, on the same labelled images as the fine-tuned ones."""
    parts = []
    for split in ("train", "test"):
        folder = place / f"features-{split}"
        words = [f"data={options.data}", f"split={split}", f"threads={threads}", f"output={folder}"]
        harness.commands(threads, ["extract", str(pretrained), *words])
        parts += [torch.from_numpy(np.load(folder / name)) for name in ("backbone.npy", "labels.npy")]
    train, labels, test, test_labels = parts
    settings, classes = FractionSettings(shares=tuple(options.fractions), shots=(), draws=2), int(labels.max()) + 1
    found: dict[float, list[float]] = {fraction: [] for fraction in options.fractions}
    for seed in range(options.seeds):
        # The first draw of a seed is the one that fine-tuning makes.
        results = fractions(train, labels, test, test_labels, classes, settings, seed=seed)
        for fraction, result in zip(sorted(options.fractions), results, strict=True):
            found[fraction].append(result.details["accuracies"][0])
    return found
