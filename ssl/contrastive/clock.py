"""The budget of a run and its pace: what has been spent, how much that is of the whole, and what came of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from contrastive import distributed
from contrastive.data import Order
from contrastive.objectives import Loss
from contrastive.recipe import Recipe


class Clock:
    """The budget of a run: what has been spent, in seconds of training, and how much that is of the whole."""

    def __init__(self, recipe: Recipe, order: Order, spent: float) -> None:
        self._minutes = recipe.train.minutes
        self._steps = max(1, round(recipe.train.epochs * order.steps_per_epoch))
        self.steps_per_epoch = order.steps_per_epoch
        self.images = order.images
        self._began = time.monotonic() - spent

    def seconds(self) -> float:
        """Seconds of training so far, the same on all processes."""
        return distributed.from_first_rank(time.monotonic() - self._began)

    def progress(self, step: int | float) -> float:
        """How much is done, in [0, 1]: by the clock if the budget is in minutes, else by steps."""
        return min(1.0, self.seconds() / (60 * self._minutes) if self._minutes else step / self._steps)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within is not training: it takes nothing from the budget."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began


class Record:
    """What has happened since the last line of metrics."""

    def __init__(self, clock: Clock, step: int) -> None:
        self.losses: list[Loss] = []
        self._clock, self._step, self._seconds = clock, step, clock.seconds()

    def take(self, step: int, rate: float) -> dict[str, float]:
        """The means over the steps since then and over the processes, and the pace; then it starts anew."""
        seconds, images = self._clock.seconds(), self._clock.images(step) - self._clock.images(self._step)
        means = {"loss": torch.stack([loss.total.float() for loss in self.losses]).mean()}
        for term in self.losses[0].terms:
            means[term] = torch.stack([loss.terms[term].float() for loss in self.losses]).mean()
        # All at once: each travels and is waited for otherwise.
        together = distributed.mean(torch.stack(list(means.values())))
        numbers = dict(zip(means, together.tolist(), strict=True))
        numbers["images_per_second"] = images / max(seconds - self._seconds, 1e-9)
        numbers["rate"] = rate
        numbers["epoch"], numbers["seconds"] = step / self._clock.steps_per_epoch, seconds
        self.losses, self._step, self._seconds = [], step, seconds
        return numbers
