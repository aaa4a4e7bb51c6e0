"""Images on disk, decoded when they are read, and a pool of threads that reads them."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from manyviews.data.decoding.decode import Decoding, UnreadableImageError, quiet
from manyviews.data.images import Cropper, Crops, Images, Interpolation, Names, Report
from manyviews.system import distributed
from manyviews.system.files import open_beneath, open_regular, shown
from manyviews.system.plural import plural

logger = logging.getLogger(__name__)

Key = TypeVar("Key", int, str)

CHUNK = 32
"""Images of one task of a thread."""
DIGEST = 16
"""Bytes of a digest."""
OTHER_FILE = "its content has changed since the start of the run"


class State(NamedTuple):
    """Metadata that change whenever a file is written, as signed 64-bit numbers."""

    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""
    changed: int
    """Nanoseconds since 1970 of the last change of any kind (ctime), which no program can set."""
    inode: int
    device: int


def digest(file: BufferedReader) -> bytes:
    """128-bit BLAKE2b digest of the content of an open file, which is left at its beginning."""
    file.seek(0)
    content = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=DIGEST))
    file.seek(0)
    return content.digest()


def open_image(root: Path, name: str, *, follow_links: bool) -> tuple[BufferedReader, State]:
    """Opens an image and returns its state; raises OSError, or RefusedFileError for links."""
    file = open_regular(root / name) if follow_links else open_beneath(root, name)
    status = os.fstat(file.fileno())
    numbers = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    return file, State(*((number + 2**63) % 2**64 - 2**63 for number in numbers))


@runtime_checkable
class CachedImages(Protocol):
    """Decoded images by their number."""

    def read(self, image: int, /) -> UInt8[Tensor, "channels size size"] | None:
        """The picture of an image; None if the file is to be decoded; raises `UnreadableImageError`."""

    def open(self) -> object:
        """Maps the pictures into memory; raises ValueError if they are not there."""


@dataclass(frozen=True, eq=False)
class Files:
    """Images on disk; undecodable ones are read as grey, warned of and listed in `failed`.

    So are files whose content differs from `digests`, and those behind a link that is new. A file with another state is
    read once more to compare its content.
    """

    root: Path
    names: Names
    labels: Int64[Tensor, " images"] | None
    classes: tuple[str, ...]
    fingerprint: str
    decoding: Decoding
    max_bad: float
    workers: int = 0
    states: Int64[Tensor, "images 5"] | None = None
    """The `State` of each file when it was last read; None: not checked."""
    digests: UInt8[Tensor, "images 16"] | None = None
    """The digest of each file; set with `states`."""
    follow_links: bool = True
    failed: dict[str, str] = field(default_factory=dict)
    """The reasons of files that have become unreadable, by name."""
    reported: set[str] = field(default_factory=set)
    """Names in `failed` that `newly_unreadable` has returned."""
    cache: CachedImages | None = None
    """Decoded pictures, which are read instead of the files."""
    rows: Int64[Tensor, " images"] | None = None
    """The number of each image in the cache, -1 for none; set with it."""
    aspects: Float[Tensor, " images"] | None = None
    """Width over height of each image as it is upright, in float64; None: all are square."""
    whole: bool = False
    """Whether whole images are read, as those in memory are; else crops are decoded as they are needed."""

    @property
    def channels(self) -> int:
        """Channels per pixel."""
        return self.decoding.channels

    @property
    def size(self) -> int:
        """Side of the square, in pixels."""
        return self.decoding.size

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, image: int) -> UInt8[Tensor, "channels size size"]:
        """Decodes one image, or reads it from the cache; raises `UnreadableImageError`."""
        row = -1 if self.rows is None else int(self.rows[image])
        if self.cache is not None and row >= 0:
            picture = self.cache.read(row)
            if picture is not None:
                return picture
        return self.decoding.read(self.root / self.names[image], partial(self._open, image))

    def decode_crops(
        self, image: int, crops: Sequence[Crops], column: int, interpolation: Interpolation
    ) -> list[UInt8[Tensor, "_ channels _ _"]]:
        """Decodes the crops of one image, by a column of the boxes; raises `UnreadableImageError`."""
        own = [(boxes[:, column], side) for boxes, side, _ in crops]
        exact = any(part.exact for part in crops)
        opener, path = partial(self._open, image), self.root / self.names[image]
        return self.decoding.crop(path, own, interpolation=interpolation, exact=exact, opener=opener)

    def _open(self, image: int) -> BufferedReader:
        file, state = open_image(self.root, self.names[image], follow_links=self.follow_links)
        if self.states is not None and self.digests is not None and list(state) != self.states[image].tolist():
            if digest(file) != self.digests[image].numpy().tobytes():
                file.close()
                raise ValueError(OTHER_FILE)
            self.states[image] = torch.tensor(state)
        return file

    def read(self, ids: Int64[Tensor, " batch"]) -> UInt8[Tensor, "batch channels size size"]:
        """The whole images of these ids, each squeezed into a square, decoded by `workers` threads.

        Raises:
            ValueError: as `note`.
        """
        # An inference tensor could not be written to by the threads, which are not in the caller's inference mode.
        with torch.inference_mode(mode=False):
            pixels = torch.full((len(ids), self.channels, self.size, self.size), 127, dtype=torch.uint8)
        images = ids.tolist()

        def visit(position: int) -> None:
            pixels[position] = self.decode(images[position])

        self._read(visit, images)
        return pixels

    def crop(
        self, ids: Int64[Tensor, " batch"], cropper: Cropper, epoch: int
    ) -> tuple[UInt8[Tensor, "_ batch channels _ _"], ...]:
        """Crops of these images for each size, decoded by `workers` threads; raises ValueError as `note` does."""
        images, crops = ids.tolist(), self.crops(ids, cropper, epoch)
        with torch.inference_mode(mode=False):
            squares = tuple(square.fill_(127) for square in empty(self, len(images), crops))

        def visit(position: int) -> None:
            decoded = self.decode_crops(images[position], crops, position, cropper.interpolation)
            for square, own in zip(squares, decoded, strict=True):
                square[:, position] = own

        self._read(visit, images)
        return squares

    def crops(self, ids: Int64[Tensor, " batch"], cropper: Cropper, epoch: int) -> tuple[Crops, ...]:
        """The boxes that a cropper chooses in these images."""
        return cropper.crops(ids, epoch, None if self.aspects is None else self.aspects[ids])

    def _read(self, visit: Callable[[int], None], images: Sequence[int]) -> None:
        """Visits the positions of images in threads, and notes those that cannot be decoded."""
        for position, reason in in_threads(visit, len(images), self.workers).items():
            self.note(self.names[images[position]], reason)

    def note(self, name: str, reason: str) -> None:
        """Records an undecodable image; raises ValueError beyond the share `max_bad` of all images."""
        if name in self.failed:
            return
        self.failed[name] = reason
        logger.warning("%s cannot be decoded and is left out: %s", shown(self.root / name), reason)
        refuse_too_many(self.root, list(self.failed.items()), len(self), self.max_bad)


def empty(
    images: Files, count: int, crops: Sequence[Crops] | None, *, pin: bool = False
) -> tuple[UInt8[Tensor, "..."], ...]:
    """Uninitialised memory for `count` whole images, or for the crops of so many."""
    side, channels = images.size, images.channels
    shapes: list[tuple[int, ...]] = [(count, channels, side, side)]
    if crops is not None:
        shapes = [(len(boxes), count, channels, side, side) for boxes, side, _ in crops]
    return tuple(torch.empty(shape, dtype=torch.uint8, pin_memory=pin) for shape in shapes)


def newly_unreadable(images: Images) -> list[tuple[str, str]]:
    """Names and reasons of files newly unreadable on any rank since the last call; collective."""
    if not isinstance(images, Files):
        return []
    own = {name: reason for name, reason in images.failed.items() if name not in images.reported}
    new = sorted((name, reason) for name, reason in on_any_rank(own).items() if name not in images.reported)
    images.reported.update(name for name, _ in new)
    return new


def listed(unreadable: Iterable[tuple[str, str]]) -> str:
    r"""The lines of a run's unreadable.txt: name, tab, reason.

    Examples:
        >>> listed([("a/1.jpg", "the file is empty")])
        'a/1.jpg\tthe file is empty\n'
    """
    return "".join(f"{shown(name)}\t{shown(reason)}\n" for name, reason in unreadable)


def on_any_rank(failures: dict[Key, str]) -> dict[Key, str]:
    """The failures of all ranks; of one key the reason of the lowest rank; collective."""
    merged: dict[Key, str] = {}
    for own in distributed.all_gather_object(failures):
        merged = own | merged
    return merged


def in_threads(
    visit: Callable[[int], None], count: int, workers: int, report: Report | None = None, what: str = "reading"
) -> dict[int, str]:
    """Calls `visit` with 0 to `count - 1` in threads; returns the reasons of unreadable ones.

    Threads, not processes: decoding and resizing release Python's lock, and threads start at once, where processes
    would import PyTorch for some seconds. `report` is called with `what`, the number done and `count`.
    """
    failures: dict[int, str] = {}

    def chunk(start: int) -> int:
        numbers = range(start, min(start + CHUNK, count))
        for number in numbers:
            try:
                visit(number)
            except UnreadableImageError as error:
                failures[number] = error.reason
        return len(numbers)

    def follow(numbers: Iterable[int]) -> None:
        for done in accumulate(numbers):
            if report is not None:
                report(what, done, count)

    starts = range(0, count, CHUNK)
    # Not in the calling thread, which may be the main one: an exception of a signal handler, raised in a decoder, can
    # become another exception there, and a valid file would count as broken.
    with quiet(), ThreadPoolExecutor(max(workers, 1), thread_name_prefix="decode") as pool:
        try:
            futures: list[Future[int]] = [pool.submit(chunk, start) for start in starts]
            follow(future.result() for future in as_completed(futures))
        except RuntimeError as problem:
            if "can't start new thread" not in str(problem):
                raise
            pool.shutdown(cancel_futures=True)
            follow(map(chunk, starts))
        finally:
            pool.shutdown(cancel_futures=True)
    return dict(sorted(failures.items()))


def refuse_too_many(root: Path, unreadable: list[tuple[str, str]], total: int, max_bad: float) -> None:
    """Raises ValueError, with the first files, beyond the share `max_bad` of unreadable ones."""
    if len(unreadable) <= max_bad * total:
        return
    lines = [f"  {shown(name)}: {reason}" for name, reason in unreadable[:10]]
    if len(unreadable) > len(lines):
        lines.append(f"  and {len(unreadable) - len(lines)} more")
    share = f"{len(unreadable)} of {plural(total, 'image')} in {shown(root)} cannot be read"
    share += f", more than data.max_bad={max_bad:g}"
    way_out = "Repair or remove them, or allow a larger share with data.max_bad"
    raise ValueError("\n".join([f"{share} allows:", *lines, way_out]))
