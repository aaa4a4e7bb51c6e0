"""An append-only file that survives a full disk and its removal by another program."""

import os
import threading
from pathlib import Path

from manyviews.system.files import shown
from manyviews.system.plural import plural
from manyviews.system.writing import aside_of, make_folder, open_there, remove, rename

MOST_KEPT = 1 << 26
"""Bytes kept in memory while the disk is full: days of metrics."""
PIECE = 1 << 20


class Growing:
    """An append-only file; what a full disk does not take waits in memory, and no line is torn.

    Where another program removes, renames or replaces it, its content is copied from the open descriptor to its path.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path, self._root = path, path.parent if root is None else root
        self.failing = False
        self.lost = 0
        """Missing bytes: cut off by another program or, once closed, not written."""
        self._descriptor = open_there(path, self._root, append=True)
        self._size = os.fstat(self._descriptor).st_size
        self._kept = bytearray()
        self._watched = True
        # A checkpoint's thread syncs while the loop logs.
        self._lock = threading.Lock()

    def write(self, content: bytes) -> None:
        """Buffers a whole line or record; drops it beyond `MOST_KEPT`."""
        with self._lock:
            if len(self._kept) < MOST_KEPT:
                self._kept += content

    def flush(self) -> str:
        """Writes the buffer; returns a warning if another program has changed the file, else an empty string.

        Raises:
            OSError: if the disk does not take all; the rest stays in the buffer.
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
        """Flushes and fsyncs; returns and raises as `flush` does."""
        news = self.flush()
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
        return news

    def close(self) -> None:
        """Closes the file; `lost` then counts the unwritten bytes."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
                self.lost += len(self._kept)

    def _restore(self) -> str:
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
        # A file system with two identities for an open file would have it rewritten each time.
        self._watched = _is_at(self.path, os.fstat(new))
        return f"{shown(self.path)} was removed, renamed or replaced by another program: it is written anew"


def _is_at(path: Path, own: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), own)
    except FileNotFoundError:
        return False
