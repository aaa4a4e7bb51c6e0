"""The budget of a run and its pace: what has been spent, how much that is of the whole, and what came of it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from manyviews.data import Order
from manyviews.objectives import Loss
from manyviews.recipe import Recipe
from manyviews.system import distributed


class Clock:
    """The budget of a run: what has been spent, in seconds of training, and how much that is of the whole."""

    def __init__(self, recipe: Recipe, order: Order, spent: float) -> None:
        self._budget = recipe.train
        self.steps_per_epoch = order.steps_per_epoch
        self.images = order.images
        self._began = time.monotonic() - spent

    def seconds(self) -> float:
        """Seconds of training so far, the same on all processes."""
        return distributed.from_first_rank(time.monotonic() - self._began)

    def progress(self, step: int | float) -> float:
        """How much is done, in [0, 1]: by the clock if the budget is in minutes, else by steps."""
        seconds = self.seconds() if self._budget.minutes else 0.0
        return self._budget.progress(step, seconds, self.steps_per_epoch)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within is not training: it takes nothing from the budget."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began


class MetricAverager:
    """What has happened since the last line of metrics, and how many steps were skipped in all.

    Once a stopped run goes on, its next line is the mean over the steps of both sessions, to the last bit.
    """

    def __init__(self, clock: Clock, step: int, metadata: Mapping[str, Any]) -> None:
        """From a step on; `metadata` are those of the checkpoint that is gone on from, empty in a new run."""
        self.skipped = int(metadata.get("skipped") or 0)
        """Steps of the whole run that moved nothing, for a number was not finite."""
        self.cut_off = bool(metadata.get("cut_off", False))
        """Whether a measurement was due at this step and was cut off by a signal: it is made up for."""
        self._before: dict[str, list[float]] = dict(metadata.get("losses") or {})
        self._losses: list[Loss] = []
        self._clock, self._step, self._seconds = clock, step, clock.seconds()

    def __len__(self) -> int:
        """The steps that the next line is about."""
        return len(self._before.get("loss", ())) + len(self._losses)

    def add(self, loss: Loss) -> None:
        """Adds a step that was taken."""
        self._losses.append(loss)

    def take(self, step: int, rate: float) -> dict[str, float]:
        """The means over the steps since then and over the processes, and the pace; then it starts anew; collective."""
        seconds, images = self._clock.seconds(), self._clock.images(step) - self._clock.images(self._step)
        numbers = {name: sum(values) / len(values) for name, values in self._steps().items()}
        numbers["images_per_second"] = images / max(seconds - self._seconds, 1e-9)
        numbers["rate"], numbers["skipped"] = rate, self.skipped
        numbers["epoch"], numbers["seconds"] = step / self._clock.steps_per_epoch, seconds
        self._before, self._losses, self._step, self._seconds = {}, [], step, seconds
        return numbers

    def metadata(self) -> dict[str, Any]:
        """What goes on from here needs to know, as JSON values; collective."""
        counted = {"skipped": self.skipped, "cut_off": self.cut_off}
        return {"seconds": self._clock.seconds(), **counted, "losses": self._steps()}

    def _steps(self) -> dict[str, list[float]]:
        """Of each step since the last line the loss and its terms, each the mean over the processes."""
        if not self._losses:
            return self._before
        names = ["loss", *self._losses[0].terms]
        own = [[loss.total, *(loss.terms[name] for name in names[1:])] for loss in self._losses]
        # All at once: each travels and is waited for otherwise.
        rows = distributed.mean(torch.stack([torch.stack([value.float() for value in row]) for row in own])).tolist()
        return {
            name: self._before.get(name, []) + list(values)
            for name, values in zip(names, zip(*rows, strict=True), strict=True)
        }
