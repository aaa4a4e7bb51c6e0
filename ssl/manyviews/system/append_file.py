"""An append-only file that survives a full disk and its removal by another program."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from manyviews.system.files import shown
from manyviews.system.plural import plural
from manyviews.system.writing import aside_of, make_folder, open_there, remove, rename

MOST_KEPT = 1 << 26
"""Bytes kept in memory while the disk is full: days of metrics."""
PIECE = 1 << 20


class AppendFile:
    """An append-only file; what a full disk does not take waits in memory, and no line is torn.

    Where another program removes, renames or replaces it, its content is copied from the open descriptor to its path.
    """

    def __init__(self, path: Path, root: Path, warn: Callable[[str], object]) -> None:
        self.path, self._root, self._warn = path, root, warn
        self.lost = 0
        """Missing bytes: cut off by another program or, once closed, not written."""
        self._failing = False
        self._descriptor = open_there(path, root, append=True)
        self._size = os.fstat(self._descriptor).st_size
        self._kept = bytearray()
        self._watched = True
        # A checkpoint's thread syncs while the loop logs.
        self._lock = threading.Lock()

    def write(self, content: bytes) -> None:
        """Appends a whole line or record; while the disk is full it is buffered, up to `MOST_KEPT`."""
        with self._lock:
            if len(self._kept) < MOST_KEPT:
                self._kept += content
        self.flush()

    def flush(self) -> None:
        """Writes the buffer as far as the disk takes it; warns when that begins to fail."""
        failing = self._failing
        try:
            self._flush()
        except OSError as problem:
            if not failing:
                self._warn(f"{self.path} cannot be written ({problem}): its lines are kept until they can be")

    def sync(self) -> None:
        """Returns once everything is on the disk; raises OSError where it cannot be."""
        self._flush()
        if self._descriptor >= 0:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file; warns of bytes that could not be written."""
        self.flush()
        with self._lock:
            if self._descriptor < 0:
                return
            os.close(self._descriptor)
            self._descriptor = -1
            if self._kept:
                self.lost += len(self._kept)
                self._warn(f"{plural(len(self._kept), 'byte')} are missing at the end of {self.path}")

    def _flush(self) -> None:
        with self._lock:
            if self._descriptor < 0:
                return
            self._failing = True
            while self._kept:
                written = os.write(self._descriptor, self._kept)
                self._size += written
                del self._kept[:written]
            self._restore()
            self._failing = False

    def _restore(self) -> None:
        own = os.fstat(self._descriptor)
        if own.st_size < self._size:
            self.lost += self._size - own.st_size
            cut, self._size = self._size - own.st_size, own.st_size
            self._warn(f"{plural(cut, 'byte')} of {shown(self.path)} were cut off by another program")
            return
        if not self._watched or _is_at(self.path, own):
            return
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
        # A file system with two identities for an open file would have it rewritten each time.
        self._watched = _is_at(self.path, os.fstat(new))
        self._warn(f"{shown(self.path)} was removed, renamed or replaced by another program: it is written again")


def _is_at(path: Path, own: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), own)
    except FileNotFoundError:
        return False
