"""Stage 4: how often a step of each recipe waits for the GPU, by torch's own warnings, and how much it launches."""

import collections
import itertools
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from gpu_checks.loops import images_in_memory, prepared, run_loop, steps_of
from gpu_checks.measure import Row, Setup, attempted, on_device
from manyviews import recipe as recipes
from manyviews.config import load
from manyviews.recipe import Recipe

MOST = 2
"""Host waits that a step on one GPU may have."""
WARM, COUNTED, PROFILED = 4, 4, 3
"""Steps before the count, in it, and under the profiler after it."""
SIGN = "synchronizing CUDA operation"
"""Words of the warning of `torch.cuda.set_sync_debug_mode`."""
ROOT = Path(recipes.__file__).parent


def rows(setup: Setup) -> Iterator[Row]:
    """Trains each recipe for some steps that write a line of metrics each; the step with the most waits counts."""
    names = [name for name in recipes.names() if load(Recipe, recipes.find(name)).encoder.name == "light_resnet"]
    for name in setup.pick(names, ["moco"]):
        yield from attempted(f"{name}: host waits of a step", partial(_of_recipe, setup, name))


def _of_recipe(setup: Setup, name: str) -> Iterator[Row]:
    watch, batch, folder = Watch(setup), setup.pick(100, 8), setup.folder / name
    images = images_in_memory(10 * batch, setup.pick(28, 12), 1)
    args = steps_of(WARM + COUNTED + PROFILED + 3, batch, images)
    components = prepared(name, [*args, "train.log_every=1"], images)
    shutil.rmtree(folder, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # Restored with the filters.
        warnings.showwarning = watch.note
        try:
            run_loop(components, images, folder, watch.see)
        finally:
            watch.close()
    yield from watch.rows(name)


class Watch:
    """Called after each line of metrics: counts warnings between lines, then starts and ends the profiler."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.lines = 0
        self.waits: list[str] = []
        """The location of each wait."""
        self.ends: list[int] = []
        """The number of waits at the end of each counted step."""
        self.begun = self.wall = 0.0
        self.explicit = ExitStack()
        self.profiler: torch.profiler.profile | None = None

    def note(
        self, message: Warning | str, kind: type[Warning], file: str, line: int, to: object = None, text: object = None
    ) -> None:
        """Notes a wait; those of other threads keep no step from being prepared."""
        if SIGN in str(message) and threading.current_thread() is threading.main_thread():
            path = Path(file)
            location = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
            self.waits.append(f"{location}:{line}")

    def see(self, _: Mapping[str, float]) -> None:
        """Notes the end of a step."""
        self.lines += 1
        if not self.setup.cuda:
            return
        counted = self.lines - WARM
        if counted == 0:
            torch.cuda.set_sync_debug_mode("warn")
            self.explicit.enter_context(_explicit_waits())
        if 0 <= counted <= COUNTED:
            self.ends.append(len(self.waits))
        if counted == COUNTED:
            self.close()
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
            self.begun = time.perf_counter()
        if counted == COUNTED + PROFILED and self.profiler is not None:
            torch.cuda.synchronize()
            self.wall = time.perf_counter() - self.begun
            self.profiler.stop()

    def close(self) -> None:
        """Ends the warnings, also after an error."""
        self.explicit.close()
        if self.setup.cuda:
            torch.cuda.set_sync_debug_mode("default")

    def rows(self, name: str) -> Iterator[Row]:
        """The rows of a recipe."""
        if not self.setup.cuda:
            yield Row(f"{name}: host waits of a step", None, goal=f"≤ {MOST}", note=f"{self.lines} steps; takes a GPU")
            return
        most = max((self.waits[begin:end] for begin, end in itertools.pairwise(self.ends)), key=len)
        locations = collections.Counter(most).most_common()
        note = ", ".join(f"{location} ×{count}" if count > 1 else location for location, count in locations)
        yield Row(f"{name}: host waits of a step", len(most), "", f"≤ {MOST}", len(most) <= MOST, True, note)
        assert self.profiler is not None
        launches, seconds = on_device(self.profiler)
        busy = seconds / self.wall
        yield Row(
            f"{name}: kernels and copies of a step",
            round(launches / PROFILED),
            note=f"the GPU is busy {busy:.0%} of the time",
        )


@contextmanager
def _explicit_waits() -> Iterator[None]:
    """Waits for an event, a stream or the device are warnings too: torch's own are of operations alone."""

    def warning(wait: Callable[..., object]) -> Callable[..., object]:
        def warned(*arguments: object) -> object:
            warnings.warn(f"called a {SIGN}: {wait.__qualname__}", stacklevel=2)
            return wait(*arguments)

        return warned

    with ExitStack() as stack:
        for owner in (torch.cuda.Event, torch.cuda.Stream, torch.cuda):
            stack.enter_context(patch.object(owner, "synchronize", warning(owner.synchronize)))
        yield
