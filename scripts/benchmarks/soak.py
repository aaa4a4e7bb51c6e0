"""Hours in little: runs that are killed, signalled, littered and whose disk is full end as if nothing had happened."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks import harness
from benchmarks.soaking import full_disk
from benchmarks.soaking.attempts import Outcome, Tally, disturb
from benchmarks.soaking.child import NOT_FINITE
from benchmarks.soaking.litter import MARK
from benchmarks.soaking.starts import Case

IMAGES, BATCH = 256, 16
SMALL = (
    *("data.name=folder", "data.size=16", "data.channels=1", "data.holdout=0", "data.max_bad=0.2", "views.size=16"),
    *("encoder.projector.hidden=16", "encoder.projector.dim=8"),
    *("train.precision=fp32", "train.threads=1", "train.workers=0", "train.preview=0", "train.monitor=4"),
    *(f"train.batch_size={BATCH}", "train.log_every=5", "train.save_minutes=0.002"),
)
OBJECTIVES = {
    "in_batch": (),
    "bank": ("objective=bank", "views.num_views=1"),
    "queue": ("objective=queue", "objective.size=40", "encoder.batch_norm_splits=2"),
}
SHARES = (("in_batch", 1, 0.2), ("bank", 1, 0.25), ("queue", 1, 0.25), ("bank", 2, 0.15), ("queue", 2, 0.15))
"""Objective, processes, and the share of all faults that the run bears."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """How many faults, over how many steps."""
    parser.add_argument("--share", type=float, default=1.0, help="of all faults and steps, for a shorter soak (1)")
    parser.add_argument("--steps", type=int, default=1_500, help="of each run (1500)")
    parser.add_argument("--kills", type=int, default=220, help="kill −9, half of them aimed at a checkpoint (220)")
    parser.add_argument("--signals", type=int, default=160, help="SIGTERM, SIGINT and SIGUSR1 in turn (160)")
    parser.add_argument("--litters", type=int, default=36, help="damaged and stray files between two starts (36)")
    parser.add_argument("--full", type=int, default=80, help="times that the disk is full (80)")
    parser.add_argument("--seed", type=int, default=0, help="which faults, and when (0)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (2)")
    parser.add_argument("--place", type=Path, help="where the runs are written (a temporary folder)")


def run(options: argparse.Namespace) -> harness.Report:
    """Soaks each run in a process of its own, which forks every start."""
    # Read by OpenMP when a process imports torch: one that is forked later may have one thread only.
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        tempfile.TemporaryDirectory(dir=options.place) as scratch,
        ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        # Those on two processes, which take longest, come first.
        waiting = [pool.submit(_soak, index, Path(scratch), options) for index in reversed(range(len(SHARES)))]
        waiting += [pool.submit(_fill, index, Path(scratch), options) for index in (1, 3)]
        outcomes = [done.result() for done in as_completed(waiting)]
    return harness.Report("Faults, and what was lost", [*_rows(outcomes)], _notes(outcomes, options))


def _soak(index: int, scratch: Path, options: argparse.Namespace) -> Outcome:
    place = scratch / f"soak-{index}"
    share = options.share * SHARES[index][2]
    faults = [round(number * share) for number in (options.kills, options.signals, options.litters)]
    return disturb(_case(index, place, options, *faults), place, options.seed)


def _fill(index: int, scratch: Path, options: argparse.Namespace) -> Outcome:
    place = scratch / f"fill-{index}"
    return full_disk.fill(
        _case(index, place, options, 0, 0, 0), place, options.seed, round(options.full * options.share / 2)
    )


def _case(index: int, place: Path, options: argparse.Namespace, kills: int, signals: int, litters: int) -> Case:
    objective, processes, _ = SHARES[index]
    images = place / "images"
    for number in range(IMAGES):
        folder = images / "abcd"[number % 4]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16), np.uint8) // (1 + number % 4)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (images / "a" / "cut off.png").write_bytes((images / "a" / "0.png").read_bytes()[:60])
    epochs = options.share * options.steps * BATCH / IMAGES
    words = (*SMALL, *OBJECTIVES[objective], f"data.path={images}", f"train.epochs={epochs}", f"seed={options.seed}")
    return Case(objective, words, processes, kills, signals, litters)


def _rows(outcomes: Sequence[Outcome]) -> list[dict[str, harness.Value]]:
    """One row for each kind of fault, over all runs."""
    rows: list[dict[str, harness.Value]] = []
    for kind in dict.fromkeys(kind for outcome in outcomes for kind in outcome.tallies):
        met = [outcome for outcome in outcomes if kind in outcome.tallies]
        tallies = [outcome.tallies[kind] for outcome in met]
        whole = Tally(
            sum(tally.times for tally in tallies),
            sum(tally.inside for tally in tallies),
            [steps for tally in tallies for steps in tally.lost],
            [seconds for tally in tallies for seconds in tally.seconds],
        )
        rows.append(
            {
                "fault": kind,
                "times": whole.times,
                "inside writing": whole.inside,
                "steps taken again": f"{median(whole.lost):.0f} (at most {max(whole.lost)})" if whole.lost else None,
                "seconds to leave": harness.Spread.of(whole.seconds) if whole.seconds else None,
                "equal at the end": "no" if any(outcome.unequal for outcome in met) else "yes",
            }
        )
    return rows


def _notes(outcomes: Sequence[Outcome], options: argparse.Namespace) -> list[str]:
    steps, runs, starts = (
        round(options.share * options.steps),
        sum(outcome.runs for outcome in outcomes),
        sum(outcome.starts for outcome in outcomes),
    )
    covered = ", ".join(f"{name} on {processes}" for name, processes, _ in SHARES)
    notes = [
        f"{runs} runs of {steps:,} steps ({covered}) in {starts:,} starts.",
        f"Of the last process every {NOT_FINITE}th loss is NaN: all processes skip that step.",
        "equal: weights, optimiser, objective, twin, exported backbone, metrics and TensorBoard's points are bitwise",
        "those of the undisturbed run, which fresh interpreters made.",
        "inside writing: a checkpoint was found half written; one was begun every 0.12 seconds of training.",
        "steps taken again: median and most, from a fault to where the next start went on.",
        "seconds to leave: from a signal, or another process's death, until all had left.",
        f"The disk was {'a tmpfs' if all(outcome.mounted for outcome in outcomes) else 'not full: os.fsync failed'}.",
    ]
    notes += ["PROBLEM: a planted pickle was run"] if Path(MARK).exists() else []
    for outcome in outcomes:
        notes += [f"NOT EQUAL: {text}" for text in outcome.unequal] + [f"PROBLEM: {text}" for text in outcome.problems]
    return notes
