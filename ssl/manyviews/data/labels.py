"""Labels of images from CSV tables, and continuous labels from files, pixels and classes."""

import logging
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from pydantic import AfterValidator
from torch import Tensor

from manyviews.data.images import Images
from manyviews.data.sources.paths import nearest
from manyviews.data.tables import number_in, open_table, unknown_image
from manyviews.system.arrays import mapped_array
from manyviews.system.files import shown
from manyviews.system.path_bytes import NOT_UTF8, is_raw

logger = logging.getLogger(__name__)

SIDE = 7
"""Side of a thumbnail, in pixels."""
BATCH = 1024
FILES = (".npy", ".csv")
LARGEST = 1e18
MOST_COLUMNS = 10_000


def read_labels(path: Path, names: Collection[str]) -> Mapping[str, str]:
    """Reads labels by image name from the first two columns of a table.

    Raises:
        ValueError: there is no such file, it labels no image, or a line has an unknown or repeated name, an empty label
            or one column.
    """
    if path.is_dir():
        raise ValueError(f"data.labels={path} is a folder; name a CSV file")
    if not path.is_file():
        raise ValueError(f"data.labels={path} does not exist; {nearest(path)}")
    labels: dict[str, str] = {}
    not_utf8 = False
    with open_table(path, names) as (_, rows):
        for number, name, row in rows:
            line = f"{shown(path)}, line {number}"
            if len(row) < 2:
                raise ValueError(f"{line}: one column, where a name and a label should stand")
            text, label = row[0].strip(), unicodedata.normalize("NFC", row[1].strip())
            not_utf8 = not_utf8 or is_raw(text + label)
            if name is None:
                raise unknown_image(line, text, names)
            if not label:
                raise ValueError(f"{line}: {shown(name)} has an empty label; leave the line out if it has none")
            labels[name] = label
    if not_utf8:
        logger.warning("%s: %s; what is not is shown as \\xe9", shown(path), NOT_UTF8)
    if not labels:
        raise ValueError(f"{path} labels no image: below the header there must be lines of a name and a label")
    return labels


def _source(source: str) -> str:
    if source in ("pixels", "labels"):
        return source
    path = Path(source).expanduser().absolute()
    if path.suffix.lower() not in FILES:
        raise ValueError(
            f"values={source} is neither pixels nor labels nor the path of a .npy or .csv file; a .csv has a header, "
            "then a line for each image: its name and its numbers"
        )
    return str(path)


ValuesSource = Annotated[str, AfterValidator(_source)]
"""Source of continuous labels: pixels, labels or a path, which is made absolute."""


def values_of(images: Images, source: str, dtype: torch.dtype = torch.float32) -> Float[Tensor, "images numbers"]:
    """Continuous labels of images, used by Euclidean distance and not standardised.

    Args:
        images: all training images, or those that are evaluated.
        source: "pixels": thumbnails. "labels": thumbnails and one-hot classes, scaled so that images of two classes are
            farther from each other than most of one class. Or a file: .npy, [images, numbers] in the order of the
            images; or .csv, whose lines are the name of an image (for files the path below the folder) and its numbers,
            in any order; lines of other images are ignored.
        dtype: float64 keeps differences that are equal in a file equal.

    Raises:
        ValueError: the file cannot be read, has another form or lacks an image; an image has no class; a number is not
            finite, or all images have the same ones.
    """
    if source in ("pixels", "labels"):
        values = thumbnails(images)
        if source == "labels":
            values = torch.cat([values, _classes(images, values)], 1)
    else:
        values = torch.from_numpy(_centred(Path(source), images))
    if bool((values == values[:1]).all()):
        raise ValueError(
            f"values={source}: all {len(images):,} images have the same numbers, from which nothing can be learned"
        )
    return values.to(dtype)


def thumbnails(images: Images) -> Float32[Tensor, "images numbers"]:
    """Mean brightness in [0, 1] of 7 × 7 fields of each image, for each channel."""
    pieces = [
        F.adaptive_avg_pool2d(images.read(ids).float().div_(255), SIDE).flatten(1)
        for ids in torch.arange(len(images)).split(BATCH)
    ]
    return torch.cat(pieces)


