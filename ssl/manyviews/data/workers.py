"""Workers that decode images: processes, or threads where no process can be started."""

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

from manyviews.data.worker_process import (
    NOTHING,
    Decoded,
    Decoder,
    Request,
    block_signals,
    get_mark,
    pack,
    receive,
    serve,
)
from manyviews.system.files import shown

logger = logging.getLogger(__name__)

SECONDS_TO_END = 5.0
"""How long to wait for a killed process."""
METHODS = ("forkserver", "spawn")
"""Start methods, tried in this order; a fork of a process with threads may hang. The fork server imports PyTorch once
for all workers, but needs a socket in TMPDIR, whose path may be too long."""


class Packed:
    """Images as worker processes receive them, with their tensors in memory once for all."""

    def __init__(self, decoder: Decoder, workers: int) -> None:
        self.decoder = decoder
        self._workers = workers
        self._file: Any = None
        self._content = b""

    def start_process(self, number: int) -> tuple[Any, Connection]:
        """Starts a process, and returns it with this end of its pipe; may raise any exception."""
        if self._file is None:
            self._file, self._content = pack(self.decoder, self._workers)
        problem: Exception | None = None
        for method in METHODS:
            if method in multiprocessing.get_all_start_methods():
                try:
                    return self._start_process(number, method)
                except Exception as raised:
                    problem = problem or raised
        assert problem is not None
        raise problem

    def marked(self, number: int) -> int:
        """The image that a worker process decodes, or `NOTHING`."""
        return NOTHING if self._file is None else get_mark(self._file.fileno(), number)

    def close(self) -> None:
        """Closes the shared file."""
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
            with _isolated(main=b"__main__" in self._content):
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            shared.close()
        return process, ours


class Worker:
    """Decodes batches in a process or else in a thread; RuntimeError if no thread can start."""

    def __init__(self, packed: Packed, number: int, *, pin: bool) -> None:
        self._packed, self._number, self._pin = packed, number, pin
        self._image = NOTHING
        self._requests: SimpleQueue[Request | None] = SimpleQueue()
        self._done: SimpleQueue[Decoded | Exception] = SimpleQueue()
        self._process: Any = None
        self._connection: Connection | None = None
        self._closed = False
        # Started before the process, which would remain if no thread could be started.
        self._thread = threading.Thread(target=self._work, name=f"decode-{number}", daemon=True)
        self._started = threading.Event()
        self._thread.start()
        # At exit Python would send SIGTERM, which these processes block, and wait for them.
        atexit.register(self.close)
        try:
            self._process, self._connection = packed.start_process(number)
        except Exception as problem:  # of the system, the interpreter, or pickle
            _warn_of_a_thread(f"{type(problem).__name__}: {problem}")
        finally:
            self._started.set()

    def request(self, request: Request) -> None:
        """Requests a batch, to be decoded after earlier ones."""
        self._requests.put(request)

    def get(self, timeout: float) -> Decoded:
        """Waits for the oldest request; raises queue.Empty, or ChildProcessError if it died."""
        result = self._done.get(timeout=timeout)
        if isinstance(result, Exception):
            raise result
        return result

    def reading(self) -> str:
        """The path of the image in work, also when the process died; empty if there is none."""
        image, images = self._image, self._packed.decoder.images
        image = self._packed.marked(self._number) if image == NOTHING else image
        return "" if image == NOTHING else shown(images.root / images.names[image])

    def close(self) -> None:
        """Kills the process and joins the thread, for a few seconds each."""
        atexit.unregister(self.close)
        self._closed = True
        self._requests.put(None)
        if self._process is not None:
            # Other signals are blocked, and the end of the pipe is not seen in a read that hangs.
            self._process.kill()
            self._process.join(SECONDS_TO_END)
        # A thread in PyTorch while the interpreter exits would crash the program.
        self._thread.join(SECONDS_TO_END)

    def _work(self) -> None:
        self._started.wait()
        connection, ready = self._connection, self._connection is None
        while (request := self._requests.get()) is not None and not self._closed:
            try:
                if connection is not None and not ready:
                    ready = self._is_ready(connection)
                    connection = connection if ready else None
                if connection is None:
                    decoded = self._packed.decoder.decode(request, self._mark)
                    if self._pin:
                        decoded = decoded._replace(squares=tuple(square.pin_memory() for square in decoded.squares))
                else:
                    decoded = self._received(connection, request)
                self._done.put(decoded)
            except Exception as problem:
                self._done.put(problem)
        if self._connection is not None:
            self._connection.close()

    def _mark(self, image: int) -> None:
        if self._closed and image != NOTHING:
            raise InterruptedError("the worker was closed")
        self._image = image

    def _is_ready(self, connection: Connection) -> bool:
        """Whether the process has started to serve; otherwise warns that a thread does its work."""
        try:
            connection.recv_bytes()
        except (EOFError, OSError):
            if not self._closed:
                _warn_of_a_thread(f"it ended before it began, {self._how_it_died()}")
            return False
        return True

    def _received(self, connection: Connection, request: Request) -> Decoded:
        try:
            connection.send(request)
            squares = self._packed.decoder.empty(len(request.ids), pin=self._pin)
            return Decoded(squares, *receive(connection, squares))
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
    # The filter is for all threads: Pillow warns of odd metadata.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logger.warning(
        "a process that decodes images could not be started (%s): a thread of this one does its work, more slowly",
        shown(why),
    )


@contextmanager
def _isolated(*, main: bool) -> Iterator[None]:
    """Context in which children block termination signals and, unless `main`, skip `__main__`.

    Ctrl-C, launchers and schedulers send these signals to the whole group, but the main process needs its workers, and
    the fork server, until it has saved a checkpoint. The main module may import much, and runs again if it has no
    `if __name__ == "__main__":`; it is needed only to unpickle its own classes.
    """
    own, can_block = sys.modules["__main__"], hasattr(signal, "pthread_sigmask")
    if can_block:
        # Started later, it would unblock the signals.
        resource_tracker.ensure_running()
    before = block_signals()
    if not main:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = own
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
