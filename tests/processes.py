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


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def world(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment that a launcher gives each process."""
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _begun(number: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    hear()
    work(number, *args)


def launched(work: Callable[..., object], *args: object, count: int = 2) -> None:
    """Calls `work(*args)` in so many processes with the environment that a launcher gives them.

    A number other than 0 that it returns, as command lines do, is an error.
    """
    start(_launched, (free_port(), count, work, args), count=count)


def _launched(number: int, port: int, count: int, work: Callable[..., object], args: tuple[object, ...]) -> None:
    os.environ |= world(number, count, port)
    code = work(*args)
    if dist.is_initialized():
        dist.destroy_process_group()
    if isinstance(code, int) and code:
        raise SystemExit(code)
