"""Work beside the main thread: functions in daemon threads, and copies of a GPU's tensors that nothing waits for."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def in_a_thread(work: Callable[[], T]) -> "Future[T]":
    """Runs work in a daemon thread; what it holds is freed when it ends."""

    def run(work: Callable[[], T]) -> None:
        try:
            done.set_result(work())
        except BaseException as problem:
            done.set_exception(problem)

    done: Future[T] = Future()
    # An executor would wait for a hanging disk when an error ends the run.
    threading.Thread(target=run, args=(work,), name="background", daemon=True).start()
    return done


def finished(work: Callable[[], T]) -> "Future[T]":
    """Runs work at once, for where a thread would only take the cores of the main one."""
    done: Future[T] = Future()
    done.set_result(work())
    return done


class HostCopy:
    """Copies tensors to the host, from a GPU without waiting; `read` waits for the copies alone."""

    def __init__(self, *tensors: Tensor) -> None:
        # A copy that does not block goes to pinned memory; only CUDA tells when it has arrived. Tensors of the CPU are
        # not copied.
        self._copies = [tensor.detach().to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
        self._copied = torch.cuda.Event() if any(tensor.is_cuda for tensor in tensors) else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[Tensor]:
        """The copies; from any thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copies
