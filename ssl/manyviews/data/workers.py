"""Processes that decode images, each at the other end of a pipe; a thread of this one where no process can be started.

No shared memory, semaphore or named socket is used for the images: a small /dev/shm does not matter to them. Names and
other tensors of the data set are shared by a file in memory that has no name.
"""

import atexit
import io
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from manyviews.data.decoding.decode import UnreadableImageError
from manyviews.data.decoding.files import Files
from manyviews.system.files import shown

logger = logging.getLogger(__name__)

MAX_SUBSTITUTIONS = 32
SECONDS_TO_END = 5.0
"""How long a process that was killed is waited for."""
NOTHING = -1
METHODS = ("forkserver", "spawn")
"""Ways to start a process, tried in this order. A fork of a process with threads may hang. The fork server imports
PyTorch once for all workers, and needs a socket in TMPDIR, whose path may be too long; spawn needs none."""
SIGNALS = {signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])}


class Decoded(NamedTuple):
    """Images that were decoded together."""

    pixels: UInt8[Tensor, "batch channels size size"]
    ids: list[int]
    """Those that were asked for, or of what replaces them."""
    failures: list[tuple[str, str]]
    """Names of files that cannot be decoded any more, and the reasons."""


class Reader:
    """Decodes images one after the other; `mark` hears which one is begun, so that an error can name it."""

    def __init__(self, images: Files, mark: Callable[[int], object]) -> None:
        self.images = images
        self._mark = mark

    def read(self, ids: list[int]) -> Decoded:
        """The images of these ids; the next readable one replaces one that cannot be decoded any more.

        Raises:
            ValueError: neither an image nor any of those that follow can be decoded.
        """
        images = self.images
        failures: list[tuple[str, str]] = []
        read = []
        pixels = torch.empty(len(ids), images.channels, images.size, images.size, dtype=torch.uint8)
        for row, wanted in enumerate(ids):
            read.append(self._read(pixels[row], wanted, failures))
        return Decoded(pixels, read, failures)

    def _read(self, row: Tensor, wanted: int, failures: list[tuple[str, str]]) -> int:
        for offset in range(min(MAX_SUBSTITUTIONS, len(self.images))):
            image = (wanted + offset) % len(self.images)
            self._mark(image)
            try:
                row.copy_(self.images.decode(image))
                return image
            except UnreadableImageError as error:
                failures.append((self.images.names[image], error.reason))
            finally:
                self._mark(NOTHING)
        name, reason = failures[-1]
        raise ValueError(f"{shown(self.images.root / name)} and the images before it cannot be read: {reason}")


