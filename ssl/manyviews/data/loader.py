"""Loads batches of images from any step on, the same with any number of workers."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import KW_ONLY, dataclass
from itertools import count, cycle
from queue import Empty
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from manyviews.data.decoding.decode import quiet
from manyviews.data.decoding.files import Files
from manyviews.data.images import Cropper, Images, Pictures
from manyviews.data.pictures import aspects_of
from manyviews.data.sampler import Order
from manyviews.data.worker_process import Decoded, Decoder, Request
from manyviews.data.workers import Packed, Worker
from manyviews.system import distributed
from manyviews.system.hardware import decoders

PREFETCHED = 2
"""Batches that each worker decodes ahead."""
MOST_PREFETCHED = 1 << 32
"""Bytes of all these batches, unless each worker has one."""
COPIED = 2
"""Batches that are copied to a GPU ahead of the one in use."""
RESIDENT = 4
"""Images in memory are kept on a GPU if they take at most its free memory divided by this."""
READING = 4
"""Threads that read decoded pictures, at most."""
UPLOADED = 4096
"""Images that are copied to a GPU at once."""


class Batch(NamedTuple):
    """One rank's share of a global batch, with the epoch it belongs to."""

    images: Pictures
    ids: Int64[Tensor, " batch"]
    epoch: int


