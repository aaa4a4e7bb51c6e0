"""One process of a run that is soaked: it trains by the words of the command line and shows how far it has come."""

import errno
import os
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

from manyviews import cli
from manyviews.train import components

NOT_FINITE = 97
"""Of so many steps one has a loss that is not finite, on the last process alone."""


class Place(NamedTuple):
    """A process among those of a run."""

    rank: int = 0
    processes: int = 1
    port: int = 0

    def environment(self) -> dict[str, str]:
        """What a launcher tells it."""
        if self.processes == 1:
            return {}
        named = {"RANK": self.rank, "LOCAL_RANK": self.rank, "WORLD_SIZE": self.processes}
        named |= {"LOCAL_WORLD_SIZE": self.processes, "MASTER_PORT": self.port}
        return {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in named.items()}


class Board:
    """Memory that processes share, in which a run shows its steps: they are seen after a kill too."""

    def __init__(self) -> None:
        self._memory = mmap(-1, 16)
        struct.pack_into("qq", self._memory, 0, -1, -1)

    def show(self, step: int) -> None:
        """Called in each step with the number of those before it."""
        first, _ = self.steps()
        struct.pack_into("qq", self._memory, 0, step if first < 0 else first, step)

    def steps(self) -> tuple[int, int]:
        """The steps that there were before the first and before the newest step of this start; -1: none was begun."""
        first, newest = struct.unpack_from("qq", self._memory)
        return first, newest


def train(
    words: Sequence[str], place: Place, log: Path, show: Callable[[int], None], gauge: Path | None = None
) -> None:
    """Runs `pretrain.py WORDS` in this process, which was forked from one that does nothing but wait; does not return.

    In every `NOT_FINITE`-th step the last process's loss is made NaN.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= place.environment()
    if gauge is not None:
        failing_sync(gauge)
    build = components.build

    def watched(*arguments: Any) -> Any:
        made = build(*arguments)

        def after_loss(_: object, given: tuple[Any, ...], loss: Any) -> Any:
            step: int = given[-1]
            show(step)
            spoiled = place.rank == place.processes - 1 and step % NOT_FINITE == NOT_FINITE - 1
            return loss._replace(total=loss.total * float("nan")) if spoiled else None

        made.objective.register_forward_hook(after_loss)
        return made

    for module in list(sys.modules.values()):
        if getattr(module, "build", None) is build:
            setattr(module, "build", watched)  # noqa: B010
    raise SystemExit(cli.pretrain(words))


def failing_sync(gauge: Path) -> None:
    """From now on `os.fsync` of this process fails as the gauge says; for where no small disk can be mounted."""
    sync, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        if gauge.exists():
            calls[0] += 1
            if calls[0] > int(gauge.read_text() or 0):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            calls[0] = 0
        sync(descriptor)

    setattr(os, "fsync", fsync)  # noqa: B010


if __name__ == "__main__":
    rank, processes, port, log = sys.argv[1:5]
    train(sys.argv[5:], Place(int(rank), int(processes), int(port)), Path(log), lambda step: None)
