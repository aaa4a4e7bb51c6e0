"""Writes the files of an evaluation atomically; a file that cannot be written is a warning."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file

from manyviews.evaluation.record import EVALUATION, OUTCOMES, Outcomes, Record, merge, with_kept
from manyviews.report import Findings, write_report
from manyviews.run.folder import CONFIG
from manyviews.system.arrays import read_tensors
from manyviews.system.disk import nearest_existing
from manyviews.system.files import read_json, sha256
from manyviews.system.launch import in_a_line
from manyviews.system.writing import aside_of, make_folder, open_new, remove, rename, replacing, write_atomic

LOCK, LOCK_SECONDS = ".evaluation.lock", 120.0
PROBED = 1 << 20
"""Bytes written to find out whether a folder is writable: about the size of a report."""
DAMAGED = "evaluation.damaged.json"
CLUSTERS = "clusters.csv"
Warn = Callable[[str], object]


def check_output(output: Path, folder: Path) -> None:
    """Raises ValueError if the output folder is a file or another run's folder."""
    nearest_existing(output)
    if (output / CONFIG).is_file() and output.resolve() != folder.resolve():
        raise ValueError(f"output={output} is another run's folder; name one that is no run, or leave output out")


def unwritable(output: Path) -> str:
    """Writes and removes a probe of one megabyte; returns the reason if that fails, else ""."""
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
    """Merges a record and its outcomes into the files of a folder, then writes the report.

    The folder is locked meanwhile: other evaluations wait. Called on one rank. `record` and `outcomes` are those of
    `record_of`; `warn` gets a message for each file that could not be written; `page` is whether to write the report.
    Returns the path of the report, if it was written.
    """
    try:
        with _lock(output):
            try:
                whole, all_outcomes = _merged(record, outcomes, output, warn)
            except OSError as problem:
                warn(f"{output / EVALUATION} cannot be read and is left unchanged: {in_a_line(problem)}")
                whole, all_outcomes = record, outcomes
            else:
                _save(whole, all_outcomes, output, warn)
            return _report(findings, whole, all_outcomes, output, warn) if page else None
    except Timeout:
        warn(f"nothing was written to {output}: another evaluation has been writing there for {LOCK_SECONDS:.0f} s")
    except (OSError, NotImplementedError) as problem:
        warn(f"nothing was written to {output}: {in_a_line(problem)}")
    return None


def read(output: Path) -> tuple[dict[str, Any], Outcomes]:
    """Reads a folder's evaluation.json and outcomes.safetensors.

    Raises ValueError if they are damaged or do not belong together, OSError if one cannot be read.
    """
    whole = read_json(output / EVALUATION)
    if whole.get("outcomes") != sha256(output / OUTCOMES):
        raise ValueError(f"{output / EVALUATION} does not belong to {OUTCOMES}; evaluate the run again")
    return whole, dict(read_tensors(output / OUTCOMES))


def write_clusters(findings: Findings, output: Path, warn: Warn) -> Path | None:
    """Writes clusters.csv: each image's name, its cluster and its distance to the cluster's centre.

    The clusters are those of the leading kind of features, the largest first, their images from the centre outwards.
    Called on one rank; returns the path, or None if there are no clusters or it could not be written.
    """
    task = f"clustering/{findings.kind}"
    groups, distances = findings.evaluation.predictions.get(task), findings.evaluation.values.get(task)
    if groups is None or distances is None:
        return None
    ids = (groups >= 0).nonzero().squeeze(1)
    ids = ids[distances[ids].argsort(stable=True)]
    ids = ids[groups[ids].argsort(stable=True)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("name", "cluster", "distance"))
    names = findings.shown.names
    columns = (column[ids].tolist() for column in (groups, distances))
    table.writerows(
        (names[index], *row[:1], f"{row[1]:.6g}") for index, *row in zip(ids.tolist(), *columns, strict=True)
    )
    file = output / CLUSTERS
    try:
        # Names of files need not be valid UTF-8.
        write_atomic(file, [text.getvalue().encode("utf-8", "surrogateescape")])
    except OSError as problem:
        warn(f"{file} could not be written: {in_a_line(problem)}")
        return None
    return file


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """Holds the folder's lock, which the operating system releases if a process dies."""
    make_folder(output, output)
    with FileLock(output / LOCK, timeout=LOCK_SECONDS):
        # Left by a process that died: live ones wait for the lock.
        for partial in output.glob(".*.partial"):
            if partial.name.startswith((f".{EVALUATION}.", f".{OUTCOMES}.", ".report.html.")):
                remove(partial)
        yield


def _merged(record: Record, outcomes: Outcomes, output: Path, warn: Warn) -> tuple[Record, Outcomes]:
    before: Mapping[str, Any]
    outcomes_before: Outcomes = {}
    try:
        before = read_json(output / EVALUATION)
        with suppress(OSError, ValueError):
            # Without outcomes, the numbers are kept.
            before, outcomes_before = read(output)
        whole, all_outcomes, dropped = merge(record, outcomes, before, outcomes_before)
    except FileNotFoundError:
        return record, outcomes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        rename(output / EVALUATION, output / DAMAGED)
        warn(f"{output / EVALUATION} was damaged and has been renamed to {DAMAGED}: {in_a_line(problem)}")
        return record, outcomes
    if dropped:
        warn(f"{output / EVALUATION} is full: the oldest {dropped} results of other settings were dropped")
    return whole, all_outcomes


def _save(whole: Record, outcomes: Outcomes, output: Path, warn: Warn) -> None:
    """Writes both files before either is replaced: a full disk leaves the old ones."""
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
            # The record is replaced last: it contains the hash of its outcomes.
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
        warn(f"the report shows the new results alone: {in_a_line(problem)}")
        shown = findings
    try:
        return write_report(shown, output, warn=warn)
    except Exception as problem:
        warn(f"there is no report: {in_a_line(problem)}")
        return None
