"""Writing rows of features into files, and noting which of them are safely on the disk."""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from torch import Tensor

from manyviews.features.store import DONE, PARTIAL, REMARK
from manyviews.system import distributed
from manyviews.system.arrays import mapped_array
from manyviews.system.writing import open_there

SECONDS_BETWEEN_SYNCS = 2.0


class Writer:
    """One process's pen: writes batches of rows, and notes them once they are safely on the disk.

    A write is a copy in memory, done at once: a thread for it would keep the backbone from its cores for longer. Only
    for the disk a thread waits. As a context it ends with everything written and noted that was put, also when an
    exception ends it; after a write or a sync that failed, what was not noted before stays so, and is done again.
    """

    def __init__(self, folder: Path, names: Iterable[str], root: Path | None = None) -> None:
        """Opens the files NAME.npy of a folder of features that is `held` with the root."""
        root = root or folder
        self._stack = ExitStack()
        place = folder / PARTIAL
        self._files = {}
        for name in names:
            array = mapped_array(place / f"{name}.npy")
            descriptor = open_there(place / f"{name}.npy", root)
            file = self._stack.enter_context(os.fdopen(descriptor, "r+b"))
            self._files[name] = (file, array.offset, array.shape[1])
            del array
        descriptor = open_there(place / DONE.format(distributed.rank()), root, append=True)
        self._done = self._stack.enter_context(os.fdopen(descriptor, "a", encoding="utf-8"))
        self._done.write("\n" if self._done.tell() else "")
        self._unsafe: list[str] = []
        self._synced = monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._sync: Future[None] | None = None

    def put(self, start: int, rows: Mapping[str, Tensor]) -> None:
        """Writes rows from number `start` on, by the names of the files.

        Raises:
            OSError: if they, or earlier ones, cannot be written.
        """
        count = 0
        for name, values in rows.items():
            file, offset, width = self._files[name]
            content, count = values.numpy(), len(values)
            assert content.dtype == np.float32, content.dtype
            assert content.shape[1] == width, content.shape
            file.seek(offset + start * content.itemsize * width)
            file.write(np.ascontiguousarray(content).data)
        self._unsafe.append(f"{start} {start + count} done\n")
        if monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS and (self._sync is None or self._sync.done()):
            self._begin_sync()

    def remark(self, value: Any) -> None:
        """Notes a JSON value for `remarks`, which the folder keeps until it is complete."""
        self._unsafe.append(f"{REMARK}{json.dumps(value)}\n")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            try:
                self._begin_sync()
            finally:
                self._pool.shutdown()
            self._finish_sync()

    def _begin_sync(self) -> None:
        self._finish_sync()
        for file, _, _ in self._files.values():
            file.flush()
        self._sync = self._pool.submit(self._note, self._unsafe)
        self._unsafe, self._synced = [], monotonic()

    def _finish_sync(self) -> None:
        if self._sync is not None:
            self._sync.result()

    def _note(self, lines: list[str]) -> None:
        """Syncs what was written when the lines were taken, then notes them; in the thread."""
        for file, _, _ in self._files.values():
            os.fsync(file.fileno())
        self._done.writelines(lines)
        self._done.flush()
        os.fsync(self._done.fileno())
