"""Encodes images batch by batch into a folder of features, over all ranks."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyviews.data import Images
from manyviews.features import encoding, store
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.encoding import EncodeSettings, View
from manyviews.features.layers import Layers
from manyviews.features.store import DONE, PARTIAL, REMARK
from manyviews.system import distributed
from manyviews.system.arrays import mapped_array
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.plural import plural
from manyviews.system.writing import open_there

SECONDS_BETWEEN_SYNCS = 2.0


class Part(NamedTuple):
    """A split whose features are consecutive rows."""

    name: str
    images: Images
    first: int
    """Row of the image with id 0."""


def entries(parts: Sequence[Part]) -> Iterator[tuple[str, int, str]]:
    """Yields the part, the image's id and its name for each row."""
    for part in parts:
        for index, name in enumerate(part.images.names):
            yield part.name, index, name


def labels_of(parts: Sequence[Part]) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """int64 [rows]: labels, -1 for images without one; None if no part has labels."""
    if all(part.images.labels is None for part in parts):
        return None
    labels = np.full(sum(len(part.images) for part in parts), -1)
    for part in parts:
        if part.images.labels is not None:
            labels[part.first : part.first + len(part.images)] = part.images.labels.numpy()
    return labels


def key_of(
    opened: PretrainedBackbone,
    origin: Mapping[str, Any],
    precision: encoding.Precision,
    parts: Sequence[Part],
    widths: Mapping[str, int],
) -> dict[str, Any]:
    """All that determines the features, up to rounding, as JSON values."""
    total = sum(len(part.images) for part in parts)
    return {
        "weights": dict(origin),
        "input": opened.view.described,
        "precision": precision,
        "fingerprints": {part.name: part.images.fingerprint for part in parts},
        "layers": {
            name: {"file": f"{name}.npy", "shape": [total, width], "dtype": "float32"} for name, width in widths.items()
        },
    }


def fill(
    folder: Path,
    layers: Layers,
    parts: Sequence[Part],
    *,
    view: View,
    settings: EncodeSettings,
    console: Console,
    root: Path | None = None,
) -> None:
    """Encodes the images whose rows are missing in a `held` folder; collective.

    Each rank encodes its share, in batches that are the same for any world size: rows are then bitwise equal, as far as
    the device's arithmetic is. `view` makes the backbone's input; `root` is that of `held`.

    Raises:
        ValueError: features are not finite.
        OSError: they cannot be written.
    """
    total = sum(len(part.images) for part in parts)
    done = store.rows_done(folder, total)
    # No rank may write before all have read.
    distributed.barrier()
    if done.all():
        return
    if done.any():
        console.say(f"{int(done.sum()):,} of {plural(total, 'image')} are there already; encoding the others")
    grid = [
        (part, ids)
        for part in parts
        for ids in torch.arange(len(part.images)).split(settings.batch_size)
        if not done[part.first + int(ids[0]) : part.first + int(ids[-1]) + 1].all()
    ]
    own = grid[distributed.share(len(grid))]
    count, expected = 0, sum(len(ids) for _, ids in own)
    start = time.monotonic()
    with console.bar(), raise_on_all_ranks(), Writer(folder, layers.layers, root) as writer:
        for part in parts:
            batches = [ids for owner, ids in own if owner is part]
            failed: dict[str, str] = getattr(part.images, "failed", {})
            # From 0: they may have failed before, for another backbone.
            noted = 0
            for ids, rows in encoding.encoded(
                layers,
                part.images,
                batches,
                view=view,
                device=layers.device,
                precision=settings.precision,
                workers=settings.workers,
            ):
                for values in rows.values():
                    encoding.check_finite(values)
                for entry in list(failed.items())[noted:]:
                    writer.remark(entry)
                noted = len(failed)
                writer.put(part.first + int(ids[0]), rows)
                count += len(ids)
                pace = count / (time.monotonic() - start)
                console.update("encoding", count / expected, f"{count:,} of {expected:,}  {pace:,.0f} images/s")
    written = int(store.rows_done(folder, total).sum())
    assert written == total, f"{written} rows for {plural(total, 'image')}"
    distributed.barrier()


class Writer:
    """Writes rows to the NAME.npy of a `held` folder and records fsynced ones; one per rank.

    A write is a copy in memory and done at once; a thread syncs every few seconds. On exit, also by an exception, all
    rows are synced and recorded; rows that were not recorded because a write or a sync failed are encoded again.
    """

    def __init__(self, folder: Path, names: Iterable[str], root: Path | None = None) -> None:
        root, partial = root or folder, folder / PARTIAL
        self._stack = ExitStack()
        self._files = {}
        for name in names:
            array = mapped_array(partial / f"{name}.npy")
            descriptor = open_there(partial / f"{name}.npy", root)
            file = self._stack.enter_context(os.fdopen(descriptor, "r+b"))
            self._files[name] = (file, array.offset, array.shape[1])
        descriptor = open_there(partial / DONE.format(distributed.rank()), root, append=True)
        self._done = self._stack.enter_context(os.fdopen(descriptor, "a", encoding="utf-8"))
        self._done.write("\n" if self._done.tell() else "")
        self._unsafe: list[str] = []
        self._synced = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._sync: Future[None] | None = None

    def put(self, start: int, rows: Mapping[str, Tensor]) -> None:
        """Writes float32 [rows, width] from row `start` on; raises OSError, also of earlier rows."""
        count = 0
        for name, values in rows.items():
            file, offset, width = self._files[name]
            content, count = values.numpy(), len(values)
            assert content.dtype == np.float32, content.dtype
            assert content.shape[1] == width, content.shape
            file.seek(offset + start * content.itemsize * width)
            file.write(np.ascontiguousarray(content).data)
        self._unsafe.append(f"{start} {start + count} done\n")
        if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS and (self._sync is None or self._sync.done()):
            self._begin_sync()

    def remark(self, value: Any) -> None:
        """Records a JSON value for `remarks`, which the folder keeps until it is complete."""
        self._unsafe.append(f"{REMARK}{json.dumps(value)}\n")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            try:
                self._begin_sync()
            finally:
                self._pool.shutdown()
            self._wait_for_sync()

    def _begin_sync(self) -> None:
        self._wait_for_sync()
        for file, _, _ in self._files.values():
            file.flush()
        self._sync = self._pool.submit(self._record, self._unsafe)
        self._unsafe, self._synced = [], time.monotonic()

    def _wait_for_sync(self) -> None:
        if self._sync is not None:
            self._sync.result()

    def _record(self, lines: list[str]) -> None:
        """Syncs the rows, then records them; in the thread."""
        for file, _, _ in self._files.values():
            os.fsync(file.fileno())
        self._done.writelines(lines)
        self._done.flush()
        os.fsync(self._done.fileno())
