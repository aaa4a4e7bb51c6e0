"""The run folder: what a run writes, how it is resumed, and how it never loses what it has."""

import json
import math
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from contrastive import distributed
from contrastive.checkpoints import sync, together

CONFIG, METRICS, CHECKPOINTS, DONE = "config.yaml", "metrics.jsonl", "checkpoints", "done"
CLASSIFIER = "classifier"
"""What a fine-tuned run has in place of a backbone."""
HISTOGRAM_BINS = 100
MOST_KEPT = 1 << 26
"""Bytes that are kept in memory where a disk is full: days of metrics."""


class Run:
    """A folder that the first process writes: the configuration, metrics and TensorBoard events.

    A disk that is full never ends a run: what cannot be written is kept, told of once, and written when there is room.
    """

    def __init__(self, folder: Path, *, step: int = 0, warn: Callable[[str], object] = warnings.warn) -> None:
        """Opens the folder to write on from a step.

        What a run that was cut off has written of later steps is dropped: its lines of metrics and, by an event that
        TensorBoard knows, its points in the curves.

        Args:
            folder: the run folder.
            step: that of the checkpoint that is gone on from; 0: the run begins.
            warn: hears that something cannot be written.
        """
        self.folder = folder
        self._warn = warn
        metrics, events = folder / METRICS, folder / "tensorboard"
        if metrics.exists():
            kept = [line for line in metrics.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            _write_whole(metrics, "".join(kept))
        if not step:
            # Of an attempt that was cut off before its first checkpoint, which begins anew.
            for file in events.glob("events.out.tfevents.*"):
                file.unlink()
        events.mkdir(parents=True, exist_ok=True)
        self._metrics = _Growing(metrics)
        # They are read in the order of their names, and a run may be cut off and resumed within one second.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}.{socket.gethostname()}.{os.getpid()}"
        self._events = _Growing(events / name)
        self._records = RecordWriter(self._events)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if step:
            self._add(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and one point to each TensorBoard curve; NaN is written as null."""
        values = {key: float(value) for key, value in values.items()}
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._metrics.write((json.dumps({"step": step, **line}) + "\n").encode())
        self._save_what_can_be(self._metrics)
        for key, value in values.items():
            self._show(summary.scalar(key, value), step)

    def text(self, name: str, text: str) -> None:
        """Writes a text to TensorBoard."""
        self._show(summary.text(name, f"```\n{text}\n```"), 0)

    def picture(self, name: str, picture: Tensor, step: int = 0) -> None:
        """Writes a picture, uint8 [3, height, width], to `name.png` in the folder and to TensorBoard."""
        file = self.folder / f"{name}.png"
        try:
            Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(file)
        except OSError as problem:
            self._warn(f"{file} could not be written: {problem}")
        self._show(summary.image(name, picture, dataformats="CHW"), step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Writes how some values are distributed to TensorBoard."""
        values = values.float().cpu()
        values = values[values.isfinite()]
        if len(values):
            self._show(summary.histogram(name, values, HISTOGRAM_BINS), step)

    def sync(self) -> None:
        """Returns once all lines and points are on the disk; a checkpoint counts only after that.

        From any thread, beside those who log.

        Raises:
            OSError: if metrics cannot be written; after a resume they would be missing.
        """
        self._metrics.sync()
        self._save_what_can_be(self._events)
        with suppress(OSError):
            self._events.sync()

    def close(self) -> None:
        """Closes the files; the run can still be resumed."""
        for file in (self._metrics, self._events):
            self._save_what_can_be(file)
            lost = file.close()
            if lost:
                self._warn(f"{lost:,} bytes are missing at the end of {file.path}")

    def finish(self, exported: Path) -> None:
        """Closes the files and writes `done`, the last thing a run that is complete ever writes.

        What was exported is on the disk before it.
        """
        self.close()
        for file in (*exported.iterdir(), exported):
            sync(file)
        _write_whole(self.folder / DONE, time.strftime("%Y-%m-%dT%H:%M:%S%z") + "\n")

    def _show(self, shown: Summary, step: int) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=shown))

    def _add(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._save_what_can_be(self._events)

    def _save_what_can_be(self, file: "_Growing") -> None:
        """Writes what a file keeps; warns when that begins to fail."""
        before = file.failing
        try:
            file.flush()
        except OSError as problem:
            if not before:
                self._warn(f"{file.path} cannot be written ({problem}): its lines are kept until they can be")


class _Growing:
    """A file that grows at its end, of which a full disk tears no line: what it does not take waits in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failing = False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        self._kept = bytearray()
        # A checkpoint's thread syncs while the loop logs.
        self._lock = threading.Lock()

    def write(self, content: bytes) -> None:
        """Keeps a whole line or record; beyond what memory is meant for, it is dropped."""
        with self._lock:
            if len(self._kept) < MOST_KEPT:
                self._kept += content

    def flush(self) -> None:
        """Writes what is kept; raises OSError where the disk takes less, and keeps the rest."""
        with self._lock:
            self.failing = bool(self._kept)
            while self._kept and self._descriptor >= 0:
                del self._kept[: os.write(self._descriptor, self._kept)]
            self.failing = bool(self._kept)

    def sync(self) -> None:
        """Returns once everything is on the disk; raises OSError where it cannot be."""
        self.flush()
        os.fsync(self._descriptor)

    def close(self) -> int:
        """Closes the file, if it is open; returns how many bytes it did not take."""
        if self._descriptor < 0:
            return 0
        os.close(self._descriptor)
        self._descriptor = -1
        return len(self._kept)


def prepare(folder: Path, *, resume: bool) -> None:
    """Checks that a run may be written here, before anything is done; leaves no file.

    All processes call it together: each must see the same folder, for each writes its part of a checkpoint there.

    Raises:
        ValueError: if the folder holds anything and `resume` is false, if it holds something else than a run, or if it
            is not the same folder for all processes.
    """
    with together():
        _check_content(folder, resume=resume)
    if distributed.size() > 1:
        _check_shared(folder)


def _check_content(folder: Path, *, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={folder} is a file; name a folder that does not exist yet")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    state = "a finished run" if (folder / DONE).exists() else "a run" if (folder / CONFIG).exists() else "other files"
    if state == "other files":
        raise ValueError(f"output={folder} holds {state}; a run needs a folder of its own: name another with output=…")
    if not resume:
        raise ValueError(f"output={folder} holds {state}; add resume=true to go on with it, or output=… for a new one")


def _check_shared(folder: Path) -> None:
    """Every process leaves a token of this start, and the first one must find all of them."""
    start = distributed.texts(secrets.token_hex(8))[0]
    own = folder / f".start-{start}-{distributed.rank()}"
    try:
        with together():
            folder.mkdir(parents=True, exist_ok=True)
            own.touch()
        there = [(folder / f".start-{start}-{number}").exists() for number in range(distributed.size())]
        seen = json.loads(distributed.texts(json.dumps(there))[0])
    finally:
        own.unlink(missing_ok=True)
    absent = [str(number) for number, found in enumerate(seen) if not found]
    if absent:
        raise ValueError(
            f"output={folder} is not one folder for all {distributed.size()} processes: the first does not see what "
            f"processes {', '.join(absent)} write there; name a folder on a file system that all machines share"
        )


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first."""
    with (folder / METRICS).open() as lines:
        for line in lines:
            yield json.loads(line)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # a line that was cut off in the middle


def _write_whole(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.partial")
    try:
        aside.write_text(text)
        sync(aside)
        aside.replace(file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
