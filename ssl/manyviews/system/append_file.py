"""A file that grows at its end and outlives a full disk, and another program that removes it."""

import os
import threading
from pathlib import Path

from manyviews.system.files import shown
from manyviews.system.plural import plural
from manyviews.system.writing import aside_of, make_folder, open_there, remove, rename

MOST_KEPT = 1 << 26
"""Bytes that are kept in memory where a disk is full: days of metrics."""
PIECE = 1 << 20


class Growing:
    """A file that grows at its end, of which a full disk tears no line: what it does not take waits in memory.

    Where another program removes, renames or replaces it, its content is still behind the open descriptor, and is
    written to its path again.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        """Opens the file, which is made where it does not exist, in a root that it must stay in."""
        self.path, self._root = path, path.parent if root is None else root
        self.failing = False
        self.lost = 0
        """Bytes that are missing: those that were cut off by another program and, once closed, those not written."""
        self._descriptor = open_there(path, self._root, append=True)
        self._size = os.fstat(self._descriptor).st_size
        self._kept = bytearray()
        self._watched = True
        # A checkpoint's thread syncs while the loop logs.
        self._lock = threading.Lock()

    def write(self, content: bytes) -> None:
        """Keeps a whole line or record; beyond what memory is meant for, it is dropped."""
        with self._lock:
            if len(self._kept) < MOST_KEPT:
                self._kept += content

    def flush(self) -> str:
        """Writes what is kept; returns what another program has done to the file, in words, or nothing.

        Raises:
            OSError: where the disk takes less; the rest is kept.
        """
        with self._lock:
            if self._descriptor < 0:
                return ""
            self.failing = bool(self._kept)
            while self._kept:
                written = os.write(self._descriptor, self._kept)
                self._size += written
                del self._kept[:written]
            self.failing = True
            news = self._restore()
            self.failing = False
            return news

    def sync(self) -> str:
        """Returns once everything is on the disk, with what `flush` returns; raises OSError where it cannot be."""
        news = self.flush()
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
        return news

    def close(self) -> None:
        """Closes the file, if it is open; `lost` then counts what it did not take."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
                self.lost += len(self._kept)

    def _restore(self) -> str:
        """Writes the file anew where it is not at its path any more."""
        own = os.fstat(self._descriptor)
        if own.st_size < self._size:
            self.lost += self._size - own.st_size
            news = f"{plural(self._size - own.st_size, 'byte')} of {shown(self.path)} were cut off by another program"
            self._size = own.st_size
            return news
        if not self._watched or _is_at(self.path, own):
            return ""
        make_folder(self.path.parent, self._root)
        aside = aside_of(self.path)
        new = open_there(aside, self._root, append=True)
        try:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            while piece := os.read(self._descriptor, PIECE):
                while piece:
                    piece = piece[os.write(new, piece) :]
            rename(aside, self.path, self._root)
        except BaseException:
            os.close(new)
            remove(aside, self._root)
            raise
        os.close(self._descriptor)
        self._descriptor = new
        # A file system that shows an open file under two identities would have it written anew each time.
        self._watched = _is_at(self.path, os.fstat(new))
        return f"{shown(self.path)} was removed, renamed or replaced by another program: it is written anew"


def _is_at(path: Path, own: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), own)
    except FileNotFoundError:
        return False
