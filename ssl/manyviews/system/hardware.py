"""Properties of the machine: CPU instructions and cores, memory."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

MOST_DECODERS = 32
"""Processes that decode images for one GPU, by default."""


def has_instructions(*names: str) -> bool:
    """Whether the CPU has one of the instruction sets (`torch.cpu.get_capabilities`)."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return any(bool(capabilities().get(name)) for name in names)
    # Older versions of torch have a function for each.
    functions = [f"_is_{end}_supported" for name in names for end in (name, name.removeprefix("avx512_"))]
    return any(bool(getattr(torch.cpu, function, bool)()) for function in functions)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoders(asked: int | None) -> int:
    """Processes that decode images: those asked for, or else 2 on a CPU, which also computes.

    With a GPU, this process's share of the cores but one, which feeds it. The quota of a container counts.
    """
    if asked is not None:
        return asked
    if not torch.cuda.is_available():
        return 2
    free = cores()
    with suppress(OSError, ValueError):
        # "max 100000" without a quota.
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        free = min(free, int(quota) // int(period))
    return min(max(1, free // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1), MOST_DECODERS)


def host() -> int:
    """Bytes of memory of the machine, or of its container."""
    # Unknown on Windows, where nothing is refused.
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    with suppress(OSError, ValueError):
        # "max" without a limit.
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return size


def device() -> int:
    """Bytes of memory of the GPU, or without one of the machine."""
    return torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else host()


def free(gpu: torch.device) -> int:
    """Bytes of memory of a GPU that are free for this process."""
    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + kept


def ran_out(problem: BaseException) -> bool:
    """Whether an error means that memory ran out, of the machine or the GPU."""
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(problem)


def memory() -> tuple[int, int]:
    """Peak and available bytes of memory, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved(), device()
    try:
        import resource
    except ImportError:  # Windows
        return 0, device()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, device()


@contextmanager
def shortage(way_out: str) -> Iterator[None]:
    """Raises a ValueError with the peak of memory and the way out, if memory runs out in the body."""
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        if not ran_out(problem):
            raise
        raise ValueError(f"{short_of_memory(problem)}; {way_out}") from problem


def short_of_memory(problem: BaseException) -> str:
    """Says that memory ran out, with its peak."""
    used, available = memory()
    reason = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
    of = "the GPU's" if torch.cuda.is_available() else "the machine's"
    return f"memory ran out: {gigabytes(used)} of {of} {gigabytes(available)} were in use at most ({reason})"


def gigabytes(count: int) -> str:
    """Formats a number of bytes."""
    return f"{count / 1e9:,.2f} GB"
