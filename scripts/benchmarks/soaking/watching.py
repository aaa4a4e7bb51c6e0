"""What is written down in each step of a run that is watched."""

import os
import time
from pathlib import Path
from typing import IO

from benchmarks import harness

STATUS = Path("/proc/self/status")
EVERY = 20
"""Steps between two looks at the memory."""


class Times:
    """A line for each step: when it computed its loss, whether a checkpoint is half written, and the newest one."""

    def __init__(self, told: Path, checkpoints: Path) -> None:
        self._told, self._checkpoints = told, checkpoints
        self._file: IO[str] | None = None

    def __call__(self, step: int) -> None:
        """Called in each step."""
        moment = time.monotonic()
        names = os.listdir(self._checkpoints) if self._checkpoints.exists() else []
        half = any(name.startswith(".") for name in names)
        newest = max((name for name in names if not name.startswith(".")), default="none")
        # A line at a time: the process ends without closing what it has opened.
        self._file = self._file or self._told.open("w", buffering=1)
        self._file.write(f"{moment} {int(half)} {newest}\n")


class Memory:
    """A line for every twentieth step: its number and the resident memory in KiB."""

    def __init__(self, told: Path) -> None:
        self._told = told
        self._file: IO[str] | None = None

    def __call__(self, step: int) -> None:
        """Called in each step, with the number of those before it."""
        if step % EVERY == 0:
            self._file = self._file or self._told.open("w", buffering=1)
            self._file.write(f"{step} {harness.kibibytes(STATUS, 'VmRSS')}\n")