@dataclass(eq=False)
class Loader:
    """Iterates without end over one rank's share of the global batches, from step `start` on.

    Images on disk are decoded ahead by `workers` processes, which end with the iterator; None: as many as the cores
    allow. Batches come on `device`, by default the CPU, where they are pinned if there is CUDA. For a GPU, images in
    memory that take at most a quarter of its free memory are copied there once and indexed there; of other images the
    batches are copied two ahead.

    With a `cropper`, images that are decoded as they are needed come as its crops. A file that cannot be decoded any
    more is replaced by the next readable image, under that image's id, and listed in
    `images.failed`.

    Examples:
        >>> from manyviews.data import Sample
        >>> images = Sample().build().train
        >>> next(iter(Loader(images, Order(len(images), 4, seed=0)))).images.squares[0].shape
        torch.Size([4, 1, 28, 28])

    Raises:
        ValueError: the batch does not divide over the ranks; while iterating, too many files are unreadable.
        TimeoutError: while iterating, no batch for `timeout` seconds; with the file being read.
    """

    images: Images
    order: Order
    cropper: Cropper | None = None
    _: KW_ONLY
    rank: int = 0
    size: int = 1
    workers: int | None = 0
    start: int = 0
    timeout: float = 300.0
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self._pin = torch.cuda.is_available() if self.device is None else self.device.type == "cuda"
        self._workers = decoders(self.workers)
        self._decoder: Decoder | None = None
        if isinstance(self.images, Files):
            self._decoder = Decoder(self.images, None if self.images.whole else self.cropper)
        batch, size = self.order.batch_size, self.size
        if batch % size:
            nearest = max(round(batch / size), 1) * size
            raise ValueError(f"a batch of {batch} images does not divide over {size} processes; use {nearest}")

    def __iter__(self) -> Generator[Batch]:
        device = self.device or torch.device("cpu")
        if device.type != "cuda":
            return (Batch(images.to(device), ids.to(device), epoch) for images, ids, epoch in self._from_host())
        if not isinstance(self.images, Files):
            nbytes = len(self.images) * self.images.channels * self.images.size**2
            if nbytes <= torch.cuda.mem_get_info(device)[0] // RESIDENT:
                return self._on_device(device)
        return copied_ahead(self._from_host(), device)

    def _from_host(self) -> Generator[Batch]:
        if self._decoder is None or not self._workers:
            return self._in_process()
        cached = self._decoder.images.cache is not None
        return self._from_threads(self._decoder) if cached else self._from_workers(self._decoder)

    def _plan(self) -> Generator[Request]:
        for step in count(self.start):
            epoch, ids = self.order.batch(step)
            # The shares of a smaller last batch differ by at most one image.
            yield Request(ids[distributed.share(len(ids), self.rank, self.size)].tolist(), epoch)

    def _on_device(self, device: torch.device) -> Generator[Batch]:
        images = self.images
        pixels = torch.empty(len(images), images.channels, images.size, images.size, dtype=torch.uint8, device=device)
        for ids in torch.arange(len(images)).split(UPLOADED):
            pixels[int(ids[0]) : int(ids[-1]) + 1] = images.read(ids).to(device)
        aspects = None if images.aspects is None else images.aspects.float().to(device)
        for share, epoch in self._plan():
            ids = torch.tensor(share).pin_memory().to(device, non_blocking=True)
            own = None if aspects is None else aspects.index_select(0, ids)
            yield Batch(Pictures((pixels.index_select(0, ids),), own), ids, epoch)

    def _in_process(self) -> Generator[Batch]:
        for request in self._plan():
            if self._decoder is not None:
                with quiet():
                    decoded = self._decoder.decode(request, lambda image: None)
                pictures, ids, epoch = self._batch(decoded, request.epoch)
            else:
                ids, epoch = torch.tensor(request.ids), request.epoch
                pictures = Pictures((self.images.read(ids),), aspects_of(self.images, ids))
            yield Batch(pictures.pin_memory() if self._pin else pictures, ids, epoch)

    def _batch(self, decoded: Decoded, epoch: int) -> Batch:
        """A batch of what was decoded; notes what could not be."""
        squares, ids, failures = decoded
        assert self._decoder is not None
        for name, reason in failures:
            self._decoder.images.note(name, reason)
        images, numbers = self._decoder.images, torch.tensor(ids)
        aspects = aspects_of(images, numbers)
        if aspects is not None and self._pin:
            aspects = aspects.pin_memory()
        return Batch(Pictures(squares, aspects, self._decoder.cropper is not None), numbers, epoch)

    def _from_threads(self, decoder: Decoder) -> Generator[Batch]:
        """Batches of decoded pictures, which threads read ahead."""
        plan, number = self._plan(), min(self._workers, READING)
        pool = ThreadPoolExecutor(number, thread_name_prefix="read")
        waiting: deque[tuple[int, Future[Decoded]]] = deque()

        def request() -> None:
            wanted = next(plan)
            waiting.append((wanted.epoch, pool.submit(decoder.decode, wanted, lambda image: None, pin=self._pin)))

        try:
            for _ in range(number):
                request()
            while True:
                epoch, decoded = waiting.popleft()
                request()
                yield self._batch(decoded.result(), epoch)
        finally:
            pool.shutdown(cancel_futures=True)

    def _from_workers(self, decoder: Decoder) -> Generator[Batch]:
        with ExitStack() as stack:
            packed = stack.enter_context(closing(Packed(decoder, self._workers)))
            workers: list[Worker] = []
            for number in range(self._workers):
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
                wanted, worker = next(plan), next(turns)
                worker.request(wanted)
                pending.append((worker, wanted.epoch))

            one = sum(square.nbytes for square in decoder.empty(self.order.batch_size // self.size))
            for _ in range(max(len(workers), min(PREFETCHED * len(workers), MOST_PREFETCHED // one))):
                request()
            while True:
                worker, epoch = pending.popleft()
                try:
                    decoded = worker.get(self.timeout)
                except Empty:
                    reading = worker.reading()
                    where = f"; being read: {reading}" if reading else ""
                    raise TimeoutError(f"no batch of images came for {self.timeout:g} seconds{where}") from None
                request()
                yield self._batch(decoded, epoch)


def copied_ahead(batches: Generator[Batch], device: torch.device) -> Generator[Batch]:
    """Copies batches to a GPU, two ahead of the one in use, on a stream of their own.

    Pinned batches are copied while the GPU computes, and the host waits for none.
    """
    stream = torch.cuda.Stream(device)
    copies: deque[tuple[Batch, torch.cuda.Event]] = deque()

    def first() -> Batch:
        batch, copied = copies.popleft()
        user = torch.cuda.current_stream(device)
        user.wait_event(copied)
        for tensor in (*batch.images.tensors(), batch.ids):
            # Their memory belongs to the other stream, which must not fill it again before they were used.
            tensor.record_stream(user)
        return batch

    with closing(batches):
        for images, ids, epoch in batches:
            with torch.cuda.stream(stream):
                pinned = ids.pin_memory()
                batch = Batch(images.to(device, non_blocking=True), pinned.to(device, non_blocking=True), epoch)
                copies.append((batch, stream.record_event()))
            if len(copies) > COPIED:
                yield first()
        while copies:
            yield first()
