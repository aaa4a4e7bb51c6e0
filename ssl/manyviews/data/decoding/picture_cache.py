"""Decoded images in a memory-mapped file, with a checksum of each."""

import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout
from jaxtyping import UInt8
from torch import Tensor

from manyviews.data.decoding.decode import UnreadableImageError
from manyviews.data.decoding.files import in_threads
from manyviews.data.images import Report
from manyviews.system.arrays import mapped_array
from manyviews.system.disk import in_words
from manyviews.system.files import read_json, shown
from manyviews.system.hardware import gigabytes
from manyviews.system.names import some
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, open_new, open_there, remove, write_json

logger = logging.getLogger(__name__)

DECODER = f"Pillow {PIL.__version__}, 2"
"""Pillow's version, and a number that changes with the package's own conversion to squares."""
LARGEST_JSON = 1 << 28
"""Bytes of the file of a key, with the reasons of unreadable images."""
LOCK = ".lock"
MADE = 1 << 32
"""Added to the checksum in the mark of a picture, so that 0 is the mark of one that is not there."""
SPLITS = ("train", "test")
ENDS = (".npy", "-marks.npy", ".json")
Key = Mapping[str, str | int | None]
Numbers = np.ndarray[Any, np.dtype[np.int64]]
Decode = Callable[[int], Tensor]


