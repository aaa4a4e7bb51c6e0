"""The curves of a run for TensorBoard: one file of events for each start, in the order of the starts."""

import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from manyviews.system.append_file import Growing
from manyviews.system.writing import make_folder, remove

EVENTS = "events.out.tfevents.*"
STARTED = re.compile(r"events\.out\.tfevents\.(\d{1,10})\.(?:(\d{9})\.)?")


class Curves:
    """Appends events to a file; what the disk does not take is kept until it can be written."""

    def __init__(self, folder: Path, root: Path, step: int, flush: Callable[[Growing], None]) -> None:
        """Opens a file in a folder, which must stay in a root; `flush` writes what the file keeps.

        Points behind the step of the checkpoint that is resumed are dropped; with 0, which resumes none, all are.
        """
        self._flush = flush
        if not step:
            # Of an attempt that was cut off before its first checkpoint, which begins anew.
            for file in folder.glob(EVENTS):
                remove(file, root)
        make_folder(folder, root)
        self._earlier = sorted(folder.glob(EVENTS))
        # TensorBoard reads files in the order of their names; a run may be cut off and resumed within one second, and
        # the clock may have been set back meanwhile.
        now = time.time_ns()
        begins = max(now, *(_latest(file) + 1 for file in self._earlier), 0)
        self._ahead, self._wall = (begins - now) / 1e9, 0.0
        name = f"events.out.tfevents.{begins // 10**9:010d}.{begins % 10**9:09d}.{socket.gethostname()}.{os.getpid()}"
        self.file = Growing(folder / name, root)
        self._records = RecordWriter(self.file)
        self._add(Event(file_version="brain.Event:2"))
        if step:
            self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def show(self, summary: Summary, step: int) -> None:
        """Appends a point, a picture, a histogram or a text."""
        self._add(Event(step=step, summary=summary))

    def lost(self) -> int:
        """How many files of earlier starts another program has removed since this was last asked."""
        there = [file for file in self._earlier if file.exists()]
        removed, self._earlier = len(self._earlier) - len(there), there
        return removed

    def _add(self, event: Event) -> None:
        self._wall = max(self._wall, time.time() + self._ahead)
        event.wall_time = self._wall
        self._records.write(event.SerializeToString())
        self._flush(self.file)


def _latest(events: Path) -> int:
    """Nanoseconds since 1970 by which a file of events had been begun and, as far as is known, written to."""
    named = STARTED.match(events.name)
    started = int(named[1]) * 10**9 + int(named[2] or 0) if named else 0
    try:
        return max(started, events.stat().st_mtime_ns)
    except OSError:
        return started