class Worker:
    """Decodes what it is asked for, in that order, in a process of its own or else in a thread of this process."""

    def __init__(self, packed: "Packed", number: int, *, pin: bool) -> None:
        """Starts it.

        Args:
            packed: the images.
            number: which of the workers that share these images.
            pin: whether pixels are wanted in pinned memory.

        Raises:
            RuntimeError: not even a thread can be started.
        """
        self._packed, self._number, self._pin = packed, number, pin
        self._asked: SimpleQueue[list[int] | None] = SimpleQueue()
        self._done: SimpleQueue[Decoded | Exception] = SimpleQueue()
        self._process: Any = None
        self._connection: Connection | None = None
        self._closed = False
        # Begun before the process: where no thread can be, none is left behind.
        self._thread = threading.Thread(target=self._work, name=f"decode-{number}", daemon=True)
        self._started = threading.Event()
        self._thread.start()
        # Python's own exit asks processes to end by a signal to which these are deaf, and would wait for them.
        atexit.register(self.close)
        try:
            self._process, self._connection = packed.start_process(number)
        except Exception as problem:  # of the system, of the interpreter, of what cannot be pickled
            self._say_in_a_thread(f"{type(problem).__name__}: {problem}")
        finally:
            self._started.set()

    def ask(self, ids: list[int]) -> None:
        """Asks for images, whose turn comes after those that were asked for before."""
        self._asked.put(ids)

    def get(self, timeout: float) -> Decoded:
        """Waits for the images that were asked for first.

        Raises:
            queue.Empty: they did not come in time.
            ChildProcessError: the process has died.
        """
        result = self._done.get(timeout=timeout)
        if isinstance(result, Exception):
            raise result
        return result

    def reading(self) -> str:
        """The path of the image that is being decoded, or was when the process died; empty if there is none."""
        image, images = self._packed.marked(self._number), self._packed.images
        return "" if image == NOTHING else shown(images.root / images.names[image])

    def close(self) -> None:
        """Ends it, at once; process and thread are gone when this returns, unless a read never ends."""
        atexit.unregister(self.close)
        self._closed = True
        self._asked.put(None)
        if self._process is not None:
            # One that hangs in a read hears nothing else, and all of them are deaf to other signals.
            self._process.kill()
            self._process.join(SECONDS_TO_END)
        # A thread that is in PyTorch when the interpreter goes takes the program down with it.
        self._thread.join(SECONDS_TO_END)

    def _work(self) -> None:
        self._started.wait()
        connection, ready = self._connection, self._connection is None
        read = Reader(self._packed.images, self._mark).read
        while (ids := self._asked.get()) is not None and not self._closed:
            try:
                if connection is not None and not ready:
                    ready = self._is_ready(connection)
                    connection = connection if ready else None
                decoded = read(ids) if connection is None else self._received(connection, ids)
                if self._pin and not decoded.pixels.is_pinned():
                    decoded = decoded._replace(pixels=decoded.pixels.pin_memory())
                self._done.put(decoded)
            except Exception as problem:
                self._done.put(problem)
        if self._connection is not None:
            self._connection.close()

    def _mark(self, image: int) -> None:
        if self._closed and image != NOTHING:
            raise InterruptedError("nobody waits for these images any more")
        self._packed.mark(self._number, image)

    def _is_ready(self, connection: Connection) -> bool:
        """Whether the process has come to where it decodes; otherwise it is said that this one does its work."""
        try:
            connection.recv_bytes()
        except (EOFError, OSError):
            if not self._closed:
                self._say_in_a_thread(f"it ended before it began, {self._how_it_died()}")
            return False
        return True

    def _received(self, connection: Connection, ids: list[int]) -> Decoded:
        try:
            connection.send(ids)
            answer = connection.recv()
            if isinstance(answer, Exception):
                raise answer
            images = self._packed.images
            shape = len(ids), images.channels, images.size, images.size
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
            _receive(connection.fileno(), pixels)
        except (EOFError, ConnectionError) as problem:
            where = self.reading()
            raise ChildProcessError(
                f"a process that decodes images died ({self._how_it_died()})"
                f"{f'; being read: {where}' if where else ''}; fewer workers take less memory, and workers=0 none"
            ) from problem
        return Decoded(pixels, *answer)

    def _how_it_died(self) -> str:
        self._process.join(SECONDS_TO_END)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return "killed by SIGKILL, as the system does where memory runs out"
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit status {code}"

    def _say_in_a_thread(self, why: str) -> None:
        # It is Python's own filter, for all threads: Pillow warns of odd metadata.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        logger.warning(
            "a process that decodes images could not be started (%s): a thread of this one does its work, more slowly",
            shown(why),
        )


