"""The worker process that decodes images, and its communication with the main process.

Pixels come through a pipe, not shared memory, which a small /dev/shm would limit. Names and other tensors of the data
set are shared by an unnamed file in memory, which begins with a mark for each worker: the image that it decodes.
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
from manyviews.data.decoding.files import Files, empty
from manyviews.data.images import Cropper, Crops
from manyviews.system.files import shown

MAX_SUBSTITUTIONS = 32
NOTHING = -1
"""The mark of an idle worker."""
SIGNALS = {signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])}


class Decoded(NamedTuple):
    """A decoded batch."""

    squares: tuple[UInt8[Tensor, "..."], ...]
    """As in `Pictures`."""
    ids: list[int]
    """Ids of the images, some of them replacements."""
    failures: list[tuple[str, str]]
    """Names and reasons of files that cannot be decoded any more."""


class Request(NamedTuple):
    """The images of a batch, and the epoch, on which crops depend."""

    ids: list[int]
    epoch: int


class Decoder(NamedTuple):
    """Decodes batches of images: crops of them, or with no cropper whole ones."""

    images: Files
    cropper: Cropper | None

    def decode(self, request: Request, mark: Callable[[int], object], *, pin: bool = False) -> Decoded:
        """Decodes images in turn, into pinned memory if asked to.

        An undecodable image is replaced by the next readable one. `mark` is called with each image before it is
        decoded, and with `NOTHING` after it. Raises ValueError if none of the next images can be decoded either.
        """
        images, (ids, epoch) = self.images, request
        crops = self._crops(ids, epoch)
        decoded = Decoded(empty(images, len(ids), crops, pin=pin), [], [])
        for row, wanted in enumerate(ids):
            for image in ((wanted + offset) % len(images) for offset in range(min(MAX_SUBSTITUTIONS, len(images)))):
                mark(image)
                try:
                    self._decode_into(decoded.squares, row, image, crops if image == wanted else None, epoch)
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

    def empty(self, count: int, *, pin: bool = False) -> tuple[Tensor, ...]:
        """Uninitialised memory for a batch of `count` images."""
        return empty(self.images, count, self._crops([0], 0), pin=pin)

    def _crops(self, ids: list[int], epoch: int) -> tuple[Crops, ...] | None:
        return None if self.cropper is None else self.images.crops(torch.tensor(ids), self.cropper, epoch)

    def _decode_into(
        self, squares: tuple[Tensor, ...], row: int, image: int, crops: tuple[Crops, ...] | None, epoch: int
    ) -> None:
        if self.cropper is None:
            squares[0][row] = self.images.decode(image)
            return
        column = row
        if crops is None:
            crops, column = self.images.crops(torch.tensor([image]), self.cropper, epoch), 0
        decoded = self.images.decode_crops(image, crops, column, self.cropper.interpolation)
        for square, own in zip(squares, decoded, strict=True):
            square[:, row] = own


def pack(decoder: Decoder, workers: int) -> tuple[Any, bytes]:
    """A file with a mark per worker and the decoder's tensors, and a pickle of all the rest."""
    file = _unnamed_file()
    for number in range(workers):
        set_mark(file.fileno(), number, NOTHING)
    file.seek(0, os.SEEK_END)
    content = io.BytesIO()
    _Pickler(content, file).dump(decoder)
    file.flush()
    return file, content.getvalue()


def set_mark(descriptor: int, number: int, image: int) -> None:
    """Writes the image that a worker decodes to the shared file."""
    with suppress(OSError):
        os.pwrite(descriptor, image.to_bytes(8, "little", signed=True), 8 * number)


def get_mark(descriptor: int, number: int) -> int:
    """Reads the image that a worker decodes from the shared file."""
    return int.from_bytes(os.pread(descriptor, 8, 8 * number), "little", signed=True)


def serve(connection: Connection, shared: Connection, content: bytes, number: int) -> None:
    """Decodes the requested batches until the other end of the pipe is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The fork server may have been started by other code, without blocked signals.
    block_signals()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    marks = shared.fileno()
    decoder: Decoder = _Unpickler(content, mmap.mmap(marks, 0, access=mmap.ACCESS_COPY)).load()
    with suppress(EOFError, ConnectionError):
        connection.send_bytes(b"ready")
        while True:
            request = connection.recv()
            try:
                decoded = decoder.decode(request, lambda image: set_mark(marks, number, image))
            except Exception as problem:
                # Other types might not be picklable.
                known = type(problem) in (ValueError, MemoryError, OSError)
                connection.send(problem if known else RuntimeError("".join(traceback.format_exception(problem))))
                continue
            connection.send((decoded.ids, decoded.failures))
            for square in decoded.squares:
                left = square.view(-1).numpy().data
                while left:
                    left = left[os.write(connection.fileno(), left) :]


def receive(connection: Connection, squares: tuple[Tensor, ...]) -> tuple[list[int], list[tuple[str, str]]]:
    """Receives pixels, and returns ids and failures; raises what the process raised."""
    answer: Any = connection.recv()
    if isinstance(answer, Exception):
        raise answer
    # Into the memory of the tensor: `Connection.recv_bytes` would copy twice.
    for square in squares:
        left = square.view(-1).numpy().data
        while left:
            count = os.readv(connection.fileno(), [left])
            if not count:
                raise EOFError
            left = left[count:]
    ids, failures = answer
    return ids, failures


def block_signals() -> set[int]:
    """Blocks signals of termination, if the system can; returns those that were blocked before."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)) if hasattr(signal, "pthread_sigmask") else set()


def _unnamed_file() -> Any:
    # In memory if possible, which no full disk or /dev/shm limits.
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("manyviews"), "w+b")
    return tempfile.TemporaryFile()


def _end_with_parent() -> None:
    # Also if decoding hangs in a read and does not see the end of the pipe.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Pickler(pickle.Pickler):
    """Writes tensors to a file, from which `_Unpickler` maps them into memory."""

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

    def persistent_load(self, key: tuple[int, torch.dtype, torch.Size]) -> Tensor:
        start, dtype, shape = key
        return torch.frombuffer(self._mapped, dtype=dtype, count=shape.numel(), offset=start).view(shape)
