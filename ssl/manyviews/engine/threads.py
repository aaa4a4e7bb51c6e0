"""Independent pieces of work on all cores, one piece per core.

On a CPU that is faster than each operation on all cores: a tile's products, exponentials and sums stay in the cache of
one core, and no core waits for another at the end of each operation.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

R = TypeVar("R")
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def on_all_cores(works: Sequence[Callable[[], R]], device: torch.device) -> list[R]:
    """Runs works without gradient, on the CPU in threads; returns their results in order."""
    threads = min(torch.get_num_threads(), len(works)) if device.type == "cpu" else 1
    if threads < 2:
        with torch.no_grad():
            return [work() for work in works]
    futures = [_pool(torch.get_num_threads()).submit(work) for work in works]
    return [future.result() for future in futures]


def _pool(threads: int) -> ThreadPoolExecutor:
    key = os.getpid(), threads  # a forked process has none of its parent's threads
    if key not in _pools:
        _pools[key] = pool = ThreadPoolExecutor(threads, thread_name_prefix="manyviews")
        barrier = Barrier(threads)
        for future in [pool.submit(_start, barrier) for _ in range(threads)]:
            future.result()
        # Each thread has its own number of threads, but new ones, autograd's among them, take the one set last.
        torch.set_num_threads(threads)
    return _pools[key]


def _start(barrier: Barrier) -> None:
    torch.set_num_threads(1)
    # Read now, or the thread's first operation takes the number that was set last anywhere, and each of these threads
    # gets some of OpenMP's, which then keep those of the main thread from waiting actively.
    torch.get_num_threads()
    torch.set_grad_enabled(False)  # each thread has its own setting, and the pieces are differentiated by hand
    # Numbers below the normal range are a hundred times slower, and a sum of exponentials never needs them.
    torch.set_flush_denormal(True)
    barrier.wait()
