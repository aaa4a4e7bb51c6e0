"""The bundled sample of Fashion-MNIST: 10,000 training and 2,000 held-out images."""

from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from PIL import Image

from manyviews.config import Settings
from manyviews.data.images import InMemory, Names, Report, Split, fingerprint
from manyviews.data.sources.fashion_mnist import CLASSES, SIZE


class Sample(Settings):
    """A balanced, lossless part of Fashion-MNIST that needs no download; made by `make.py` in this folder."""

    name: Literal["sample"] = "sample"

    def build(self, *, workers: int = 0, report: Report | None = None) -> Split:
        """Both splits; images are named by their index in Fashion-MNIST, such as `train/00008`."""
        return Split(_read("train"), _read("test"))


def _read(split: str) -> InMemory:
    folder = files("manyviews.data.sample")
    with folder.joinpath(f"{split}.csv").open(encoding="utf-8") as table:
        indices, labels = np.loadtxt(table, dtype=np.int64, delimiter=",", skiprows=1, unpack=True)
    with folder.joinpath(f"{split}.png").open("rb") as file, Image.open(file, formats=["PNG"]) as mosaic:
        rows, columns = mosaic.height // SIZE, mosaic.width // SIZE
        tiles = np.asarray(mosaic).reshape(rows, SIZE, columns, SIZE).transpose(0, 2, 1, 3)
    pixels = torch.from_numpy(np.ascontiguousarray(tiles)).view(-1, 1, SIZE, SIZE)
    names = Names(f"{split}/{index:05d}" for index in indices)
    return InMemory(pixels, names, torch.from_numpy(labels), CLASSES, fingerprint([pixels.numpy(), labels]))
