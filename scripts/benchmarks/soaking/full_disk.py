"""Runs whose disk is full again and again: at each write of a checkpoint, at the last one, at a start."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path

from benchmarks.soaking.attempts import Outcome, Tally
from benchmarks.soaking.starts import (
    PATIENCE,
    Case,
    compared,
    in_short,
    newest,
    only_thread,
    started,
    stepping,
    undisturbed,
    waiting,
)

PAGE, MEBIBYTE = 4096, 2**20
DISK = 64 * MEBIBYTE
FULL, THEN_SIGNAL, THEN_KILL, AT_START = (
    "full disk",
    "full disk, then SIGTERM",
    "full disk, then kill −9",
    "full disk at start",
)
FAILING = 3.0
"""Seconds in which a checkpoint should have met the full disk."""


class Disk:
    """A small file system whose free room can be set; or, where none may be mounted, writes that are made to fail.

    `folder` is on it. Without a file system of its own the processes look at `gauge`: while it is there, `os.fsync`
    fails after so many calls as it says.
    """

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self.mounted = folder, mounted
        self.gauge = None if mounted else folder.with_name("gauge")

    def fill(self, level: int) -> None:
        """Leaves room for so many pages, or so many calls."""
        if self.gauge is not None:
            self.gauge.write_text(str(level))
            return
        with (self.folder / "filler").open("ab") as filler:
            # Until nothing moves: the run writes at the same time.
            for _ in range(3):
                there = os.statvfs(self.folder)
                over = there.f_bavail * there.f_frsize - level * PAGE
                if over > 0:
                    try:
                        os.posix_fallocate(filler.fileno(), filler.seek(0, os.SEEK_END), over)
                    except OSError:
                        continue

    def empty(self) -> None:
        """Gives the room back."""
        (self.gauge or self.folder / "filler").unlink(missing_ok=True)


@contextmanager
def small_disk(place: Path) -> Iterator[Disk]:
    """A tmpfs while it is open, if this user may mount one."""
    folder = place / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield Disk(folder, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(case: Case, place: Path, seed: int, times: int) -> Outcome:
    """A run whose disk is filled so many times, to other levels; compared with the same run on an empty disk."""
    only_thread()
    draw, outcome = random.Random(f"{seed} {case.name} {case.processes} full"), Outcome(case.name)
    straight = place / "straight"
    undisturbed(case, straight, place)
    whole = sum(file.stat().st_size for file in straight.glob("checkpoints/step-*/*")) // PAGE
    with small_disk(place) as disk:
        outcome.mounted = disk.mounted
        # Room for less than two checkpoints, evenly, and the first pages one by one: small files are written there.
        levels = [index % 20 if index % 2 or not disk.mounted else draw.randrange(whole) for index in range(times)]
        while levels:
            outcome.runs += 1
            folder = disk.folder / f"run-{outcome.runs}"
            _Filled(case, folder, place, disk, draw, outcome).finish(levels)
            found = compared(straight, folder)
            if found:
                outcome.unequal.append(f"{case.name} on {case.processes}, full disk: {in_short(found)}")
            shutil.rmtree(folder)
    return outcome


class _Filled:
    def __init__(
        self, case: Case, folder: Path, place: Path, disk: Disk, draw: random.Random, outcome: Outcome
    ) -> None:
        self._case, self._folder, self._place, self._disk = case, folder, place, disk
        self._draw, self._outcome = draw, outcome
        self._reached = 0
        self._last: Tally | None = None

    def finish(self, levels: list[int]) -> None:
        """Takes levels from the list until the run is done or none is left, and then lets it end."""
        while not (self._folder / "done").exists():
            if levels and self._folder.exists() and self._draw.random() < 0.3:
                self._disk.fill(self._draw.randrange(4))
                self._outcome.tally(AT_START).times += 1
            board, processes = started(self._case, self._folder, self._place, self._disk.gauge)
            self._outcome.starts += 1
            stepping(board, processes)
            self._disk.empty()
            first = board.steps()[0]
            if self._last is not None and first >= 0:
                self._last.lost.append(max(0, self._reached - first))
                self._last = None
            while levels and all(process.is_alive() for process in processes):
                if not self._full(levels.pop(), processes):
                    break
            for process in processes:
                process.join(PATIENCE if levels else None)
                if process.is_alive():
                    self._problem("hung")
                    process.kill()
                    process.join()
            self._disk.empty()
            self._reached = max(self._reached, board.steps()[1])

    def _full(self, level: int, processes: list[ForkProcess]) -> bool:
        """One full disk; whether the run is to go on after it."""
        failed, draw = self._failed(), self._draw.random()
        self._disk.fill(level)
        for _ in waiting(lambda: self._failed() > failed, processes, time.monotonic() + FAILING):
            pass
        tally = self._outcome.tally(FULL)
        tally.times += self._failed() > failed
        if draw < 0.15:
            kind, number = (THEN_KILL, signal.SIGKILL) if draw < 0.07 else (THEN_SIGNAL, signal.SIGTERM)
            self._last = self._outcome.tally(kind)
            self._last.times += 1
            began = time.monotonic()
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid or 0, number)
            for process in processes:
                process.join(PATIENCE)
            self._check(kind, processes)
            if number == signal.SIGTERM:
                self._last.seconds.append(time.monotonic() - began)
            return False
        if not all(process.is_alive() for process in processes) and not (self._folder / "done").exists():
            for process in processes:
                process.join(PATIENCE)
            codes = [process.exitcode for process in processes]
            self._problem(f"a full disk in mid-run (level {level}) ended it with {codes}:\n{self._said()[-1500:]}")
            return False
        self._disk.empty()
        before = newest(self._folder)
        for _ in waiting(lambda: newest(self._folder) > before, processes, time.monotonic() + PATIENCE):
            pass
        return True

    def _check(self, kind: str, processes: list[ForkProcess]) -> None:
        if "Traceback" in self._said() and kind != THEN_KILL:
            self._problem(f"a traceback after {kind}:\n{self._said()[-2000:]}")
        if kind == THEN_SIGNAL and any(process.exitcode in (None, 0) for process in processes):
            self._problem(f"ended with {[process.exitcode for process in processes]} after {kind}")

    def _failed(self) -> int:
        """How often the run has said that a checkpoint could not be written, since its start."""
        return self._said().count("could not be written")

    def _said(self) -> str:
        return "".join(log.read_text(errors="replace") for log in sorted(self._place.glob("log-*")))

    def _problem(self, text: str) -> None:
        self._outcome.problems.append(f"{self._case.name} on {self._case.processes}, full disk: {text}")
