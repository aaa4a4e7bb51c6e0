"""Locks an output folder against a second writer."""

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
"""The file that is locked; it stays, empty, when the lock is released."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems without locks."""


@contextmanager
def folder_lock(
    folder: Path, check: Callable[[], object], warn: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Locks a folder against other writers; creates it if necessary; collective.

    Rank 0 locks FOLDER/.lock (flock; on Windows msvcrt) and writes its host and process id there. The kernel releases
    the lock when the process ends: a file that was left behind is no lock. On Linux this also works between machines
    over NFS (the server holds the lock and drops it with the client's lease), except on mounts with nolock or
    local_lock=flock or all. A new folder in which nothing was written is removed again.

    `check` is called on rank 0 under the lock and may raise; `warn` is called where the file system has no locks.
    Yields a function for rank 0 to call after another program has removed the folder: it locks the new one.

    Raises:
        ValueError: if another program holds the lock, naming it; what `check` raises; an OSError on the other ranks.
        OSError: if the folder cannot be written to.
    """
    file, lock = folder / LOCK, FileLock(folder / LOCK, thread_local=False)
    existed, accepted = file.exists(), False
    with no_empty_folders_left(folder):
        try:
            with raise_on_all_ranks():
                if distributed.rank() == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    _acquire(lock, folder, warn)
                    check()
                    accepted = True
                    _sign(file)
            yield partial(_lock_again, lock, folder, warn)
        finally:
            if lock.is_locked:
                used = accepted and any(entry.name != LOCK for entry in folder.glob("*"))
                _release(lock, file, keep=existed or used)


@contextmanager
def no_empty_folders_left(folder: Path) -> Iterator[None]:
    """Removes, at the end on rank 0, new folders on a path that are empty."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in absent if distributed.rank() == 0 else ():
            with suppress(OSError):
                path.rmdir()


def _acquire(lock: FileLock, folder: Path, warn: Callable[[str], object]) -> None:
    try:
        # Refuses a link or a pipe.
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


def _lock_again(lock: FileLock, folder: Path, warn: Callable[[str], object]) -> None:
    lock.release()
    _acquire(lock, folder, warn)
    _sign(folder / LOCK)


def _sign(file: Path) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError), os.fdopen(open_there(file), "r+b") as writing:
        writing.truncate()
        writing.write(f"{json.dumps(holder)}\n".encode())


def _release(lock: FileLock, file: Path, *, keep: bool) -> None:
    with suppress(OSError):
        if keep:
            with os.fdopen(open_there(file), "r+b") as writing:
                writing.truncate()
        else:
            remove(file)
    lock.release()


def _holder(file: Path) -> str:
    try:
        holder = read_json(file)
        return f"process {holder['pid']} on {shown(holder['host'])}, since {shown(holder['since'])}"
    except (OSError, ValueError, KeyError):
        return "another process"
