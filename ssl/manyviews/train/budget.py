"""The budget of a run, and what came of it: the share that is spent, and the means of the losses."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from manyviews.objectives import Loss
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


class MetricAverager:
    """The losses since the last line of metrics.

    Once a stopped run goes on, its next line is the mean over the steps of both sessions, to the last bit.
    """

    def __init__(self, before: Mapping[str, Sequence[float]] | None = None) -> None:
        """Begins with the losses `before` a resume, which `steps` has returned."""
        self._before = {name: list(values) for name, values in (before or {}).items()}
        self._losses: list[Loss] = []

    def __len__(self) -> int:
        """The steps that the next line is about."""
        return len(self._before.get("loss", ())) + len(self._losses)

    def add(self, loss: Loss) -> None:
        """Adds a step that was taken."""
        self._losses.append(loss)

    def take(self) -> dict[str, float]:
        """The means over the steps and over the processes; then it starts anew; collective."""
        means = {name: sum(values) / len(values) for name, values in self.steps().items()}
        self._before, self._losses = {}, []
        return means

    def steps(self) -> dict[str, list[float]]:
        """Of each step the loss and its terms, each the mean over the processes; collective."""
        if self._losses:
            names = ["loss", *self._losses[0].terms]
            own = [[loss.total, *(loss.terms[name] for name in names[1:])] for loss in self._losses]
            # All at once: each travels and is waited for otherwise.
            rows = distributed.mean(torch.stack([torch.stack([value.float() for value in row]) for row in own]))
            for name, values in zip(names, rows.T.tolist(), strict=True):
                self._before.setdefault(name, []).extend(values)
            self._losses = []
        return {name: list(values) for name, values in self._before.items()}
