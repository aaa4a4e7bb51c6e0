"""Fashion-MNIST (Xiao et al. 2017), 70,000 grey images of 28 x 28 pixels, and a sample."""

import gzip
import math
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from PIL import Image

from manyviews.data.images import InMemory, Names, Report, Split, array_split, fingerprint
from manyviews.data.sources.paths import FolderPath, cache_folder, download
from manyviews.data.sources.source import Source
from manyviews.system.files import open_regular

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SIZE = 28
DEBIAN = "/usr/share/datasets/fashion-mnist"
STEMS, KINDS = {"train": "train", "test": "t10k"}, ("images-idx3", "labels-idx1")
LARGEST = 1 << 26
"""Bytes that are decompressed, a little more than 60,000 images."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class FashionMNIST(Source):
    """All of Fashion-MNIST."""

    name: Literal["fashion_mnist"] = "fashion_mnist"

    path: FolderPath | None = None
    """Folder of its files, or of torchvision's `FashionMNIST/raw`; none: Debian's package, else a download."""

    def build(self, *, workers: int | None = 0, report: Report | None = None) -> Split:
        """60,000 images to learn from and 10,000 held out."""
        root = Path(self.path) if self.path else cache_folder()
        folder = _folder([root] if self.path else [Path(DEBIAN), root])
        if folder is None:
            download(root, self.name, lambda: torchvision.datasets.FashionMNIST(root, download=True))
            folder = root / "FashionMNIST" / "raw"
        splits = []
        for split in STEMS:
            images, labels = read_split(folder, split)
            pixels = torch.from_numpy(images).unsqueeze(1)
            splits.append(array_split(split, pixels, torch.from_numpy(labels.astype(np.int64)), CLASSES))
        return Split(splits[0], splits[1])


class Sample(Source):
    """A balanced, lossless part of Fashion-MNIST, bundled; `data/sample/make.py` made it.

    Examples:
        >>> len(Sample().build().train)
        10000
    """

    name: Literal["sample"] = "sample"

    def build(self, *, workers: int | None = 0, report: Report | None = None) -> Split:
        """Both splits; images are named by their index in Fashion-MNIST, such as `train/00008`."""
        return Split(_read_sample("train"), _read_sample("test"))


def read_split(folder: Path, split: str) -> tuple[Bytes, Bytes]:
    """Images [N, 28, 28] and labels [N] of `train` or `test`, from idx files, gzipped or not."""
    images, labels = (_read_idx(_file(folder, f"{STEMS[split]}-{what}-ubyte")) for what in KINDS)
    if images.shape != (len(labels), SIZE, SIZE) or labels.max(initial=0) >= len(CLASSES):
        raise ValueError(f"{folder} is not Fashion-MNIST: {images.shape} images, labels up to {labels.max(initial=0)}")
    return images, labels


def _folder(candidates: list[Path]) -> Path | None:
    folders = [folder for candidate in candidates for folder in (candidate / "FashionMNIST" / "raw", candidate)]
    stems = [f"{stem}-{what}-ubyte" for stem in STEMS.values() for what in KINDS]
    return next((folder for folder in folders if all(_file(folder, stem).is_file() for stem in stems)), None)


def _file(folder: Path, stem: str) -> Path:
    plain = folder / stem
    return plain if plain.is_file() else folder / f"{stem}.gz"


def _read_idx(path: Path) -> Bytes:
    try:
        with open_regular(path) as content, gzip.GzipFile(fileobj=content) if path.suffix == ".gz" else content as file:
            data = file.read(LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    # idx: two zero bytes, the type (8 for uint8), the number of axes, then each axis's length, big-endian.
    start = 4 + 4 * data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist()) if 4 < start <= len(data) else ()
    if not shape or len(data) != start + math.prod(shape):
        raise ValueError(f"{path} is not an idx file of bytes, or is cut short")
    return np.frombuffer(bytearray(data), np.uint8, offset=start).reshape(shape)


def _read_sample(split: str) -> InMemory:
    folder = files("manyviews.data.sample")
    with folder.joinpath(f"{split}.csv").open(encoding="utf-8") as table:
        indices, labels = np.loadtxt(table, dtype=np.int64, delimiter=",", skiprows=1, unpack=True)
    with folder.joinpath(f"{split}.png").open("rb") as file, Image.open(file, formats=["PNG"]) as mosaic:
        rows, columns = mosaic.height // SIZE, mosaic.width // SIZE
        tiles = np.asarray(mosaic).reshape(rows, SIZE, columns, SIZE).transpose(0, 2, 1, 3)
    pixels = torch.from_numpy(np.ascontiguousarray(tiles)).view(-1, 1, SIZE, SIZE)
    names = Names(f"{split}/{index:05d}" for index in indices)
    return InMemory(pixels, names, torch.from_numpy(labels), CLASSES, fingerprint([pixels.numpy(), labels]))
