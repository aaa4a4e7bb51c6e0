"""Digests of what files hold, and a cache of them: a file that nobody has touched since is not read again."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from manyviews.data.sources.paths import cache_folder
from manyviews.system.files import open_regular
from manyviews.system.writing import replacing

DIGEST = 16
"""Bytes of a digest."""
CHUNK = 1 << 20
SETTLED = 2_000_000_000
"""Nanoseconds that the last change of a file must be back when it is read, for its digest to be kept: file systems
record a time in steps of up to two seconds, and a second change within one step leaves the recorded time as it is."""
WORTH_FILES, WORTH_BYTES = 1_000, 1 << 26
"""Files, or bytes, that must have been read for their digests to be kept: fewer are read again at once."""
MOST_ROWS = 4_000_000
"""Files of one folder whose digests are kept: 220 MB."""
MOST_BYTES = 1 << 30
"""Bytes of the cache; the tables that were not used for longest go."""
SECONDS_OF_LOCK = 60.0

Rows = np.ndarray[Any, np.dtype[np.int64]]
Digests = np.ndarray[Any, np.dtype[np.uint8]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class State(NamedTuple):
    """What tells whether a file is still the one that it was, as signed 64-bit numbers."""

    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""
    changed: int
    """Nanoseconds since 1970 of the last change of any kind (ctime), which no program can set."""
    inode: int
    device: int


def state_of(file: BinaryIO) -> State:
    """The state of an open file."""
    status = os.fstat(file.fileno())
    numbers = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    return State(*((number + 2**63) % 2**64 - 2**63 for number in numbers))


def digest(file: BinaryIO) -> bytes:
    """A 128-bit BLAKE2b digest of what an open file holds from its beginning; it is at its beginning afterwards."""
    hasher = hashlib.blake2b(digest_size=DIGEST)
    file.seek(0)
    while chunk := file.read(CHUNK):
        hasher.update(chunk)
    file.seek(0)
    return hasher.digest()


class DigestCache:
    """The digests of the files of one folder that have been read before, kept in the package's cache folder.

    A digest counts for a file of the same device, inode, size, times of modification and of change. The time of change
    is what makes that sound: whoever writes to a file moves it, and can set back only the time of modification. Where
    it means something else (Windows) nothing is kept, and nothing is where the cache cannot be written to.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        name = hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=DIGEST).hexdigest()
        self._table = cache_folder() / "digests" / f"{name}.npz"

    def look_up(self, states: Rows) -> tuple[Digests, Mask]:
        """The digests [files, 16] of files in these states [files, 5], and which of them are known."""
        rows, digests = self._read()
        found = np.zeros((len(states), DIGEST), np.uint8)
        if not len(rows) or not len(states):
            return found, np.zeros(len(states), np.bool_)
        keys = _keys(rows)
        order = np.argsort(keys, kind="stable")
        # Of rows of one file the newest, which is the last.
        nearest = order[np.maximum(np.searchsorted(keys[order], _keys(states), side="right") - 1, 0)]
        known = (rows[nearest] == states).all(axis=1)
        found[known] = digests[nearest[known]]
        return found, known

    def keep(self, states: Rows, digests: Digests, read: int) -> None:
        """Adds the digests [files, 16] of files that were read in these states [files, 5].

        Args:
            states: before they were read.
            digests: of what was read.
            read: when reading began, in nanoseconds since 1970.
        """
        settled = states[:, 1:3].max(axis=1, initial=0) < read - SETTLED
        states, digests = states[settled], digests[settled]
        if os.name == "nt" or (len(states) < WORTH_FILES and states[:, 0].sum() < WORTH_BYTES):
            return
        with suppress(OSError, Timeout, NotImplementedError):  # a cache that cannot be written is done without
            self._table.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._table.with_suffix(".lock"), timeout=SECONDS_OF_LOCK):
                rows, before = self._read()
                stays = ~np.isin(_keys(rows), _keys(states))
                self._write(
                    np.concatenate([rows[stays], states])[-MOST_ROWS:],
                    np.concatenate([before[stays], digests])[-MOST_ROWS:],
                )
            self._make_room()

    def _read(self) -> tuple[Rows, Digests]:
        nothing = np.empty((0, len(State._fields)), np.int64), np.empty((0, DIGEST), np.uint8)
        if os.name == "nt":
            return nothing
        try:
            # Every member has a checksum.
            with open_regular(self._table) as file, np.load(file, allow_pickle=False) as table:
                states, digests = table["states"], table["digests"]
            with suppress(OSError):
                os.utime(self._table)
        except Exception:  # none yet, or a damaged one, which makes NumPy and zipfile raise nearly anything
            return nothing
        kinds = [(array.dtype, array.shape[1:]) for array in (states, digests)]
        if kinds != [(array.dtype, array.shape[1:]) for array in nothing] or len(states) != len(digests):
            return nothing
        return states, digests

    def _write(self, states: Rows, digests: Digests) -> None:
        with replacing(self._table, synced=False) as (_, file):
            np.savez(file, states=states, digests=digests)

    def _make_room(self) -> None:
        # What a process that was killed has left aside counts, too.
        tables = [file for kind in ("*.npz", "*.partial") for file in self._table.parent.glob(kind)]
        tables.sort(key=lambda table: table.stat().st_mtime, reverse=True)
        total = 0
        for table in tables:
            total += table.stat().st_size
            if total > MOST_BYTES and table != self._table:
                table.unlink()
                table.with_suffix(".lock").unlink(missing_ok=True)


def _keys(states: Rows) -> Rows:
    """One number for the inode and the device of each file."""
    keys: Rows = states[:, 3] ^ (states[:, 4] * np.int64(0x1E3779B97F4A7C15))
    return keys
