"""What all stages share: the device, rows of the table, timings that wait for the device, and peak memory."""

import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

GIBIBYTE = 2**30
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure with its goal, or a check that holds or does not."""

    what: str
    value: float | str | None
    unit: str = ""
    goal: str = ""
    holds: bool | None = None
    """Whether the goal is met; None: there is none, or it could not be judged."""
    check: bool = False
    """Whether it must hold; a goal of speed may be missed."""
    note: str = ""


@dataclass(frozen=True)
class Setup:
    """Where a stage runs, in which size, and a folder for its files."""

    device: torch.device
    small: bool
    folder: Path

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def pick(self, large: T, small: T) -> T:
        """The size of a measurement: the large one, or the small one of a test."""
        return small if self.small else large

    def wait(self) -> None:
        """Waits until the device has done all its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], *, repetitions: int = 5, most: float = 2.0) -> float:
        """Median seconds of some work after a warm-up; fewer repetitions where they take longer than `most`."""
        self.once(work)
        times = [self.once(work)]
        while len(times) < self.pick(repetitions, 1) and sum(times) < most:
            times.append(self.once(work))
        return statistics.median(times)

    def peak(self, work: Callable[[], object]) -> float | None:
        """Peak memory (GiB) of some work on the GPU beyond what was held before; None on a CPU."""
        if not self.cuda:
            work()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / GIBIBYTE

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of some work, to its end on the device."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start


def on_device(profiler: torch.profiler.profile) -> tuple[int, float]:
    """Kernels and copies that a profiler has seen on the GPU, and the seconds that they took together."""
    kernels = [own for own in profiler.key_averages() if own.device_type.name == "CUDA"]
    return sum(own.count for own in kernels), sum(own.self_device_time_total for own in kernels) / 1e6


def attempted(what: str, measure: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a part of a stage; if it fails, a check that fails, so that the other parts are measured too."""
    try:
        yield from measure()
    except Exception as problem:
        # After an error of the driver nothing works in this process.
        if isinstance(problem, getattr(torch, "AcceleratorError", ())):
            raise
        traceback.print_exc()
        text = " ".join(str(problem).split())
        yield Row(what, None, holds=False, check=True, note=f"{type(problem).__name__}: {text[:300]}")


def agreement(what: str, error: float, tolerance: float, note: str = "") -> Row:
    """A check that an error is within its tolerance."""
    return Row(what, error, "", f"≤ {tolerance:g}", error <= tolerance, check=True, note=note)


def at_least(what: str, value: float, goal: float, unit: str = "", note: str = "") -> Row:
    """A figure that should reach a goal."""
    return Row(what, value, unit, f"≥ {goal:g}", value >= goal, note=note)


def at_most(what: str, value: float, goal: float, unit: str = "", note: str = "") -> Row:
    """A figure that should not exceed a goal."""
    return Row(what, value, unit, f"≤ {goal:g}", value <= goal, note=note)


def error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference of two results by the norm of the expected one; infinite if one alone is not finite.

    Numbers that neither result has, as the figures of a bank before its first step, are left out.
    """
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return math.inf
    actual, expected = actual[finite], expected[finite]
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
