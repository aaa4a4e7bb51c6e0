"""Images of a torch dataset that a Python program passes, read once into memory."""

from collections.abc import Iterator
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from manyviews.data.decoding.decode import PILLOW_LIMIT, Decoding, aspect
from manyviews.data.images import InMemory, Report, Split, array_split, fingerprint
from manyviews.data.sources.source import Source

DATASET: Literal["dataset"] = "dataset"
WHITE = (255, 255, 255)


@runtime_checkable
class MapDataset(Protocol):
    """A map-style dataset, such as torch's `Dataset`: images, or pairs of an image and a class number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TorchDataset(Source):
    """A dataset of the running Python program; `of_dataset` makes these settings."""

    name: Literal["dataset"] = DATASET
    key: str = ""
    """Name under which the program has passed the dataset."""
    size: int | None = Field(None, ge=8, le=4096)
    """Side of the square that images are resized to; null: that of the images, if all are squares of one size."""

    def build(self, *, workers: int | None = 0, report: Report | None = None) -> Split:
        """Reads every image once.

        Raises:
            ValueError: if this program has not passed the dataset, or an item is not an image.
        """
        if self.key not in _PASSED:
            raise ValueError(
                f"the images are the dataset {self.key or 'of a Python program'}: pass it there again, for example "
                "manyviews.evaluate(run, data=dataset)"
            )
        train, test = _PASSED[self.key]
        first = _of_item(train[0])[0]
        channels = 1 if picture_of(first).mode in ("1", "L", "I;16") else 3
        size = self.size or min(picture_of(first).size)
        decoding = Decoding(channels, size, WHITE, PILLOW_LIMIT)
        parts = [
            None if part is None else _read(f"{self.key}/{name}", part, decoding, report, exact=self.size is None)
            for name, part in (("train", train), ("test", test))
        ]
        assert parts[0] is not None
        return Split(parts[0], parts[1])


_PASSED: dict[str, tuple[MapDataset, MapDataset | None]] = {}


def of_dataset(
    train: MapDataset,
    test: MapDataset | None = None,
    *,
    size: int | None = None,
    relations: str | PathLike[str] | None = None,
) -> TorchDataset:
    """Settings for the images of torch datasets, to be passed as `data`.

    An item is an image (PIL, uint8 array [height, width(, channels)] or uint8 tensor [channels, height, width]), or a
    pair of one and a class number. All images are read once into memory, as uint8; for more than fit, write them to a
    folder. A run that is resumed or evaluated by another program needs the dataset there, under the same class name.

    Args:
        train: the images to learn from.
        test: the held-out images, for evaluation.
        size: side of the square that images are squeezed into, with their aspect ratios kept beside them; by default
            all must be squares of one size.
        relations: a file of relations between the images, as `data.relations`. Their names are the dataset's class
            name, the split and the index: CIFAR10/train/00000.

    Raises:
        ValueError: if a dataset is empty.
    """
    for part in (train, test):
        if part is not None and not len(part):
            raise ValueError(f"the dataset {type(part).__name__} is empty")
    key, number = type(train).__name__, 1
    while key in _PASSED and _PASSED[key][0] is not train:
        number += 1
        key = f"{type(train).__name__}-{number}"
    _PASSED[key] = train, test
    return TorchDataset(key=key, size=size, relations=None if relations is None else fspath(relations))


def _of_item(item: Any) -> tuple[Any, int]:
    """The image and the class of an item; -1 without a class."""
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], -1 if item[1] is None else int(item[1])
    return item, -1


def picture_of(item: Any) -> Image.Image:
    """Converts a PIL image, uint8 array or uint8 tensor to a PIL image; raises ValueError for anything else."""
    if isinstance(item, Tensor):
        item = (item.permute(1, 2, 0) if item.ndim == 3 else item).cpu().numpy()
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] not in (1, 3)):
            raise ValueError(
                f"an image is uint8 [height, width] or with 1 or 3 channels, not {item.dtype} {list(item.shape)}; "
                "leave out transforms such as ToTensor: images are normalised here"
            )
        item = Image.fromarray(item.squeeze(2) if item.ndim == 3 and item.shape[2] == 1 else item)
    if not isinstance(item, Image.Image):
        raise ValueError(f"{type(item).__name__} is not an image: use PIL images, uint8 arrays or uint8 tensors")
    return item


def _read(name: str, dataset: MapDataset, decoding: Decoding, report: Report | None, *, exact: bool) -> InMemory:
    count = len(dataset)
    pixels = torch.empty(count, decoding.channels, decoding.size, decoding.size, dtype=torch.uint8)
    labels, aspects = torch.empty(count, dtype=torch.int64), torch.ones(count, dtype=torch.float64)
    for index in range(count):
        image, label = _of_item(dataset[index])
        picture = picture_of(image)
        if exact and picture.size != (decoding.size, decoding.size):
            raise ValueError(
                f"image {index} of {name} has {picture.size[0]} × {picture.size[1]} pixels, and not {decoding.size} × "
                f"{decoding.size}; resize all with manyviews.of_dataset(dataset, size={decoding.size})"
            )
        pixels[index], labels[index], aspects[index] = decoding.square(picture), label, aspect(picture)
        if report is not None:
            report("reading", index + 1, count)
    classes = tuple(_class_names(dataset, int(labels.max()) + 1)) if (labels >= 0).any() else ()
    split = array_split(name, pixels, labels, classes)
    if (aspects != 1).any():
        mark = fingerprint([split.fingerprint, aspects.numpy()])
        split = replace(split, aspects=aspects, fingerprint=mark)
    return split if classes else replace(split, labels=None)


def _class_names(dataset: MapDataset, count: int) -> Iterator[str]:
    names = getattr(dataset, "classes", ())
    for number in range(count):
        yield str(names[number]) if number < len(names) else str(number)
