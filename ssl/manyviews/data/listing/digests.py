"""Digests of files: cached on disk, or else read."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from manyviews.data.decoding.decode import UnreadableImageError
from manyviews.data.decoding.files import DIGEST, State, digest, in_threads, open_image
from manyviews.data.images import Report
from manyviews.data.sources.paths import cache_folder
from manyviews.system.files import open_regular
from manyviews.system.first_rank import from_first
from manyviews.system.writing import replacing

SETTLED = 2_000_000_000
"""Nanoseconds between the last change of a file and its reading, from which its digest is cached: file systems record
times in steps of up to two seconds, and a second change within one step does not show."""
WORTH_FILES, WORTH_BYTES = 1_000, 1 << 26
"""Files, or bytes, from which digests are cached: fewer are quickly read again."""
MOST_ROWS = 4_000_000
"""Files of one folder whose digests are cached: 220 MB."""
MOST_BYTES = 1 << 30
"""Bytes of the cache; the least recently used tables are deleted."""
SECONDS_OF_LOCK = 60.0

Rows = np.ndarray[Any, np.dtype[np.int64]]
Digests = np.ndarray[Any, np.dtype[np.uint8]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class DigestCache:
    """Cached digests of the files of the folder `root`, by their `State`.

    ctime makes this sound: every write changes it, and no program can set it back. On Windows, where it is the time of
    creation, and where the cache cannot be written, nothing is cached.
    """

    def __init__(self, root: Path) -> None:
        name = hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=DIGEST).hexdigest()
        self._table = cache_folder() / "digests" / f"{name}.npz"

    def look_up(self, states: Rows) -> tuple[Digests, Mask]:
        """Digests [files, 16] of files in these states [files, 5], and which of them are cached."""
        rows, cached = self._read()
        digests = np.zeros((len(states), DIGEST), np.uint8)
        if not len(rows) or not len(states):
            return digests, np.zeros(len(states), np.bool_)
        keys = _keys(rows)
        order = np.argsort(keys, kind="stable")
        # Of rows of one file the newest, which is the last.
        nearest = order[np.maximum(np.searchsorted(keys[order], _keys(states), side="right") - 1, 0)]
        known = (rows[nearest] == states).all(axis=1)
        digests[known] = cached[nearest[known]]
        return digests, known

    def keep(self, states: Rows, digests: Digests, read: int) -> None:
        """Caches digests [files, 16] of states [files, 5], read since `read` (ns since 1970)."""
        settled = states[:, 1:3].max(axis=1, initial=0) < read - SETTLED
        states, digests = states[settled], digests[settled]
        if os.name == "nt" or (len(states) < WORTH_FILES and states[:, 0].sum() < WORTH_BYTES):
            return
        with suppress(OSError, Timeout, NotImplementedError):  # the cache is optional
            self._table.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._table.with_suffix(".lock"), timeout=SECONDS_OF_LOCK):
                rows, before = self._read()
                stays = ~np.isin(_keys(rows), _keys(states))
                rows = np.concatenate([rows[stays], states])[-MOST_ROWS:]
                with replacing(self._table, synced=False) as (_, file):
                    np.savez(file, states=rows, digests=np.concatenate([before[stays], digests])[-MOST_ROWS:])
            self._make_room()

    def _read(self) -> tuple[Rows, Digests]:
        nothing = np.empty((0, len(State._fields)), np.int64), np.empty((0, DIGEST), np.uint8)
        if os.name == "nt":
            return nothing
        try:
            # Every member of a zip file has a checksum.
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

    def _make_room(self) -> None:
        # Partial files of killed processes count, too.
        tables = [file for kind in ("*.npz", "*.partial") for file in self._table.parent.glob(kind)]
        tables.sort(key=lambda table: table.stat().st_mtime, reverse=True)
        total = 0
        for table in tables:
            total += table.stat().st_size
            if total > MOST_BYTES and table != self._table:
                table.unlink()
                table.with_suffix(".lock").unlink(missing_ok=True)


def _keys(states: Rows) -> Rows:
    """One number per file, of its inode and device."""
    keys: Rows = states[:, 3] ^ (states[:, 4] * np.int64(0x1E3779B97F4A7C15))
    return keys


def digests_of(
    root: Path,
    states: Rows,
    failed: dict[int, str],
    opener: Callable[[int], tuple[BufferedReader, State]],
    workers: int,
    report: Report | None,
) -> Digests:
    """Digests [images, 16] of files: from the cache, or else read.

    `states` [images, 5] are updated for the files that are read. `failed`, the numbers and reasons of files to leave
    out, gets those that cannot be read. `opener` opens a file by its number.
    """
    cache = DigestCache(root)
    digests, known = cache.look_up(states)
    known[list(failed)] = True
    missing, began = np.flatnonzero(~known), time.time_ns()

    def visit(position: int) -> None:
        image = int(missing[position])
        try:
            file, states[image] = opener(image)
            with file:
                digests[image] = np.frombuffer(digest(file), np.uint8)
        except (OSError, ValueError) as problem:
            raise UnreadableImageError(root, str(problem)) from problem

    failures = in_threads(visit, len(missing), workers, report, "hashing")
    whole = np.delete(missing, list(failures))
    cache.keep(states[whole], digests[whole], began)
    failed |= {int(missing[position]): reason for position, reason in failures.items()}
    return digests


def file_digests(folder: Path, names: Sequence[str], workers: int, report: Report | None) -> Digests:
    """Digests [files, 16] of a few large files, which rank 0 reads; collective; raises ValueError."""

    def opener(number: int) -> tuple[BufferedReader, State]:
        return open_image(folder, names[number], follow_links=True)

    def read() -> Digests:
        states, failed = np.zeros((len(names), len(State._fields)), np.int64), dict[int, str]()
        for number in range(len(names)):
            file, states[number] = opener(number)
            file.close()
        digests = digests_of(folder, states, failed, opener, workers, report)
        for number, reason in failed.items():
            raise ValueError(f"{folder / names[number]} cannot be read: {reason}")
        return digests

    return from_first(read)
