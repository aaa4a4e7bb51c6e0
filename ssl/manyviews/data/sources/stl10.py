"""STL-10 (Coates et al. 2011): 113,000 colour images of 96 x 96 pixels, 13,000 labelled."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from jaxtyping import Int64, UInt8
from torch import Tensor

from manyviews.data.images import Names, Report, Split, fingerprint
from manyviews.data.listing.digests import file_digests
from manyviews.data.sources.paths import FolderPath, cache_folder, download
from manyviews.data.sources.source import Source
from manyviews.system.files import LONGEST_LINE, read_bytes, read_text

SIZE = 96
BYTES = 3 * SIZE * SIZE
LARGEST = 1 << 24
"""Bytes of a file of labels."""
FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "unlabeled_X.bin", "class_names.txt")


class STL10(Source):
    """STL-10, whose labelled and unlabelled images are learnt from together."""

    name: Literal["stl10"] = "stl10"

    path: FolderPath | None = None
    """Folder of torchvision's `stl10_binary`; none: the cache. Downloaded there when missing."""

    def build(self, *, workers: int | None = 0, report: Report | None = None) -> Split:
        """5,000 labelled then 100,000 unlabelled training images (label -1), and 8,000 held out."""
        root = Path(self.path) if self.path else cache_folder()
        folder = root / "stl10_binary"
        if not all((folder / name).is_file() for name in FILES):
            download(root, self.name, lambda: torchvision.datasets.STL10(str(root), download=True))
        classes = tuple(read_text(folder / "class_names.txt", LONGEST_LINE).split())
        train = _mapped(folder, ("train", "unlabeled"), classes, report)
        return Split(train, _mapped(folder, ("test",), classes, report))


@dataclass(frozen=True, eq=False)
class Mapped:
    """Images in files that are mapped into memory: 3 GB that all ranks of a machine share."""

    parts: tuple[UInt8[Tensor, "_ 3 96 96"], ...]
    names: Names
    labels: Int64[Tensor, " images"]
    classes: tuple[str, ...]
    fingerprint: str
    rows: Int64[Tensor, " images"]
    """Index of each image in the concatenated parts."""
    channels: int = 3
    size: int = SIZE
    aspects: None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, ids: Int64[Tensor, " batch"]) -> UInt8[Tensor, "batch 3 96 96"]:
        """The images of these ids, in their order."""
        pixels = torch.empty(len(ids), 3, SIZE, SIZE, dtype=torch.uint8)
        rows, start = self.rows[ids], 0
        for part in self.parts:
            here = (rows >= start) & (rows < start + len(part))
            # The files hold each image column by column.
            pixels[here] = part.index_select(0, rows[here] - start).transpose(2, 3)
            start += len(part)
        return pixels


def _mapped(folder: Path, splits: tuple[str, ...], classes: tuple[str, ...], report: Report | None) -> Mapped:
    parts, names, labels = [], [], []
    for split in splits:
        path = folder / f"{split}_X.bin"
        count, rest = divmod(path.stat().st_size, BYTES)
        if rest or not count:
            raise ValueError(f"{path} is cut short: {path.stat().st_size} bytes are no multiple of {BYTES}")
        flat = torch.from_file(str(path), shared=False, size=count * BYTES, dtype=torch.uint8)
        parts.append(flat.view(count, 3, SIZE, SIZE))
        names += [f"{split}/{index:05d}" for index in range(count)]
        labels.append(_labels(folder / f"{split}_y.bin", count, len(classes)))
    joined = torch.cat(labels)
    digests = file_digests(folder, [f"{split}_X.bin" for split in splits], 0, report)
    mark = fingerprint(["stl10", digests, joined.numpy(), *classes])
    return Mapped(tuple(parts), Names(names), joined, classes, mark, torch.arange(len(joined)))


def _labels(path: Path, count: int, classes: int) -> Int64[Tensor, " images"]:
    if path.name.startswith("unlabeled"):
        return torch.full((count,), -1)
    labels = np.frombuffer(read_bytes(path, LARGEST), np.uint8)
    if len(labels) != count:
        raise ValueError(f"{path} holds {len(labels)} labels for {count} images")
    if labels.max(initial=0) > classes:
        raise ValueError(f"{path} has labels up to {labels.max()}, and there are {classes} classes")
    return torch.from_numpy(labels.astype(np.int64)) - 1
