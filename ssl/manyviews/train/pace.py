"""Measures how many images a second are decoded, augmented and learned from, each alone."""

import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from itertools import count
from typing import NamedTuple

import torch

from manyviews.data import Loader, Order
from manyviews.data.decoding.files import Files
from manyviews.data.loader import PREFETCHED
from manyviews.data.pictures import pictures
from manyviews.system import distributed
from manyviews.system.hardware import cores
from manyviews.system.plural import plural
from manyviews.train.components import Components
from manyviews.train.pretrain import train_step

DECODED = 16
"""Images that are decoded at once."""
SECONDS = 4.0
"""Time for which each part is measured, at least once."""
MOST_TIMED = 20
BUSY = 0.95
"""Share of its own pace at which the encoder counts as busy."""


class Pace(NamedTuple):
    """Images per second of one process."""

    decoding: float
    """Of one worker alone."""
    augmentation: float
    encoder: float
    """With loss and optimiser."""
    cores: float
    """This process's share of the machine's."""
    threads: int
    """Cores that augmentation and encoder occupy."""

    @property
    def learning(self) -> float:
        """Augmentation and encoder one after the other, with decoded images at hand."""
        return 1 / (1 / self.augmentation + 1 / self.encoder)

    def reached(self, workers: int) -> float:
        """The pace of a run with so many workers: that of the slowest, or of the cores that they share.

        Examples:
            >>> Pace(30.0, 900.0, 90.0, cores=8, threads=1).reached(2)
            60.0
        """
        if not workers:
            return 1 / (1 / self.decoding + 1 / self.learning)
        shared = self.cores / (1 / self.decoding + self.threads / self.learning)
        return min(workers * self.decoding, self.learning, shared)

    def needed(self) -> int | None:
        """The fewest workers that keep the encoder busy; None if the cores are too few."""
        most = max(math.ceil(self.cores), math.ceil(self.learning / self.decoding))
        return next((workers for workers in range(1, most + 1) if self.reached(workers) >= BUSY * self.learning), None)

    def rows(self, workers: int) -> dict[str, str]:
        """Rows of a table: each part, and which of them sets the pace of a run with so many workers."""
        reached, needed = self.reached(workers), self.needed()
        if reached >= BUSY * self.learning:
            slower = "the encoder" if self.encoder <= self.augmentation else "the augmentation"
            verdict = (
                f"{slower}: {plural(workers, 'worker')} decode{'s' * (workers == 1)} as fast" if workers else slower
            )
        else:
            verdict = f"decoding: {reached:,.0f} images/s of the {self.learning:,.0f} that could be learned from; "
            if needed is not None:
                verdict += f"train.workers={needed} keeps the encoder busy"
            else:
                most = max(range(1, math.ceil(self.cores) + 1), key=self.reached)
                verdict += (
                    f"the {self.cores:g} cores reach {self.reached(most):,.0f} at most, with train.workers={most}; "
                    "smaller files or data.cache, which keeps whole pictures of data.size, take less"
                )
        return {
            "decoding": f"{self.decoding:,.0f} images/s by one worker",
            "augmentation": f"{self.augmentation:,.0f} images/s",
            "encoder": f"{self.encoder:,.0f} images/s, with loss and optimiser",
            "bottleneck": verdict,
        }


def measure(components: Components, images: Files, order: Order, step: int) -> Pace:
    """Measures each part alone, by batches from `step` on, which change the weights; collective."""
    device, views = components.accelerator.device, components.views
    small = Order(len(images), min(DECODED, len(images)), seed=components.recipe.seed)
    with closing(iter(Loader(images, small, views, workers=1, start=step))) as batches:
        for _ in range(PREFETCHED + 1):
            next(batches)
        decoding = _rate(lambda: next(batches), small.batch_size)
    epoch, batch = order.batch(step)
    ids = batch[distributed.share(len(batch))]
    given = pictures(images, ids, views, epoch).to(device)
    own = ids.to(device)
    augmentation = _rate(lambda: views(given, own, epoch), len(ids))
    components.forward.train()
    steps = count(step)
    both = _rate(lambda: train_step(components, given, own, epoch, next(steps)), len(ids))
    encoder = 1 / max(1 / both - 1 / augmentation, 1e-9)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return Pace(decoding, augmentation, encoder, cores() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)), threads)


def _rate(work: Callable[[], object], images: int) -> float:
    """Images per second of calls with so many images; identical on all ranks, which make as many calls."""
    began, calls = _now(), 0
    while True:
        work()
        calls += 1
        seconds = _now() - began
        if seconds > SECONDS or calls >= MOST_TIMED:
            return calls * images / max(seconds, 1e-9)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return distributed.from_first_rank(time.monotonic())