class Packed:
    """Images as several processes get them: what is large in them, tensors, is in memory once for all."""

    def __init__(self, images: Files, workers: int) -> None:
        self.images = images
        self._marks = [NOTHING] * workers
        self._file: Any = None
        self._content = b""

    def start_process(self, number: int) -> tuple[Any, Connection]:
        """Starts a process, and returns it with this end of its pipe.

        Raises:
            Exception: of whatever kind; nothing is left behind.
        """
        if self._file is None:
            self._pack()
        problem: Exception | None = None
        for method in METHODS:
            if method in multiprocessing.get_all_start_methods():
                try:
                    return self._start_process(number, method)
                except Exception as raised:
                    problem = problem or raised
        assert problem is not None
        raise problem

    def mark(self, number: int, image: int) -> None:
        """Keeps which image a worker of this process decodes."""
        self._marks[number] = image

    def marked(self, number: int) -> int:
        """The image that a worker decodes; -1: none."""
        if self._marks[number] != NOTHING or self._file is None:
            return self._marks[number]
        return _get_mark(self._file.fileno(), number)

    def close(self) -> None:
        """Frees what was shared."""
        if self._file is not None:
            self._file.close()

    def _pack(self) -> None:
        file = _nameless_file()
        for number in range(len(self._marks)):
            _set_mark(file.fileno(), number, NOTHING)
        file.seek(0, os.SEEK_END)
        content = io.BytesIO()
        _Pickler(content, file).dump(self.images)
        file.flush()
        self._file, self._content = file, content.getvalue()

    def _start_process(self, number: int, method: str) -> tuple[Any, Connection]:
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([__name__])
        ours, theirs = context.Pipe()
        shared = Connection(os.dup(self._file.fileno()))
        process = context.Process(target=_serve, args=(theirs, shared, self._content, number), daemon=True)
        try:
            with _deaf(), _main_left_out(unless=b"__main__" in self._content):
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            shared.close()
        return process, ours


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


def _serve(connection: Connection, shared: Connection, content: bytes, number: int) -> None:
    """What a process does: decodes what it is asked for until the other end of its pipe is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The fork server may have been started by others, with other signals blocked.
    _block_signals()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    marks = shared.fileno()
    images = _Unpickler(content, mmap.mmap(marks, 0, access=mmap.ACCESS_COPY)).load()
    reader = Reader(images, lambda image: _set_mark(marks, number, image))
    with suppress(EOFError, ConnectionError):
        connection.send_bytes(b"ready")
        while True:
            ids = connection.recv()
            try:
                decoded = reader.read(ids)
            except Exception as problem:
                connection.send(_told(problem))
                continue
            connection.send((decoded.ids, decoded.failures))
            _send(connection.fileno(), decoded.pixels)


def _told(problem: Exception) -> Exception:
    """An exception as it can be raised in another process."""
    if type(problem) in (ValueError, MemoryError, OSError):
        return problem
    return RuntimeError("".join(traceback.format_exception(problem)))


def _end_with_parent() -> None:
    # Also where the decoding hangs in a read, and the end of its pipe would not be noticed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _send(descriptor: int, pixels: Tensor) -> None:
    left = pixels.view(-1).numpy().data
    while left:
        left = left[os.write(descriptor, left) :]


def _receive(descriptor: int, pixels: Tensor) -> None:
    # Into the memory of the tensor: `Connection.recv_bytes` would copy twice.
    left = pixels.view(-1).numpy().data
    while left:
        count = os.readv(descriptor, [left])
        if not count:
            raise EOFError
        left = left[count:]


def _nameless_file() -> Any:
    """A file in memory, which no full disk or /dev/shm limits, where the system has such; otherwise a temporary one."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("manyviews"), "w+b")
    return tempfile.TemporaryFile()


def _set_mark(descriptor: int, number: int, image: int) -> None:
    with suppress(OSError):
        os.pwrite(descriptor, image.to_bytes(8, "little", signed=True), 8 * number)


def _get_mark(descriptor: int, number: int) -> int:
    return int.from_bytes(os.pread(descriptor, 8, 8 * number), "little", signed=True)


def _block_signals() -> set[int]:
    if not hasattr(signal, "pthread_sigmask"):
        return set()
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


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
    before = _block_signals()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_left_out(*, unless: bool) -> Iterator[None]:
    """Processes that are started within do not import the main module, but if its own classes are to be unpickled.

    They have no use for it, it may import much, and a program without `if __name__ == "__main__":` would begin anew.
    """
    main = sys.modules["__main__"]
    if not unless:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
