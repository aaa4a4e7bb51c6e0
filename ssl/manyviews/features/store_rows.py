"""Images are encoded batch by batch into files of features, by all processes together."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyviews.data import Images
from manyviews.features import encoding, store
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.layers import Layers
from manyviews.features.settings import EncodeSettings
from manyviews.features.store_writer import Writer
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.plural import plural


class Part(NamedTuple):
    """Images whose features stand in consecutive rows."""

    name: str
    images: Images
    first: int
    """The row of the image with id 0."""


def entries(parts: Sequence[Part]) -> Iterator[tuple[str, int, str]]:
    """Of each row its part, the image's id there, and its name."""
    for part in parts:
        for index in range(len(part.images)):
            yield part.name, index, part.images.names[index]


def labels_of(parts: Sequence[Part]) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Of each row its label, -1 where the image has none; None where no part has labels."""
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
    """Everything from which features follow, rounding aside, as JSON values."""
    total = sum(len(part.images) for part in parts)
    return {
        "weights": dict(origin),
        "input": opened.transform,
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
    prepare: Callable[[Tensor], Tensor],
    settings: EncodeSettings,
    console: Console,
    root: Path | None = None,
) -> None:
    """Encodes the images whose rows are not in the folder yet; collective, in a folder that is `held`.

    Each process encodes its share, in whole batches that are the same for any number of processes: their rows are then
    equal to the last bit, as far as the device's arithmetic is.

    Args:
        folder: where the features were begun.
        layers: what is kept of each image, on its device.
        parts: the images, in the order of their rows.
        prepare: from a uint8 batch on the device to the backbone's input.
        settings: how they are encoded; their data are not looked at.
        console: told how far it has come, and how fast.
        root: that of `held`.

    Raises:
        ValueError: if features are not finite or an image's layer is not one vector.
        OSError: if they cannot be written.
    """
    total = sum(len(part.images) for part in parts)
    done = store.rows_done(folder, total)
    # None may write before all have read.
    distributed.barrier()
    if done.all():
        return
    if done.any():
        console.say(f"{int(done.sum()):,} of {plural(total, 'image')} are there already; going on with the others")
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
            # Also what could not be read before now, for another backbone.
            noted = 0
            for ids, rows in encoding.encoded(
                layers,
                part.images,
                batches,
                prepare=prepare,
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