class PictureCache:
    """The decoded images of a split, in a folder: NAME.npy, their marks in NAME-marks.npy, and NAME.json.

    The mark of a picture is its CRC-32, and is written after it. What an interruption left out is thus decoded at the
    next start, and what a disk has damaged is noticed when it is first read. `shape` is [images, channels, size, size].
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, int, int, int]) -> None:
        self.folder, self.name, self.shape = folder, name, shape
        self.unreadable: dict[int, str] = {}
        """The reasons of images that cannot be decoded."""
        self._pixels: Tensor | None = None
        self._marks, self._checked = np.zeros(0, np.int64), np.zeros(0, np.bool_)
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the file itself.
        return self.__dict__ | {"_pixels": None, "_marks": None, "_checked": None}

    def make(
        self, key: Key, decode: Decode, lost: Collection[int], workers: int, report: Report | None = None
    ) -> "PictureCache":
        """Decodes the images that are not in the folder yet; called by one rank.

        Of several programs one does it, and the others wait.

        Args:
            key: what determines the pictures.
            decode: decodes an image by its number; raises `UnreadableImageError`.
            lost: images that cannot be decoded now, and are left out.
            workers: threads.
            report: progress callback.

        Raises:
            ValueError: the folder holds pictures of another key, or other files; or the disk has too little space.
        """
        try:
            missing = self._missing(key, lost)
            if len(missing):
                self._check_space(len(missing))
                make_folder(self.folder, self.folder)
                with self._locked():
                    missing = self._missing(key, lost)
                    if not self._allocated():
                        self._allocate(key)
                    if len(missing):
                        self._fill(key, missing, decode, workers, report)
            return self.open()
        except OSError as problem:
            raise ValueError(f"data.cache={shown(self.folder)} cannot be used: {in_words(problem)}") from problem

    def open(self) -> "PictureCache":
        """Maps the pictures into memory; raises ValueError if they are not there."""
        if not self._allocated():
            raise ValueError(
                f"data.cache={shown(self.folder)} is not there for all processes; name a folder that all machines "
                "share, or copy it to each"
            )
        self._pixels, self._marks = torch.from_numpy(self._mapped(".npy")), np.array(self._mapped("-marks.npy"))
        self._checked = np.zeros(len(self._marks), np.bool_)
        return self

    def read(self, image: int) -> UInt8[Tensor, "channels size size"] | None:
        """The picture of an image, or None if it is not in the file, or damaged.

        Raises:
            UnreadableImageError: the image could not be decoded.
        """
        if image in self.unreadable:
            raise UnreadableImageError(self.folder, self.unreadable[image])
        if self._pixels is None:
            self.open()
        assert self._pixels is not None
        picture = self._pixels[image]
        if self._checked[image]:
            return picture
        mark = int(self._marks[image])
        self._checked[image] = mark == MADE + zlib.crc32(picture.numpy().data)
        if self._checked[image]:
            return picture
        if mark and not self._told:
            self._told = True
            logger.warning(
                "data.cache=%s is damaged: pictures that differ from their checksums are decoded from the images; "
                "remove the folder, and it is made again",
                shown(self.folder),
            )
        return None

    def _file(self, end: str) -> Path:
        return self.folder / f"{self.name}{end}"

    def _missing(self, key: Key, lost: Collection[int]) -> Numbers:
        """The images that are neither in the folder nor unreadable; raises ValueError for a foreign one."""
        way_out = "remove the folder, or name another one"
        if self._file(".json").exists():
            try:
                stored = read_json(self._file(".json"), LARGEST_JSON)
                before = {name: stored["key"].get(name) for name in key}
                self.unreadable = {int(image): str(reason) for image, reason in stored["unreadable"].items()}
            except (ValueError, KeyError, AttributeError) as problem:
                raise ValueError(f"data.cache: {shown(self._file('.json'))} is damaged; {way_out}") from problem
            changed = [
                f"{name} was {before[name]} and is {value}" for name, value in key.items() if before[name] != value
            ]
            if changed:
                raise ValueError(
                    f"data.cache={shown(self.folder)} holds other pictures: {shown('; '.join(changed))}; {way_out}"
                )
        elif self.folder.is_dir():
            own = {f"{self.name}{end}" for end in ENDS}
            others = {f"{name}{end}" for name in SPLITS for end in ENDS} - own
            foreign = [
                entry.name for entry in self.folder.iterdir() if entry.name[0] != "." and entry.name not in others
            ]
            if foreign:
                raise ValueError(
                    f"data.cache={shown(self.folder)} holds other files, {shown(some(sorted(foreign)))}; name a new "
                    "folder, or an empty one"
                )
        marks = self._mapped("-marks.npy") if self._allocated() else np.zeros(self.shape[0], np.int64)
        done = marks != 0
        done[[*self.unreadable, *lost]] = True
        return np.flatnonzero(~done)

    def _mapped(self, end: str) -> np.memmap[Any, np.dtype[Any]]:
        # Copy on write: torch warns of arrays that are read-only.
        return mapped_array(self._file(end), "c")

    def _allocated(self) -> bool:
        """Whether both arrays are there, as long as they should be."""
        kinds = ((".npy", self.shape, np.uint8), ("-marks.npy", self.shape[:1], np.int64))
        try:
            return all(
                (array := self._mapped(end)).shape == shape and array.dtype == kind for end, shape, kind in kinds
            )
        except (OSError, ValueError):
            return False

    def _check_space(self, missing: int) -> None:
        """Tells what the pictures will take; raises ValueError for more than is free."""
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        needed, free = math.prod(self.shape) + 8 * self.shape[0], shutil.disk_usage(existing).free
        where, count = f"data.cache={shown(self.folder)}", plural(self.shape[0], "picture")
        size = f"{count} of {' × '.join(map(str, self.shape[1:]))} take {gigabytes(needed)} there"
        if self._allocated():
            logger.warning("%s: %s; the %s that are missing are decoded now", where, size, f"{missing:,}")
        elif needed > free:
            raise ValueError(
                f"{where}: {size}, and {gigabytes(free)} are free; make room, name a folder on another disk, or lower "
                "data.size"
            )
        else:
            logger.warning("%s: %s, of %s that are free; they are decoded once, now", where, size, gigabytes(free))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("data.cache=%s is being made by another program: waiting for it", shown(self.folder))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _allocate(self, key: Key) -> None:
        # The key first: without it the arrays would be somebody else's.
        write_json(self._file(".json"), {"key": key, "unreadable": {}})
        for end, shape, kind in ((".npy", self.shape, "|u1"), ("-marks.npy", self.shape[:1], "<i8")):
            remove(self._file(end))
            with open_new(self._file(end)) as file:
                header = {"descr": kind, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                size = file.tell() + math.prod(shape) * np.dtype(kind).itemsize
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):
                    # A full disk is noticed now.
                    os.posix_fallocate(file.fileno(), 0, size)

    def _fill(
        self,
        key: Key,
        missing: Numbers,
        decode: Decode,
        workers: int,
        report: Report | None,
    ) -> None:
        starts = self._mapped(".npy").offset, self._mapped("-marks.npy").offset
        size = math.prod(self.shape[1:])
        with ExitStack() as stack:
            files = [open_there(self._file(end)) for end in (".npy", "-marks.npy")]
            for file in files:
                stack.callback(os.close, file)

            def visit(position: int) -> None:
                image = int(missing[position])
                picture = decode(image).numpy().tobytes()
                _write(files[0], picture, starts[0] + image * size)
                _write(files[1], (MADE + zlib.crc32(picture)).to_bytes(8, "little"), starts[1] + 8 * image)

            failures = in_threads(visit, len(missing), workers, report, "decoding into data.cache")
        self.unreadable |= {int(missing[position]): reason for position, reason in failures.items()}
        if failures:
            write_json(self._file(".json"), {"key": key, "unreadable": self.unreadable})


def _write(file: int, content: bytes, start: int) -> None:
    """Writes all bytes at a place of a file; not through a mapping, where a full disk would kill the process."""
    left = memoryview(content)
    while left:
        count = os.pwrite(file, left, start)
        left, start = left[count:], start + count
