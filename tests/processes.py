"""Processes that tests start: forked from one that has imported what they need, so that each begins at once."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing

multiprocessing.set_forkserver_preload(["manyviews.cli", "pytest"])


def start(work: Callable[..., None], args: tuple[Any, ...] = (), *, count: int, join: bool = True) -> Any:
    """Calls `work(number, *args)` in so many processes; an exception in one of them is raised here."""
    return torch.multiprocessing.start_processes(_begun, (work, args), count, join, start_method="forkserver")


def hear() -> None:
    """Lets this process hear signals though the fork server was started, deaf, for those that decode images."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})


def _begun(number: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    hear()
    work(number, *args)


def launched(work: Callable[..., object], *args: object, count: int = 2) -> None:
    """Calls `work(*args)` in so many processes with the environment that a launcher gives them.

    A number other than 0 that it returns, as command lines do, is an error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    start(_launched, (port, count, work, args), count=count)


def _launched(number: int, port: int, count: int, work: Callable[..., object], args: tuple[object, ...]) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = work(*args)
    if dist.is_initialized():
        dist.destroy_process_group()
    if isinstance(code, int) and code:
        raise SystemExit(code)
