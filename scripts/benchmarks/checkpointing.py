"""What checkpoints cost a run, and whether its memory grows: steps timed while one is written, and 10,000 in a row."""

import argparse
import itertools
import os
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import harness
from benchmarks.soaking.child import Place, train
from benchmarks.soaking.watching import Memory, Times

MEBIBYTE = 2**20
DEFAULT_MINUTES = 5
LEFT_OUT = 5
"""First steps, which find everything cold."""
TRAINED: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "wide projector": ("encoder.projector.hidden=2048", "encoder.projector.layers=3"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """How long the runs are."""
    parser.add_argument("--minutes", type=float, default=2.0, help="of training for each row of costs (2)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two checkpoints there (10)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="there (the cores)")
    parser.add_argument("--steps", type=int, default=10_000, help="of the run whose memory is watched (10000)")
    parser.add_argument("--place", type=Path, help="where the runs are written (a temporary folder)")


def run(options: argparse.Namespace) -> harness.Report:
    """Runs each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=options.place) as scratch:
        rows = [_cost(name, Path(scratch), options) for name in TRAINED]
        rows.append(_growth(Path(scratch), options))
    notes = (
        "one checkpoint: by how much the steps in which it was copied or written took longer than the median of the",
        f"others; a checkpoint every {options.every:g} s, so that there are many. Shares are of the time of training.",
        f"growth: the slope of resident memory over the second half of {options.steps:,} short steps, with a memory",
        "bank, a checkpoint every second and a line of metrics every 10 steps.",
    )
    return harness.Report("Checkpoints beside training, and memory", rows, notes)


def _cost(name: str, scratch: Path, options: argparse.Namespace) -> dict[str, harness.Value]:
    words = [*TRAINED[name], f"train.minutes={options.minutes}", f"train.save_minutes={options.every / 60}"]
    words.append(f"train.threads={options.threads}")
    folder = _trained(name, scratch, words, "steps")
    lines = [line.split() for line in (scratch / f"{name}.steps").read_text().splitlines()][LEFT_OUT:]
    moments, marks = np.array([float(moment) for moment, *_ in lines]), [tuple(rest) for _, *rest in lines]
    steps = np.diff(moments)
    # Begun, written or published since the step before.
    beside = np.array([before != now or now[0] == "1" for before, now in itertools.pairwise(marks)])
    saves = len({mark[1] for mark in marks}) - 1
    if saves < 1 or beside.all():
        raise RuntimeError(f"{saves} checkpoints in {len(steps)} steps are too few or too many to tell; see --minutes")
    seconds = float((steps[beside] - median(steps[~beside])).sum()) / saves
    size = sum(file.stat().st_size for file in max(folder.glob("checkpoints/step-*")).iterdir())
    return {
        "run": name,
        "checkpoint (MiB)": size / MEBIBYTE,
        "checkpoints": saves,
        "one step (ms)": 1000 * median(steps[~beside]),
        "one checkpoint (ms)": 1000 * seconds,
        f"share, every {DEFAULT_MINUTES} min (%)": 100 * seconds / (60 * DEFAULT_MINUTES),
        "share, every minute (%)": 100 * seconds / 60,
    }


def _growth(scratch: Path, options: argparse.Namespace) -> dict[str, harness.Value]:
    words = [
        *("objective=bank", "objective.temperature=0.1", "views.num_views=1", "views.size=16", "train.batch_size=16"),
        *("encoder.projector.hidden=16", "encoder.projector.dim=8", "train.threads=1", "train.save_minutes=0.0167"),
        f"train.epochs={options.steps * 16 / 10_000}",
    ]
    _trained("memory", scratch, words, "memory")
    lines = [line.split() for line in (scratch / "memory.memory").read_text().splitlines()]
    steps, resident = (np.array([float(line[column]) for line in lines]) for column in (0, 1))
    half = len(steps) // 2
    slope = float(np.polyfit(steps[half:], resident[half:], 1)[0])
    return {
        "run": f"{options.steps:,} steps",
        "resident, a tenth in (MiB)": float(resident[len(resident) // 10]) / 1024,
        "resident, at the end (MiB)": float(resident[-1]) / 1024,
        "growth (KiB per 1,000 steps)": 1000 * slope,
    }


def _trained(name: str, scratch: Path, words: Sequence[str], watched: str) -> Path:
    """The folder of a run, of which a file beside it tells what was watched in each step."""
    folder, told = scratch / name, scratch / f"{name}.{watched}"
    watch = Times(told, folder / "checkpoints") if watched == "steps" else Memory(told)
    given = (*words, "train.monitor=0", "train.preview=0", f"output={folder}")
    process = get_context("spawn").Process(target=train, args=(given, Place(), scratch / "log", watch))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the run ended with {process.exitcode}:\n{(scratch / 'log').read_text()}")
    return folder
