"""Curves of a run for TensorBoard: one event file for each start, in order."""

import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from manyviews.system.append_file import AppendFile
from manyviews.system.writing import make_folder, remove

EVENTS = "events.out.tfevents.*"
STARTED = re.compile(r"events\.out\.tfevents\.(\d{1,10})\.(?:(\d{9})\.)?")


class Curves:
    """Appends events to a new file; drops earlier points after the resumed `step`."""

    def __init__(self, folder: Path, root: Path, step: int, warn: Callable[[str], object]) -> None:
        if not step:
            # Of a run that was interrupted before its first checkpoint.
            for file in folder.glob(EVENTS):
                remove(file, root)
        make_folder(folder, root)
        self._earlier = sorted(folder.glob(EVENTS))
        # TensorBoard reads files in the order of their names; a run may be resumed within a second, and the clock may
        # have been set back.
        now = time.time_ns()
        begins = max(now, *(_latest(file) + 1 for file in self._earlier), 0)
        self._ahead, self._wall = (begins - now) / 1e9, 0.0
        name = f"events.out.tfevents.{begins // 10**9:010d}.{begins % 10**9:09d}.{socket.gethostname()}.{os.getpid()}"
        self.file = AppendFile(folder / name, root, warn)
        self._records = RecordWriter(self.file)
        self._add(Event(file_version="brain.Event:2"))
        if step:
            self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def show(self, summary: Summary, step: int) -> None:
        """Appends a scalar, image, histogram or text."""
        self._add(Event(step=step, summary=summary))

    def lost(self) -> int:
        """Number of earlier event files that another program has removed since the last call."""
        existing = [file for file in self._earlier if file.exists()]
        removed, self._earlier = len(self._earlier) - len(existing), existing
        return removed

    def _add(self, event: Event) -> None:
        self._wall = max(self._wall, time.time() + self._ahead)
        event.wall_time = self._wall
        self._records.write(event.SerializeToString())


def _latest(events: Path) -> int:
    """Nanoseconds since 1970 at which an event file was created or last written to."""
    named = STARTED.match(events.name)
    started = int(named[1]) * 10**9 + int(named[2] or 0) if named else 0
    try:
        return max(started, events.stat().st_mtime_ns)
    except OSError:
        return started
