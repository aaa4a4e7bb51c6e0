"""Workers that decode images: each a process, or a thread of this one where no process can be started."""

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from manyviews.data.decoding.files import Files
from manyviews.data.worker_process import NOTHING, Decoded, block_signals, decode, get_mark, pack, receive, serve
from manyviews.system.files import shown

logger = logging.getLogger(__name__)

SECONDS_TO_END = 5.0
"""How long a process that was killed is waited for."""
METHODS = ("forkserver", "spawn")
"""Ways to start a process, tried in this order. A fork of a process with threads may hang. The fork server imports
PyTorch once for all workers, and needs a socket in TMPDIR, whose path may be too long; spawn needs none."""


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
            self._file, self._content = pack(self.images, len(self._marks))
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
        """The image that a worker decodes, or `NOTHING`."""
        if self._marks[number] != NOTHING or self._file is None:
            return self._marks[number]
        return get_mark(self._file.fileno(), number)

    def close(self) -> None:
        """Frees what was shared."""
        if self._file is not None:
            self._file.close()

    def _start_process(self, number: int, method: str) -> tuple[Any, Connection]:
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([serve.__module__])
        ours, theirs = context.Pipe()
        shared = Connection(os.dup(self._file.fileno()))
        process = context.Process(target=serve, args=(theirs, shared, self._content, number), daemon=True)
        try:
            with _signals_blocked(), _main_left_out(unless=b"__main__" in self._content):
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            shared.close()
        return process, ours


class Worker:
    """Decodes what it is asked for, in that order, in a process of its own or else in a thread of this process."""

    def __init__(self, packed: Packed, number: int, *, pin: bool) -> None:
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
            _warn_of_a_thread(f"{type(problem).__name__}: {problem}")
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
        while (ids := self._asked.get()) is not None and not self._closed:
            try:
                if connection is not None and not ready:
                    ready = self._is_ready(connection)
                    connection = connection if ready else None
                if connection is None:
                    decoded = decode(self._packed.images, ids, self._mark)
                else:
                    decoded = self._received(connection, ids)
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
                _warn_of_a_thread(f"it ended before it began, {self._how_it_died()}")
            return False
        return True

    def _received(self, connection: Connection, ids: list[int]) -> Decoded:
        images = self._packed.images
        try:
            connection.send(ids)
            shape = len(ids), images.channels, images.size, images.size
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
            return Decoded(pixels, *receive(connection, pixels))
        except (EOFError, ConnectionError) as problem:
            where = self.reading()
            raise ChildProcessError(
                f"a process that decodes images died ({self._how_it_died()})"
                f"{f'; being read: {where}' if where else ''}; fewer workers take less memory, and workers=0 none"
            ) from problem

    def _how_it_died(self) -> str:
        self._process.join(SECONDS_TO_END)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return "killed by SIGKILL, as the system does where memory runs out"
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit status {code}"


def _warn_of_a_thread(why: str) -> None:
    # It is Python's own filter, for all threads: Pillow warns of odd metadata.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logger.warning(
        "a process that decodes images could not be started (%s): a thread of this one does its work, more slowly",
        shown(why),
    )


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks signals that ask to end in processes started within: the main process decides when work ends.

    Ctrl-C, launchers and schedulers send them to the whole group. Without the processes that decode, and the fork
    server that starts them, the main process could not come to where it saves.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # It would unblock them again when it is started.
    resource_tracker.ensure_running()
    before = block_signals()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_left_out(*, unless: bool) -> Iterator[None]:
    """Keeps processes started within from importing the main module, but if its own classes are to be unpickled.

    They have no use for it, it may import much, and a program without `if __name__ == "__main__":` would begin anew.
    """
    main = sys.modules["__main__"]
    if not unless:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
