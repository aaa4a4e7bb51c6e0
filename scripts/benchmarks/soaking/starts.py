"""Starts of a run: forked where it is disturbed, in fresh interpreters where it is not; and what can be seen of them.

A process that has imported everything and never computed is forked for each start: a fresh interpreter would take five
seconds to import torch, and a start takes half of one. OpenMP must not have begun a thread before: there is one only.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.soaking.child import Board, Place, train
from benchmarks.soaking.equal import differences
from benchmarks.soaking.litter import INVENTED

PATIENCE = 60.0
"""Seconds after which a process that should have left, or should have begun to step, counts as hung."""


class Case(NamedTuple):
    """A run by its words, and the faults that it has to bear."""

    name: str
    words: tuple[str, ...]
    processes: int
    kills: int
    signals: int
    litters: int


def started(case: Case, folder: Path, place: Path, gauge: Path | None = None) -> tuple[Board, list[ForkProcess]]:
    """The processes of a run, which goes on from its folder where there is one; and the steps that the first shows."""
    board, context, port = Board(), get_context("fork"), free_port()
    words = (*case.words, f"output={folder}", "resume=true")
    processes = []
    for rank in range(case.processes):
        show: Callable[[int], None] = board.show if rank == 0 else nothing
        arguments = (words, Place(rank, case.processes, port), place / f"log-{rank}", show, gauge)
        process = context.Process(target=train, args=arguments)
        process.start()
        processes.append(process)
    return board, processes


def undisturbed(case: Case, folder: Path, place: Path) -> None:
    """The run that nothing happens to, in fresh interpreters: it also tells whether a forked one computes alike."""
    port = str(free_port())
    commands = [
        [
            *(sys.executable, "-m", "benchmarks.soaking.child", str(rank), str(case.processes), port),
            *(str(place / f"log-{rank}"), *case.words, f"output={folder}"),
        ]
        for rank in range(case.processes)
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    running = [subprocess.Popen(command, env=environment) for command in commands]
    codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError(f"the undisturbed run failed:\n{(place / 'log-0').read_text()}")


def compared(one: Path, two: Path) -> list[str]:
    """What two runs differ in, found in a process of its own: this one is not to compute."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compare, args=(sender, one, two))
    process.start()
    sender.close()
    found: list[str] = receiver.recv()
    process.join()
    return found


def in_short(names: Sequence[str]) -> str:
    """The first of many names, and how many there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _compare(sender: Any, one: Path, two: Path) -> None:
    sender.send(differences(one, two))


def stepping(board: Board, processes: list[ForkProcess]) -> None:
    """Waits for the first step of a start, or for an end before it."""
    for _ in waiting(lambda: board.steps()[0] >= 0, processes, time.monotonic() + PATIENCE):
        pass


def ended(processes: list[ForkProcess], launcher: float | None) -> None:
    """Waits for all to end, and from a moment on ends those that are left, as a launcher does once one has ended."""
    while launcher is not None and any(process.is_alive() for process in processes):
        time.sleep(0.001)
        if time.monotonic() > launcher:
            for process in processes:
                if process.is_alive():
                    process.terminate()
            return


def waiting(condition: Callable[[], bool], processes: list[ForkProcess], until: float) -> Iterator[None]:
    """Turns until a condition holds, a process has ended, or it is too late."""
    while not condition() and time.monotonic() < until and all(process.is_alive() for process in processes):
        time.sleep(0.0005)
        yield


def writing(checkpoints: Path) -> bool:
    """Whether a checkpoint is being written: its folder begins with a dot until it is whole."""
    try:
        return any(name.startswith(".step-") for name in os.listdir(checkpoints))
    except FileNotFoundError:
        return False


def newest(folder: Path) -> int:
    """The step of the newest checkpoint that was published; 0: none was."""
    names = [path.name for path in folder.glob("checkpoints/step-*") if path.name != INVENTED]
    return max((int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit()), default=0)


def nothing(step: int) -> None:
    """Shows no step."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def only_thread() -> None:
    """Refuses to fork a process that has threads, whose locks its children would inherit as they happen to be."""
    threads = int(harness.kibibytes(Path("/proc/self/status"), "Threads"))
    if threads != 1:
        raise RuntimeError(f"the process to fork has {threads} threads; start it with OMP_NUM_THREADS=1")
