"""What an evaluation writes, each file whole or not at all; what cannot be written is a warning, never an end."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file

from manyviews.evaluate.record import EVALUATION, OUTCOMES, Outcomes, Record, merge, with_kept
from manyviews.report import Findings, write_report
from manyviews.run.folder import CONFIG
from manyviews.system.arrays import read_tensors
from manyviews.system.disk import nearest_existing
from manyviews.system.files import read_json, sha256
from manyviews.system.launch import in_a_line
from manyviews.system.writing import aside_of, make_folder, open_new, remove, rename, replacing

LOCK, LOCK_SECONDS = ".evaluation.lock", 120.0
PROBED = 1 << 20
"""Bytes that a folder must take for it to be written to: about what a report weighs."""
DAMAGED = "evaluation.damaged.json"
Warn = Callable[[str], object]


def check_output(output: Path, folder: Path) -> None:
    """Checks that results may go to a folder at all.

    Raises:
        ValueError: if it is a file, or another run's folder.
    """
    nearest_existing(output)
    if (output / CONFIG).is_file() and output.resolve() != folder.resolve():
        raise ValueError(f"output={output} is another run's folder; name one that is no run, or leave output out")


def unwritable(output: Path) -> str:
    """Why a folder cannot be written to, found by writing a megabyte; empty where it can; nothing is left behind."""
    probe = aside_of(output / "probe")
    try:
        make_folder(output, output)
        with open_new(probe) as file:
            file.write(bytes(PROBED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        return in_a_line(problem)
    finally:
        with suppress(OSError):
            remove(probe)
    return ""


def write(
    findings: Findings, record: Record, outcomes: Outcomes, output: Path, warn: Warn, *, page: bool
) -> Path | None:
    """Merges a record into evaluation.json and its outcomes into outcomes.safetensors; then the report of all of it.

    One evaluation at a time writes into a folder: others wait for it. Called by one process.

    Args:
        findings: what was measured.
        record: the same, by `record_of`.
        outcomes: what was predicted of each image.
        output: the folder.
        warn: called with a sentence for each file that could not be written.
        page: whether the report is written.

    Returns:
        The report, if it could be written.
    """
    try:
        with _held(output):
            try:
                whole, together = _merged(record, outcomes, output, warn)
            except OSError as problem:
                warn(f"what {output / EVALUATION} holds cannot be read, and it stays as it is: {in_a_line(problem)}")
                whole, together = record, outcomes
            else:
                _keep(whole, together, output, warn)
            return _report(findings, whole, together, output, warn) if page else None
    except Timeout:
        warn(f"nothing was written to {output}: another evaluation has been writing there for {LOCK_SECONDS:.0f} s")
    except (OSError, NotImplementedError) as problem:
        warn(f"nothing was written to {output}: {in_a_line(problem)}")
    return None


def read(output: Path) -> tuple[dict[str, Any], Outcomes]:
    """What a folder's evaluation.json and outcomes.safetensors hold.

    Raises:
        ValueError: if they are damaged, or not of each other.
        OSError: if one cannot be read.
    """
    whole = read_json(output / EVALUATION)
    if whole.get("outcomes") != sha256(output / OUTCOMES):
        raise ValueError(f"{output / EVALUATION} is not the record of {OUTCOMES}; evaluate the run anew")
    return whole, dict(read_tensors(output / OUTCOMES))


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """The folder's lock, which the system takes back from a process that dies."""
    make_folder(output, output)
    with FileLock(output / LOCK, timeout=LOCK_SECONDS):
        # Whoever wrote these has died: the others wait.
        for litter in output.glob(".*.partial"):
            if litter.name.startswith((f".{EVALUATION}.", f".{OUTCOMES}.", ".report.html.")):
                remove(litter)
        yield


def _merged(record: Record, outcomes: Outcomes, output: Path, warn: Warn) -> tuple[Record, Outcomes]:
    before: Mapping[str, Any]
    kept: Outcomes = {}
    try:
        before = read_json(output / EVALUATION)
        with suppress(OSError, ValueError):
            # Without them the numbers stay, and what was predicted of each image is not known any more.
            before, kept = read(output)
        whole, together, dropped = merge(record, outcomes, before, kept)
    except FileNotFoundError:
        return record, outcomes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        rename(output / EVALUATION, output / DAMAGED)
        warn(f"{output / EVALUATION} was damaged and is {DAMAGED} now: {in_a_line(problem)}")
        return record, outcomes
    if dropped:
        warn(f"{output / EVALUATION} holds as many results as are kept: the oldest {dropped} of other settings went")
    return whole, together


def _keep(whole: Record, outcomes: Outcomes, output: Path, warn: Warn) -> None:
    """Both are written aside before one takes the place of what was there: a full disk leaves both as they were."""
    whole["outcomes"] = None
    aside = aside_of(output / OUTCOMES)
    try:
        with _warned(output / OUTCOMES, warn):
            with replacing(aside) as (path, _):
                save_file({name: value.contiguous() for name, value in outcomes.items()}, path)
            whole["outcomes"] = sha256(aside)
        with _warned(output / EVALUATION, warn), replacing(output / EVALUATION) as (_, file):
            file.write(f"{json.dumps(whole, indent=1)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
            # The record comes last: it knows its outcomes by their hash.
            if whole["outcomes"]:
                rename(aside, output / OUTCOMES)
    finally:
        with suppress(OSError):
            remove(aside)


@contextmanager
def _warned(file: Path, warn: Warn) -> Iterator[None]:
    try:
        yield
    except Exception as problem:
        warn(f"{file} could not be written: {in_a_line(problem)}")


def _report(findings: Findings, whole: Record, outcomes: Outcomes, output: Path, warn: Warn) -> Path | None:
    try:
        shown = with_kept(findings, whole, outcomes)
    except (ValueError, KeyError, TypeError) as problem:
        warn(f"the report shows what was measured now alone: {in_a_line(problem)}")
        shown = findings
    try:
        return write_report(shown, output, warn=warn)
    except Exception as problem:
        warn(f"there is no report: {in_a_line(problem)}")
        return None
