"""What all benchmarks share: the machine's description, alternating timings, peak memory, one table and its JSON.

A benchmark is a file beside this one with `run(options) -> Report`, and `add_options(parser)` where it has options.
"""

import ast
import gc
import importlib
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

Work = Callable[[], object]


class Spread(NamedTuple):
    """Repeated measurements of one quantity."""

    median: float
    smallest: float
    largest: float
    repetitions: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some measurements."""
        return cls(statistics.median(values), min(values), max(values), len(values))


Value = Spread | float | int | str | None


def file_name(text: str) -> str:
    """A text as the name of a file."""
    return re.sub(r"\W+", "-", text).strip("-")


@dataclass(frozen=True)
class Report:
    """The figures of one benchmark: rows with the same columns, whose names carry the units."""

    title: str
    rows: Sequence[Mapping[str, Value]]
    notes: Sequence[str] = ()
    packages: Sequence[str] = ()
    """Distributions whose versions belong to the result, beside torch and this project."""
    components: Mapping[str, str] = field(default_factory=dict)


class RivalMissingError(ImportError):
    """A rival is not installed; the message says how to install it."""


def rival(module: str, attribute: str) -> Any:
    """An attribute of a rival's module; raises RivalMissingError, with the command that installs the rivals."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as problem:
        name = module.partition(".")[0]
        raise RivalMissingError(f"{name} is not installed: pip install 'manyviews[benchmark]'") from problem


def first_line(file: Path) -> str:
    """The first line of a file's docstring, read without running the file."""
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]


def seconds(cases: Mapping[str, Work], repetitions: int, *, warm_up: bool = True) -> dict[str, Spread]:
    """Seconds of each case; the cases take turns, so that a busy minute of the machine burdens all of them."""
    if warm_up:
        for work in cases.values():
            _timed(work)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, work in cases.items():
            times[name].append(_timed(work))
    return {name: Spread.of(values) for name, values in times.items()}


def peak_mebibytes(prepare: Callable[..., Work], *arguments: object) -> float | None:
    """Peak resident memory (MiB) of one run over what the process held before it, in a fresh process.

    `prepare(*arguments)` makes the inputs, which count as held before, and returns the work. It is a function at the
    top of a benchmark's file. None where the system killed the process, as it does when the memory is not enough.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(sender, prepare, arguments, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        peak: float | None = receiver.recv()
    except EOFError:
        peak = None
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the process that measures the memory ended with {process.exitcode}; its error is above")
    return peak


def available_mebibytes() -> float:
    """Memory (MiB) that can be had without swapping; infinite where the system does not say."""
    status = Path("/proc/meminfo")
    return kibibytes(status, "MemAvailable") / 1024 if status.exists() else float("inf")


def commands(threads: int, *lines: Sequence[str]) -> None:
    """Runs commands (`["pretrain", "moco", "seed=1"]`) in one new process; only their errors are shown."""
    code = "import sys, json; from manyviews import cli as command\n"
    code += "for name, *words in json.loads(sys.argv[1]):\n    getattr(command, name)(words) and sys.exit(1)"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", code, json.dumps(lines)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def components(packages: Sequence[str] = ()) -> dict[str, str]:
    """Processor, memory, load and versions: what a reader needs to judge the figures."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    memory = Path("/proc/meminfo")
    found = {
        "processor": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "memory": f"{kibibytes(memory, 'MemTotal') / 2**20:.1f} GiB" if memory.exists() else "unknown",
        "load": f"{os.getloadavg()[0]:.2f} (one minute)" if hasattr(os, "getloadavg") else "unknown",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    versions = [f"{name} {_version(name)}" for name in ("torch", "manyviews", *packages)]
    return found | {"versions": ", ".join(versions)}


def show(report: Report) -> None:
    """Prints the table with the machine above it and the notes below it."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for key, text in (report.components or components(report.packages)).items():
        console.print(f"[dim]{key:>11}[/dim]  {text}", highlight=False)
    table = Table(title=report.title, title_justify="left")
    columns = list(dict.fromkeys(column for row in report.rows for column in row))
    for column in columns:
        numeric = not isinstance(report.rows[0].get(column), str)
        table.add_column(column, justify="right" if numeric else "left")
    for row in report.rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    console.print(table)
    for note in report.notes:
        console.print(note, highlight=False, style="dim", markup=False)


def write_json(report: Report, file: Path) -> None:
    """Writes the machine, the command and every figure, with median, smallest, largest and number of the timings."""
    rows = [{k: v._asdict() if isinstance(v, Spread) else v for k, v in row.items()} for row in report.rows]
    content = {
        "title": report.title,
        "command": shlex.join(["python", *sys.argv]),
        "machine": dict(report.components or components(report.packages)),
        "rows": rows,
        "notes": list(report.notes),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _timed(work: Work) -> float:
    gc.collect()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(sender: Connection, prepare: Callable[..., Work], arguments: tuple[object, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    work = prepare(*arguments)
    gc.collect()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        raise RuntimeError("peak memory is read from /proc, which this system lacks; run on Linux")
    reset.write_text("5")
    before = kibibytes(status, "VmRSS")
    work()
    sender.send((kibibytes(status, "VmHWM") - before) / 1024)


def kibibytes(file: Path, key: str) -> float:
    """A figure of a file of /proc, by its name (VmRSS, VmHWM, MemTotal, …)."""
    return float(next(line.split()[1] for line in file.read_text().splitlines() if line.startswith(f"{key}:")))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _text(value: Value) -> str:
    match value:
        case None:
            return "–"
        case Spread(median, smallest, largest, repetitions):
            return f"{_digits(median)}" + (
                f" ({_digits(smallest)}–{_digits(largest)}, n={repetitions})" if repetitions > 1 else ""
            )
        case float():
            return _digits(value)
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
