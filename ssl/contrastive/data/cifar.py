"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 60,000 colour images of 32 x 32 pixels, read by torchvision."""

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision

from contrastive.config import Settings
from contrastive.data.images import InMemory, Report, Split, array_split
from contrastive.data.paths import FolderPath, cache_folder, download


class CIFAR10(Settings):
    """CIFAR-10: ten classes."""

    name: Literal["cifar10"] = "cifar10"

    path: FolderPath | None = None
    """Folder of torchvision's `cifar-10-batches-py`; none: the cache. Downloaded there when missing."""

    def build(self, *, workers: int = 0, report: Report | None = None) -> Split:
        """50,000 images to learn from and 10,000 held out."""
        return _build(torchvision.datasets.CIFAR10, self.name, self.path)


class CIFAR100(Settings):
    """CIFAR-100: a hundred classes."""

    name: Literal["cifar100"] = "cifar100"

    path: FolderPath | None = None
    """Folder of torchvision's `cifar-100-python`; none: the cache. Downloaded there when missing."""

    def build(self, *, workers: int = 0, report: Report | None = None) -> Split:
        """50,000 images to learn from and 10,000 held out."""
        return _build(torchvision.datasets.CIFAR100, self.name, self.path)


def _build(source: type[torchvision.datasets.CIFAR10], name: str, path: str | None) -> Split:
    root = Path(path) if path else cache_folder()
    try:
        return Split(_read(source, root, train=True), _read(source, root, train=False))
    except RuntimeError:  # torchvision: missing, or its checksum is wrong
        download(root, name, lambda: source(str(root), download=True))
    return Split(_read(source, root, train=True), _read(source, root, train=False))


def _read(source: type[torchvision.datasets.CIFAR10], root: Path, *, train: bool) -> InMemory:
    # The files are pickles (torchvision compares their checksums first) of an array type that numpy has since changed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        data = source(str(root), train=train)
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return array_split("train" if train else "test", pixels, torch.tensor(data.targets), data.classes)
