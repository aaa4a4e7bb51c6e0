"""Damaged files of every kind that is read: taken, refused in a sentence, or a fault (other error, hang, crash)."""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import harness
from benchmarks.fuzzing.damage import damaged
from benchmarks.fuzzing.kinds import Kind, kinds
from benchmarks.fuzzing.strangers import WHOLE_RUN, strangers

INPUTS = 12_000
SECONDS = 5.0
"""An input that takes longer hangs."""
MEBIBYTES = 1024
"""What reading may take beyond what the process has when it begins."""
TAKEN, REFUSED, OTHER, HANG, CRASH = "taken", "refused", "other error", "hang", "crash"
FAULTS = (OTHER, HANG, CRASH)
NOTES = (
    "taken: read to the end; refused: a ValueError or OSError with a message, which a command prints as one sentence.",
    "other error, hang, crash: faults; each is listed below with its input's number, and --keep writes it to a folder.",
    f"each in a process that may take {MEBIBYTES:,} MiB more than it begins with, and {SECONDS:g} s for one input.",
    f"a run folder is resumed, evaluated or extracted, and may take {WHOLE_RUN} times as long.",
)


class Outcome(NamedTuple):
    """What came of one input."""

    kind: int
    number: int
    outcome: str
    detail: str
    seconds: float


class _TooSlow(BaseException):
    """Raised by the alarm; no reader can take it for damage."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """How many inputs, and of which draw."""
    parser.add_argument("--inputs", type=int, default=INPUTS, metavar="N", help=f"damaged files in all ({INPUTS:,})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="what the damage follows from (0)")
    parser.add_argument("--kind", default="", metavar="WORD", help="only kinds whose name holds this word")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the inputs that are faults here")


def run(options: argparse.Namespace) -> harness.Report:
    """Reads all inputs and counts what came of them."""
    with tempfile.TemporaryDirectory() as folder:
        found = list(outcomes(Path(folder), options.inputs, options.seed, options.kind, options.keep))
        names = [kind.name for kind in _chosen(Path(folder), options.kind)]
    rows = []
    for place, name in [*enumerate(names), (None, "all")]:
        own = [outcome for outcome in found if place is None or outcome.kind == place]
        counted = Counter(outcome.outcome for outcome in own)
        row: dict[str, harness.Value] = {"kind": name, "inputs": len(own)}
        row |= {outcome: counted[outcome] for outcome in (TAKEN, REFUSED, *FAULTS)}
        row["slowest (s)"] = max((outcome.seconds for outcome in own), default=0.0)
        rows.append(row)
    faults = [
        f"{names[one.kind]}, input {one.number}: {one.outcome}: {one.detail}" for one in found if one.outcome in FAULTS
    ]
    title = f"{len(found):,} damaged files, seed {options.seed}"
    return harness.Report(title, rows, [*NOTES, *faults[:50]], ("pillow", "safetensors", "numpy", "PyYAML"))


def outcomes(folder: Path, inputs: int, seed: int, word: str = "", keep: Path | None = None) -> Iterator[Outcome]:
    """What comes of each input, read in a process that is begun anew after a hang or a crash."""
    chosen = _chosen(folder, word)
    shares = sum(kind.share for kind in chosen)
    jobs = [(place, number) for place, kind in enumerate(chosen) for number in range(-(-inputs * kind.share // shares))]
    context = multiprocessing.get_context("spawn")
    while jobs:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, jobs, seed, word), daemon=True)
        process.start()
        sender.close()
        try:
            ready = receiver.poll(600) and receiver.recv()
            assert ready, "the process that reads did not come up"
            while jobs:
                longest = 3 * SECONDS * chosen[jobs[0][0]].patience
                if not receiver.poll(longest):
                    one = Outcome(*jobs[0], HANG, "it did not come back", longest)
                else:
                    one = receiver.recv()
                _keep(one, chosen, seed, keep)
                yield one
                jobs.pop(0)
                if one.detail == "it did not come back":
                    break
        except EOFError:
            process.join()
            one = Outcome(*jobs.pop(0), CRASH, f"the process ended with {process.exitcode}", 0.0)
            _keep(one, chosen, seed, keep)
            yield one
        finally:
            process.kill()
            process.join()


def every(place: Path) -> list[Kind]:
    """All kinds; what is needed beside the inputs is made in a folder."""
    files = kinds(place)
    return files + strangers(place, files)


def content_of(kind: Kind, number: int, seed: int) -> bytes:
    """An input; the first ones of a kind are its samples as they are."""
    if number < len(kind.samples):
        return kind.samples[number]
    return damaged(kind.samples, random.Random(f"{seed} {kind.name} {number}"), text=kind.text)


def read(kind: Kind, content: bytes, folder: Path) -> tuple[str, str]:
    """Whether a kind's reader takes a file, refuses it, or fails, and how."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(folder, content)
    except (ValueError, OSError) as problem:
        # A sentence, and not the remains of a library: a command prints it as it is.
        text = str(problem)
        return (
            (REFUSED, text)
            if text.strip() and len(text) < 20_000
            else (OTHER, f"{type(problem).__name__}: {text[:200]!r}")
        )
    return TAKEN, ""


def _chosen(folder: Path, word: str) -> list[Kind]:
    torch.manual_seed(0)
    place = folder / "sound"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return [kind for kind in every(place) if word in kind.name]


def _work(sender: Connection, jobs: list[tuple[int, int]], seed: int, word: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        chosen = _chosen(Path(folder), word)
        for kind in chosen:
            for sample in kind.samples[:1]:
                one_of(kind, sample, Path(folder))
        held = int(harness.kibibytes(Path("/proc/self/status"), "VmSize")) << 10
        resource.setrlimit(resource.RLIMIT_AS, (held + (MEBIBYTES << 20),) * 2)
        # Libraries in C tell of damage there, thousands of times.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sender.send(True)
        for place, number in jobs:
            start = time.perf_counter()
            outcome, detail = one_of(chosen[place], content_of(chosen[place], number, seed), Path(folder))
            sender.send(Outcome(place, number, outcome, detail[:300], time.perf_counter() - start))


def one_of(kind: Kind, content: bytes, folder: Path) -> tuple[str, str]:
    """What comes of one input: the outcome, and how it failed or was refused."""

    def too_slow(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, too_slow)
    longest = SECONDS * kind.patience
    signal.setitimer(signal.ITIMER_REAL, longest)
    try:
        return read(kind, content, folder / "one")
    except _TooSlow:
        return HANG, f"longer than {longest:g} s"
    except BaseException as problem:
        frame = _last(problem.__traceback__)
        return OTHER, f"{type(problem).__name__}: {str(problem)[:200]} ({frame})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _last(trace: types.TracebackType | None) -> str:
    place = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "manyviews" in code.co_filename:
            place = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _keep(one: Outcome, chosen: list[Kind], seed: int, folder: Path | None) -> None:
    if folder is not None and one.outcome in FAULTS:
        folder.mkdir(parents=True, exist_ok=True)
        kind = chosen[one.kind]
        (folder / f"{harness.file_name(kind.name)}-{one.number}").write_bytes(content_of(kind, one.number, seed))
