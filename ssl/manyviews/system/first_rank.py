"""Work that rank 0 does for all ranks, however long it takes."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

import torch.distributed as dist

from manyviews.system import distributed
from manyviews.system.distributed import raise_on_all_ranks

BEAT = 30.0
"""Seconds between two signs of life while rank 0 works; the collectives of the others would time out."""
T = TypeVar("T")


def from_first(make: Callable[[], T]) -> T:
    """Calls `make` on rank 0, which uses no collectives; returns its picklable value on all ranks; collective.

    Raises:
        OSError: on the other ranks, if it raises on rank 0; see `raise_on_all_ranks`.
    """
    if distributed.world_size() == 1:
        return make()
    made: list[T | None] = [None]
    with raise_on_all_ranks():
        if distributed.rank() == 0:
            made[0] = _while_others_wait(make)
        else:
            while distributed.from_first_rank(0.0):
                pass
    dist.broadcast_object_list(made, src=0)
    return cast(T, made[0])


def _while_others_wait(make: Callable[[], T]) -> T:
    """Calls `make`, with a thread that broadcasts 1 every few seconds, and at the end 0."""
    done = threading.Event()

    def beat() -> None:
        # Of a process that died, the broadcast at the end tells.
        with suppress(RuntimeError):
            while not done.wait(BEAT):
                distributed.from_first_rank(1.0)

    def end() -> None:
        done.set()
        thread.join()
        distributed.from_first_rank(0.0)

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        value = make()
    except Exception:
        end()
        raise
    finally:
        # A signal ends the other processes too.
        done.set()
    end()
    return value
