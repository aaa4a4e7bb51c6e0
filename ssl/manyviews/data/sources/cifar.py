"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 60,000 colour images of 32 x 32 pixels."""

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision

from manyviews.data.images import InMemory, Report, Split, array_split
from manyviews.data.sources.paths import FolderPath, cache_folder, download
from manyviews.data.sources.source import Source
from manyviews.system.files import RefusedFileError, read_bytes

LARGEST = 1 << 28
"""Bytes of a file."""
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""Names in pickles of arrays, numbers and texts."""


class CIFAR10(Source):
    """CIFAR-10: ten classes."""

    name: Literal["cifar10"] = "cifar10"

    path: FolderPath | None = None
    """Folder of torchvision's `cifar-10-batches-py`; none: the cache. Downloaded there when missing."""

    def build(self, *, workers: int | None = 0, report: Report | None = None) -> Split:
        """50,000 images to learn from and 10,000 held out."""
        return _build(torchvision.datasets.CIFAR10, self.name, self.path)


class CIFAR100(Source):
    """CIFAR-100: a hundred classes."""

    name: Literal["cifar100"] = "cifar100"

    path: FolderPath | None = None
    """Folder of torchvision's `cifar-100-python`; none: the cache. Downloaded there when missing."""

    def build(self, *, workers: int | None = 0, report: Report | None = None) -> Split:
        """50,000 images to learn from and 10,000 held out."""
        return _build(torchvision.datasets.CIFAR100, self.name, self.path)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, numbers and texts only: any other name in a pickle could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Returns an allowed class or function."""
        if (module_name, global_name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no array is made by")
        return super().find_class(module_name, global_name)


def _build(source: type[torchvision.datasets.CIFAR10], name: str, path: str | None) -> Split:
    root = Path(path) if path else cache_folder()
    folder = root / source.base_folder
    checksums = dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])
    try:
        contents = _contents(folder, checksums)
    except (OSError, RefusedFileError):
        download(root, name, lambda: source(str(root), download=True))
        contents = _contents(folder, checksums)
    classes = contents[source.meta["filename"]][source.meta["key"]]
    train, test = ([contents[file] for file, _ in files] for files in (source.train_list, source.test_list))
    return Split(_split("train", train, classes), _split("test", test, classes))


def _contents(folder: Path, checksums: Mapping[str, str]) -> dict[str, Any]:
    """Reads the published files; raises OSError if one is missing or has another checksum."""
    contents = {}
    for name, checksum in checksums.items():
        content = read_bytes(folder / name, LARGEST)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != checksum:
            raise OSError(f"{folder / name} is not the file that was published: its checksum is another")
        # The arrays have a type that NumPy has since changed.
        with warnings.catch_warnings(action="ignore", category=np.exceptions.VisibleDeprecationWarning):
            try:
                contents[name] = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
            except Exception as problem:  # a wrong pickle raises nearly anything
                raise ValueError(f"{folder / name} is no file of CIFAR: {problem}") from problem
    return contents


def _split(name: str, batches: list[dict[str, Any]], classes: list[str]) -> InMemory:
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = [label for batch in batches for label in (batch["labels"] if "labels" in batch else batch["fine_labels"])]
    return array_split(name, torch.from_numpy(pixels), torch.tensor(labels), classes)
