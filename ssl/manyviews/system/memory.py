"""How much memory there is."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch


def host() -> int:
    """Bytes of the machine's memory, or of the container's where that has a limit."""
    # Windows does not say it so, and nothing is refused there.
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    with suppress(OSError, ValueError):
        # "max" where it has none.
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return there


def device() -> int:
    """Bytes of the GPU's memory where there is one, else of the machine's."""
    return torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else host()


def ran_out(problem: BaseException) -> bool:
    """Whether an error says that there was no more memory, of the machine or of the GPU."""
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(problem)


def gigabytes(count: int) -> str:
    """A number of bytes as a message shows it."""
    return f"{count / 1e9:,.2f} GB"
