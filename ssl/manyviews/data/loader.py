"""Loads batches of images from any step on, the same with any number of workers."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import KW_ONLY, dataclass
from itertools import count, cycle
from queue import Empty
from typing import NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from manyviews.data.decoding.decode import quiet
from manyviews.data.decoding.files import Files
from manyviews.data.images import Images
from manyviews.data.sampler import Order
from manyviews.data.worker_process import decode
from manyviews.data.workers import Packed, Worker
from manyviews.system import distributed

PREFETCHED = 2
"""Batches that each worker decodes ahead."""


class Batch(NamedTuple):
    """One rank's share of a global batch, with the epoch it belongs to."""

    images: UInt8[Tensor, "batch channels size size"]
    ids: Int64[Tensor, " batch"]
    epoch: int


@dataclass(eq=False)
class Loader:
    """Iterates without end over one rank's share of the global batches, from step `start` on.

    Images on disk are decoded ahead by `workers` processes, which end with the iterator. On a machine with CUDA the
    batches are pinned, for `.to(device, non_blocking=True)`.

    A file that cannot be decoded any more is replaced by the next readable image, under that image's id, and listed in
    `images.failed`.

    Examples:
        >>> from manyviews.data import Sample
        >>> images = Sample().build().train
        >>> next(iter(Loader(images, Order(len(images), 4, seed=0)))).images.shape
        torch.Size([4, 1, 28, 28])

    Raises:
        ValueError: the batch does not divide over the ranks; while iterating, too many files are unreadable.
        TimeoutError: while iterating, no batch for `timeout` seconds; with the file being read.
    """

    images: Images
    order: Order
    _: KW_ONLY
    rank: int = 0
    size: int = 1
    workers: int = 0
    start: int = 0
    timeout: float = 300.0

    def __post_init__(self) -> None:
        self._pin = torch.cuda.is_available()
        batch, size = self.order.batch_size, self.size
        if batch % size:
            nearest = max(round(batch / size), 1) * size
            raise ValueError(f"a batch of {batch} images does not divide over {size} processes; use {nearest}")

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.images, Files) and self.workers:
            return self._from_workers(self.images)
        return self._in_process()

    def _plan(self) -> Iterator[tuple[int, list[int]]]:
        for step in count(self.start):
            epoch, ids = self.order.batch(step)
            # The shares of a smaller last batch differ by at most one image.
            yield epoch, ids[distributed.share(len(ids), self.rank, self.size)].tolist()

    def _in_process(self) -> Iterator[Batch]:
        for epoch, ids in self._plan():
            if isinstance(self.images, Files):
                with quiet():
                    pixels, ids, failures = decode(self.images, ids, lambda image: None)
                _note(self.images, failures)
            else:
                pixels = self.images.read(torch.tensor(ids))
            yield Batch(pixels.pin_memory() if self._pin else pixels, torch.tensor(ids), epoch)

    def _from_workers(self, images: Files) -> Iterator[Batch]:
        with ExitStack() as stack:
            packed = stack.enter_context(closing(Packed(images, self.workers)))
            workers: list[Worker] = []
            for number in range(self.workers):
                try:
                    worker = Worker(packed, number, pin=self._pin)
                except RuntimeError:  # no thread could be started: the other workers do the work
                    break
                workers.append(stack.enter_context(closing(worker)))
            if not workers:
                yield from self._in_process()
                return
            plan, turns = self._plan(), cycle(workers)
            pending: deque[tuple[Worker, int]] = deque()

            def request() -> None:
                (epoch, share), worker = next(plan), next(turns)
                worker.request(share)
                pending.append((worker, epoch))

            for _ in range(PREFETCHED * len(workers)):
                request()
            while True:
                worker, epoch = pending.popleft()
                try:
                    pixels, ids, failures = worker.get(self.timeout)
                except Empty:
                    reading = worker.reading()
                    where = f"; being read: {reading}" if reading else ""
                    raise TimeoutError(f"no batch of images came for {self.timeout:g} seconds{where}") from None
                request()
                _note(images, failures)
                yield Batch(pixels, torch.tensor(ids), epoch)


def _note(images: Files, failures: list[tuple[str, str]]) -> None:
    for name, reason in failures:
        images.note(name, reason)
