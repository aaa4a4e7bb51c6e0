"""Budget of a run in steps or minutes, and the history of its losses."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from manyviews.objectives import Loss
from manyviews.system import distributed
from manyviews.system.background import HostCopy


def share_spent(step: int | float, seconds: float, *, steps: int, minutes: float | None) -> float:
    """The spent share of a budget, in [0, 1]: of the minutes, if given, else of the steps."""
    return min(1.0, seconds / (60 * minutes) if minutes else step / steps)


class Budget:
    """Spent steps or minutes of a run, identical on all ranks; `spent`: seconds before."""

    def __init__(self, *, steps: int, minutes: float | None, spent: float = 0.0) -> None:
        self._steps, self._minutes = steps, minutes
        self._began = time.monotonic() - spent
        self._saved = self.seconds()

    def seconds(self) -> float:
        """Seconds of training so far; collective."""
        return distributed.from_first_rank(time.monotonic() - self._began)

    def progress(self, step: int | float) -> float:
        """The share of the run that is done after `step` steps, in [0, 1]; collective."""
        seconds = self.seconds() if self._minutes else 0.0
        return share_spent(step, seconds, steps=self._steps, minutes=self._minutes)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock while the context is open."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def save_is_due(self, minutes: float) -> bool:
        """Whether `minutes` of training have passed since the last `saving`; collective."""
        return self.seconds() - self._saved > 60 * minutes

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Stops the clock while a checkpoint is begun, and restarts the interval to the next one."""
        with self.paused():
            yield
        self._saved = self.seconds()


class LossHistory(NamedTuple):
    """The loss and its terms of some steps, as means over the ranks; the last of them may still be on a GPU."""

    before: Mapping[str, Sequence[float]]
    """Those of the earlier steps, by name."""
    names: Sequence[str]
    rows: HostCopy | None
    """Those of the later steps, [steps, names]."""

    def read(self) -> dict[str, list[float]]:
        """The values by name, oldest first."""
        values = {name: list(earlier) for name, earlier in self.before.items()}
        if self.rows is not None:
            for name, later in zip(self.names, self.rows.read()[0].T.tolist(), strict=True):
                values.setdefault(name, []).extend(later)
        return values

    def means(self) -> dict[str, float]:
        """The mean over the steps by name."""
        return {name: sum(values) / len(values) for name, values in self.read().items()}


class MetricAverager:
    """Collects the losses since the last line of metrics; exact across a resume.

    `before` holds the losses before the resume, as `steps` returned them.
    """

    def __init__(self, before: Mapping[str, Sequence[float]] | None = None) -> None:
        self._before = {name: list(values) for name, values in (before or {}).items()}
        self._losses: list[Loss] = []

    def __len__(self) -> int:
        """Number of steps to average."""
        return len(self._before.get("loss", ())) + len(self._losses)

    def add(self, loss: Loss) -> None:
        """Adds the loss of a step."""
        self._losses.append(loss)

    def take(self) -> LossHistory:
        """Returns the losses since the last line, and resets; waits for no GPU; collective."""
        history = self._history()
        self._before, self._losses = {}, []
        return history

    def steps(self) -> dict[str, list[float]]:
        """The loss and its terms of each step, as means over the ranks; collective."""
        self._before, self._losses = self._history().read(), []
        return {name: list(values) for name, values in self._before.items()}

    def _history(self) -> LossHistory:
        if not self._losses:
            return LossHistory(self._before, (), None)
        names = ["loss", *self._losses[0].terms]
        own = [[loss.total, *(loss.terms[name] for name in names[1:])] for loss in self._losses]
        # One all-reduce for all of them.
        rows = distributed.mean(torch.stack([torch.stack([value.float() for value in row]) for row in own]))
        return LossHistory(self._before, names, HostCopy(rows))
