"""One writer for each output folder: a lock that the operating system drops with the process that holds it."""

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from manyviews.system import distributed
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.files import read_json, shown
from manyviews.system.writing import open_there, remove

LOCK = ".lock"
"""The file in the folder that is locked; it stays, empty, when the lock is released."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a file system answers that has no locks."""


@contextmanager
def folder_lock(
    folder: Path, check: Callable[[], object], warn: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Locks a folder against other programs that would write there, while the context is open; collective.

    The first process locks FOLDER/.lock (flock; on Windows msvcrt) and writes into it who it is. The kernel releases
    the lock when the process ends, however it ends, so that a file that was left behind is no lock. On Linux this holds
    between machines over NFS as well, where flock is a lock of the server's that ends with the client's lease; but not
    where a mount keeps locks to itself (nolock, local_lock=flock or all): there only starts on one machine are seen.

    A folder that did not exist, and in which nothing was written meanwhile, is removed again. What the context gives
    is called, on the first process, once the folder had to be made anew: it locks the new one.

    Args:
        folder: is made where it does not exist.
        check: called under the lock, on the first process, before anything is written; raises to refuse the folder.
        warn: receives one line where the file system has no locks.

    Raises:
        ValueError: if another program holds the lock, naming it; what `check` raises; on the other processes an
            OSError.
        OSError: if the folder cannot be written to.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    file, lock = folder / LOCK, FileLock(folder / LOCK, thread_local=False)
    was_there, accepted = file.exists(), False
    try:
        with raise_on_all_ranks():
            if distributed.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                _acquire(lock, folder, warn)
                check()
                accepted = True
                _sign(file)
        yield partial(_again, lock, folder, warn)
    finally:
        if distributed.rank() == 0:
            if lock.is_locked:
                used = accepted and any(entry.name != LOCK for entry in folder.glob("*"))
                _release(lock, file, keep=was_there or used)
            for path in absent:
                with suppress(OSError):
                    path.rmdir()


def _acquire(lock: FileLock, folder: Path, warn: Callable[[str], object]) -> None:
    try:
        # No link and no pipe.
        os.close(open_there(folder / LOCK, append=True))
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"output={shown(folder)} is being written by {_holder(folder / LOCK)}; wait until it ends, stop it, or "
            "name another folder with output=…"
        ) from None
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
        warn(f"{shown(folder)} is on a file system without locks: a second start with this folder is not noticed")


def _again(lock: FileLock, folder: Path, warn: Callable[[str], object]) -> None:
    lock.release()
    _acquire(lock, folder, warn)
    _sign(folder / LOCK)


def _sign(file: Path) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError), os.fdopen(open_there(file), "r+b") as writing:
        writing.truncate()
        writing.write(f"{json.dumps(holder)}\n".encode())


def _release(lock: FileLock, file: Path, *, keep: bool) -> None:
    """Releases the lock; its file goes, while it is still locked, if it is not kept."""
    with suppress(OSError):
        if keep:
            with os.fdopen(open_there(file), "r+b") as writing:
                writing.truncate()
        else:
            remove(file)
    lock.release()


def _holder(file: Path) -> str:
    """Who holds the lock, as far as its file says so."""
    try:
        found = read_json(file)
        return f"process {found['pid']} on {shown(found['host'])}, since {shown(found['since'])}"
    except (OSError, ValueError, KeyError):
        return "another process"
