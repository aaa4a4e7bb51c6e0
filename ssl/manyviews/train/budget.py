"""The budget of a run: the seconds of training that are spent, and which share of the whole that is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from manyviews.system import distributed


def share_spent(step: int | float, seconds: float, *, steps: int, minutes: float | None) -> float:
    """The share of a budget that is spent, in [0, 1]: of the minutes, if it is in minutes, else of the steps."""
    return min(1.0, seconds / (60 * minutes) if minutes else step / steps)


class Budget:
    """What has been spent of a run's steps or minutes, the same on all processes."""

    def __init__(self, *, steps: int, minutes: float | None, spent: float = 0.0) -> None:
        """Begins to count; `spent` are the seconds of training before a resume."""
        self._steps, self._minutes = steps, minutes
        self._began = time.monotonic() - spent
        self._saved = self.seconds()

    def seconds(self) -> float:
        """Seconds of training so far; collective."""
        return distributed.from_first_rank(time.monotonic() - self._began)

    def progress(self, step: int | float) -> float:
        """How much is done after so many steps, in [0, 1]; collective."""
        seconds = self.seconds() if self._minutes else 0.0
        return share_spent(step, seconds, steps=self._steps, minutes=self._minutes)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within is not training: it takes nothing from the budget."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def save_is_due(self, minutes: float) -> bool:
        """Whether so many minutes of training have passed since the last `saving`; collective."""
        return self.seconds() - self._saved > 60 * minutes

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A pause in which a checkpoint is begun; the minutes to the next one count from here."""
        with self.paused():
            yield
        self._saved = self.seconds()
