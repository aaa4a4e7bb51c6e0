"""Batches of images for training, from any step on, the same with any number of workers."""

import multiprocessing
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from contrastive import distributed
from contrastive.data.decode import UnreadableImageError, quiet
from contrastive.data.files import Files
from contrastive.data.images import Images
from contrastive.data.order import Order

MAX_SUBSTITUTIONS = 32
SECONDS_BETWEEN_LOOKS = 5.0
"""After which it is looked whether a process that decodes has died."""


class Batch(NamedTuple):
    """One rank's share of a global batch, with the epoch it belongs to."""

    images: UInt8[Tensor, "batch channels size size"]
    ids: Int64[Tensor, " batch"]
    epoch: int


class Loader:
    """Iterates without end over one rank's share of the global batches, consecutive ids, from step `start` on.

    Images in memory are indexed; images on disk are decoded ahead by `workers` processes, which end with the iterator.
    On a machine with CUDA the batches are pinned, so that `.to(device, non_blocking=True)` does not wait.

    A file that cannot be decoded any more is replaced by the next readable image, under that image's id: the row of
    the broken one in a memory bank stays as it was. `images.failed` lists these files.

    Raises:
        ValueError: the batch does not divide over the ranks; while iterating, too many files are unreadable.
        TimeoutError: while iterating, no batch came for `timeout` seconds; names the files being read.
    """

    def __init__(
        self,
        images: Images,
        order: Order,
        *,
        rank: int = 0,
        size: int = 1,
        workers: int = 0,
        start: int = 0,
        timeout: float = 300.0,
    ) -> None:
        if order.batch_size % size:
            nearest = max(round(order.batch_size / size), 1) * size
            raise ValueError(
                f"a batch of {order.batch_size} images does not divide over {size} processes; use {nearest}"
            )
        self.images = images
        self.order = order
        self.start = start
        self.workers = workers
        self.timeout = timeout
        self.rank, self.size = rank, size
        self._pin = torch.cuda.is_available()

    def __iter__(self) -> Iterator[Batch]:
        if not isinstance(self.images, Files):
            return self._from_memory(self.images)
        return self._from_workers(self.images) if self.workers else self._from_disk(self.images)

    def _plan(self) -> Iterator[tuple[int, list[int]]]:
        for step in count(self.start):
            epoch, ids = self.order.batch(step)
            # Of a smaller last batch some ranks get one image more than others.
            yield epoch, ids[distributed.share(len(ids), self.rank, self.size)].tolist()

    def _from_memory(self, images: Images) -> Iterator[Batch]:
        for epoch, share in self._plan():
            ids = torch.tensor(share)
            pixels = images.read(ids)
            yield Batch(pixels.pin_memory() if self._pin else pixels, ids, epoch)

    def _from_disk(self, images: Files) -> Iterator[Batch]:
        reader = _Reader(images, 0)
        for item in self._plan():
            with quiet():
                batch, failures = reader[item]
            _note(images, failures)
            yield batch

    def _from_workers(self, images: Files) -> Iterator[Batch]:
        reader = _Reader(images, self.workers)
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=self._plan(),
            num_workers=self.workers,
            timeout=min(self.timeout, SECONDS_BETWEEN_LOOKS),
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            multiprocessing_context=_context(),
            pin_memory=self._pin,
        )
        with _deaf():
            batches: Any = iter(loader)
        try:
            asked = time.monotonic()
            while True:
                try:
                    batch, failures = next(batches)
                except RuntimeError as error:
                    # Whether all that decode are alive torch looks only when its own time is over.
                    if "timed out" in str(error) and time.monotonic() - asked < self.timeout:
                        continue
                    raise self._explained(error, reader, images) from error
                _note(images, failures)
                yield batch
                asked = time.monotonic()
        finally:
            batches._shutdown_workers()
            for worker in batches._workers:
                # One that hangs in a read does not hear how it would be ended otherwise.
                worker.kill()

    def _explained(self, error: RuntimeError, reader: "_Reader", images: Files) -> Exception:
        reading = ", ".join(str(images.root / images.names[i]) for i in reader.reading.tolist() if i >= 0)
        where = f"; being read: {reading}" if reading else ""
        if "timed out" in str(error):
            return TimeoutError(f"no batch of images came for {self.timeout:g} seconds{where}")
        if "exited unexpectedly" in str(error) or "killed by signal" in str(error):
            return RuntimeError(f"a process that decodes images died, often for want of memory or /dev/shm{where}")
        return error


class _Reader(Dataset[tuple[Batch, list[tuple[str, str]]]]):
    """Decodes one batch; what each worker is reading stands in `reading`, for the error message if it never ends.

    Tensors of this object reach the workers as shared memory, so the main process sees what they write.
    """

    def __init__(self, images: Files, workers: int) -> None:
        self.images = images
        self.reading = torch.full((max(workers, 1),), -1)

    def __getitem__(self, item: tuple[int, list[int]]) -> tuple[Batch, list[tuple[str, str]]]:
        epoch, ids = item
        failures: list[tuple[str, str]] = []
        read = [self._read(image, failures) for image in ids]
        pixels = torch.stack([image for image, _ in read])
        return Batch(pixels, torch.tensor([image for _, image in read]), epoch), failures

    def _read(self, wanted: int, failures: list[tuple[str, str]]) -> tuple[Tensor, int]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for offset in range(min(MAX_SUBSTITUTIONS, len(self.images))):
            image = (wanted + offset) % len(self.images)
            self.reading[worker] = image
            try:
                return self.images.decode(image), image
            except UnreadableImageError as error:
                failures.append((self.images.names[image], error.reason))
            finally:
                self.reading[worker] = -1
        name, reason = failures[-1]
        raise ValueError(f"{self.images.root / name} and the images before it cannot be read: {reason}")


def _note(images: Files, failures: list[tuple[str, str]]) -> None:
    for name, reason in failures:
        images.note(name, reason)


def _context() -> multiprocessing.context.BaseContext:
    # A fork of a process with threads (bars, TensorBoard, CUDA) may hang, and Python warns of it from 3.12 on. The
    # fork server has none; it imports the script once, not once per worker.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started within hear no signal that asks to end: the main process decides when work ends.

    Ctrl-C, launchers and schedulers send it to the whole group. Without the processes that decode, and the fork server
    that starts them, the main process could not come to where it saves.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # It would unblock them again when it is started.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    # Where signals cannot be blocked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


def _as_it_is(item: object) -> object:
    return item
