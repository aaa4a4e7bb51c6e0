"""What a process that decodes images runs, and what passes between it and the one that asks.

No shared memory, semaphore or named socket is used for the images: a small /dev/shm does not matter to them. Pixels
come through a pipe; names and other tensors of the data set are shared by a file in memory that has no name, which
begins with a mark for each worker: the image that it decodes.
"""

import io
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from manyviews.data.decoding.decode import UnreadableImageError
from manyviews.data.decoding.files import Files
from manyviews.system.files import shown

MAX_SUBSTITUTIONS = 32
NOTHING = -1
"""The mark of a worker that decodes no image."""
SIGNALS = {signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])}


class Decoded(NamedTuple):
    """Images that were decoded together."""

    pixels: UInt8[Tensor, "batch channels size size"]
    ids: list[int]
    """Those that were asked for, or of what replaces them."""
    failures: list[tuple[str, str]]
    """Names of files that cannot be decoded any more, and the reasons."""


def decode(images: Files, ids: list[int], mark: Callable[[int], object]) -> Decoded:
    """Decodes images one after the other; the next readable one replaces one that cannot be decoded any more.

    Args:
        images: the data set.
        ids: of its images.
        mark: called with the image that is begun, and with `NOTHING` after it, so that an error can name it.

    Raises:
        ValueError: neither an image nor any of those that follow can be decoded.
    """
    pixels = torch.empty(len(ids), images.channels, images.size, images.size, dtype=torch.uint8)
    decoded = Decoded(pixels, [], [])
    for row, wanted in enumerate(ids):
        for image in ((wanted + offset) % len(images) for offset in range(min(MAX_SUBSTITUTIONS, len(images)))):
            mark(image)
            try:
                pixels[row] = images.decode(image)
                decoded.ids.append(image)
                break
            except UnreadableImageError as error:
                decoded.failures.append((images.names[image], error.reason))
            finally:
                mark(NOTHING)
        else:
            name, reason = decoded.failures[-1]
            raise ValueError(f"{shown(images.root / name)} and the images before it cannot be read: {reason}")
    return decoded


def pack(images: Files, workers: int) -> tuple[Any, bytes]:
    """A file with a mark for each worker and the tensors of the images, and a pickle of all the rest."""
    file = _nameless_file()
    for number in range(workers):
        set_mark(file.fileno(), number, NOTHING)
    file.seek(0, os.SEEK_END)
    content = io.BytesIO()
    _Pickler(content, file).dump(images)
    file.flush()
    return file, content.getvalue()


def set_mark(descriptor: int, number: int, image: int) -> None:
    """Notes in the shared file which image a worker decodes."""
    with suppress(OSError):
        os.pwrite(descriptor, image.to_bytes(8, "little", signed=True), 8 * number)


def get_mark(descriptor: int, number: int) -> int:
    """The image that a worker decodes."""
    return int.from_bytes(os.pread(descriptor, 8, 8 * number), "little", signed=True)


def serve(connection: Connection, shared: Connection, content: bytes, number: int) -> None:
    """Decodes what is asked for until the other end of the pipe is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The fork server may have been started by others, with other signals blocked.
    block_signals()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    marks = shared.fileno()
    images = _Unpickler(content, mmap.mmap(marks, 0, access=mmap.ACCESS_COPY)).load()
    with suppress(EOFError, ConnectionError):
        connection.send_bytes(b"ready")
        while True:
            ids = connection.recv()
            try:
                decoded = decode(images, ids, lambda image: set_mark(marks, number, image))
            except Exception as problem:
                # As it can be raised in another process.
                known = type(problem) in (ValueError, MemoryError, OSError)
                connection.send(problem if known else RuntimeError("".join(traceback.format_exception(problem))))
                continue
            connection.send((decoded.ids, decoded.failures))
            left = decoded.pixels.view(-1).numpy().data
            while left:
                left = left[os.write(connection.fileno(), left) :]


def receive(connection: Connection, pixels: Tensor) -> tuple[list[int], list[tuple[str, str]]]:
    """Fills pixels with what a process has decoded, and returns the rest of it; raises what was raised there."""
    answer: Any = connection.recv()
    if isinstance(answer, Exception):
        raise answer
    # Into the memory of the tensor: `Connection.recv_bytes` would copy twice.
    left = pixels.view(-1).numpy().data
    while left:
        count = os.readv(connection.fileno(), [left])
        if not count:
            raise EOFError
        left = left[count:]
    ids, failures = answer
    return ids, failures


def block_signals() -> set[int]:
    """Blocks signals that ask to end, where the system can; returns those that were blocked before."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)) if hasattr(signal, "pthread_sigmask") else set()


def _nameless_file() -> Any:
    # In memory, which no full disk or /dev/shm limits, where the system has such files.
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("manyviews"), "w+b")
    return tempfile.TemporaryFile()


def _end_with_parent() -> None:
    # Also where the decoding hangs in a read, and the end of its pipe would not be noticed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Pickler(pickle.Pickler):
    """Tensors go to a file, where they are mapped into memory from."""

    def __init__(self, content: io.BytesIO, file: Any) -> None:
        super().__init__(content)
        self._file = file

    def persistent_id(self, value: object) -> tuple[int, torch.dtype, torch.Size] | None:
        if not isinstance(value, Tensor) or not value.numel():
            return None
        self._file.write(bytes(-self._file.tell() % 8))
        start = self._file.tell()
        self._file.write(value.contiguous().numpy().data)
        return start, value.dtype, value.shape


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, mapped: mmap.mmap) -> None:
        super().__init__(io.BytesIO(content))
        self._mapped = mapped

    def persistent_load(self, described: tuple[int, torch.dtype, torch.Size]) -> Tensor:
        start, dtype, shape = described
        return torch.frombuffer(self._mapped, dtype=dtype, count=shape.numel(), offset=start).view(shape)