def _centred(path: Path, images: Images) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Numbers of a file minus their mean: float32 keeps the differences of dates, say."""
    if path.is_dir():
        raise ValueError(f"values={path} is a folder; name a .npy or .csv file")
    if not path.is_file():
        raise ValueError(f"values={path} does not exist; {nearest(path)}")
    numbers = _from_npy(path, images) if path.suffix.lower() == ".npy" else _from_csv(path, images)
    broken = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    if len(broken):
        image = int(broken[0])
        raise ValueError(
            f"{path}: the numbers of {images.names[image]} (image {image}) are {numbers[image].tolist()}, which are "
            "not all finite; fill in what is missing"
        )
    numbers -= numbers.mean(0)
    extremes = np.abs(numbers).max(1)
    if extremes.max() > LARGEST:
        image = int(extremes.argmax())
        raise ValueError(
            f"{path}: the numbers of {images.names[image]} (image {image}) differ by {extremes[image]:g} from the "
            f"mean, and at most {LARGEST:g} can be squared in 32 bits; use a larger unit"
        )
    return numbers


def _classes(images: Images, thumbnail: Float[Tensor, "images numbers"]) -> Float32[Tensor, "images classes"]:
    """One-hot classes times the root mean squared distance of two thumbnails."""
    labels = images.labels
    if labels is None or bool((labels < 0).any()):
        first = 0 if labels is None else int((labels < 0).nonzero()[0])
        raise ValueError(
            f"values=labels needs the class of every image, and {images.names[first]} has none; put the images into "
            "one folder for each class, or use values=pixels"
        )
    squared = 2 * thumbnail.var(0, correction=0).sum()
    # Any length will do if all thumbnails are equal.
    length = squared.sqrt() if squared > 0 else torch.ones(())
    present, indices = labels.unique(return_inverse=True)
    return F.one_hot(indices, len(present)) * length


def _from_npy(path: Path, images: Images) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    mapped = mapped_array(path)
    numbers = mapped[:, None] if mapped.ndim == 1 else mapped
    if numbers.ndim != 2 or len(numbers) != len(images) or not numbers.shape[1]:
        raise ValueError(
            f"{path} holds {list(numbers.shape)} numbers, but there are {len(images):,} images; it must "
            f"have a row for each, [{len(images)}, numbers], or be a .csv with their names"
        )
    copied: np.ndarray[tuple[int, int], np.dtype[np.float64]] = numbers.astype(np.float64)
    return copied


def _from_csv(path: Path, images: Images) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    ids = {name: image for image, name in enumerate(images.names)}
    not_utf8, present = False, np.zeros(len(images), dtype=np.bool_)
    with open_table(path, ids) as (header, rows):
        if len(header) > MOST_COLUMNS:
            raise ValueError(f"{path} has {len(header):,} columns, and at most {MOST_COLUMNS:,} are read")
        numbers = np.zeros((len(images), len(header) - 1))
        for line, name, row in rows:
            if name is None:
                not_utf8 = not_utf8 or is_raw(row[0])
                continue
            numbers[ids[name]] = _numbers(path, line, row, header)
            present[ids[name]] = True
    missing = np.flatnonzero(~present)
    if len(missing):
        way_out = NOT_UTF8 if not_utf8 else "names must be spelled like that"
        raise ValueError(
            f"{path} has no line for {len(missing):,} of {len(images):,} images, the first of which is "
            f"{images.names[int(missing[0])]}; {way_out}"
        )
    return numbers


def _numbers(path: Path, line: int, row: list[str], header: list[str]) -> list[float]:
    if len(row) != len(header):
        raise ValueError(f"{path}, line {line}: {len(row)} columns, where the header has {len(header)}")
    where = f"{path}, line {line}"
    return [number_in(text, where, name) for name, text in zip(header[1:], row[1:], strict=True)]
