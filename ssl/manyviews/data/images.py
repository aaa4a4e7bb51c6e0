"""Sets of images: uint8 squares that are read by id, with names, labels and a fingerprint."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

Report = Callable[[str, int, int], None]
"""Progress callback, called from the calling thread with the task, the number done and the total."""


@runtime_checkable
class Readable(Protocol):
    """Anything that images can be read from by their ids."""

    def read(self, ids: Int64[Tensor, " batch"]) -> UInt8[Tensor, "batch channels size size"]:
        """The images of these ids, in their order."""


@runtime_checkable
class Images(Readable, Protocol):
    """A split of a data set; the id of an image is its position, from 0 to `len - 1`.

    Ids are the rows of a memory bank: splits with equal fingerprints have the same images under the same ids.
    """

    @property
    def names(self) -> Sequence[str]:
        """A name for each image: for files, the path below the folder, with `/` between its parts."""

    @property
    def labels(self) -> Int64[Tensor, " images"] | None:
        """The class of each image, -1 where an image has none; None when the whole split has none."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class; empty without labels."""

    @property
    def channels(self) -> int:
        """Channels per pixel, 1 or 3."""

    @property
    def size(self) -> int:
        """Side of the square, in pixels."""

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with any image, its name, id or label."""

    def __len__(self) -> int: ...


class Split(NamedTuple):
    """Training images, held-out images, and the names and reasons of files that were left out."""

    train: Images
    test: Images | None
    unreadable: tuple[tuple[str, str], ...] = ()
    layout: str = ""
    """One line on the folders that were read, the classes, and what was passed over; empty for other data."""
    inventory: "Inventory | None" = None
    """The files of the training folder."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images held in one tensor; reading is an index into it.

    Examples:
        >>> images = InMemory(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ["a", "b"], None, (), "0" * 64)
        >>> images.read(torch.tensor([1])).shape
        torch.Size([1, 1, 8, 8])
    """

    pixels: UInt8[Tensor, "images channels size size"]
    names: Sequence[str]
    labels: Int64[Tensor, " images"] | None
    classes: tuple[str, ...]
    fingerprint: str

    @property
    def channels(self) -> int:
        """Channels per pixel."""
        return self.pixels.shape[1]

    @property
    def size(self) -> int:
        """Side of the square, in pixels."""
        return self.pixels.shape[-1]

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, ids: Int64[Tensor, " batch"]) -> UInt8[Tensor, "batch channels size size"]:
        """The images of these ids, in their order."""
        return self.pixels.index_select(0, ids)


class Names(Sequence[str]):
    """A list of names in two tensors, which worker processes share.

    Examples:
        >>> Names(["a.png", "b.png"])[1]
        'b.png'
    """

    def __init__(self, names: Iterable[str]) -> None:
        # surrogateescape: a file name need not be valid UTF-8.
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text = torch.from_numpy(np.array(bytearray(b"".join(encoded)), dtype=np.uint8))
        self._ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)

    def arrays(self) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.int64]]]:
        """The bytes of all names, and the offset of each, with the end of the last."""
        return self._text.numpy(), self._ends.numpy()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        start, end = self._ends[row : row + 2].tolist()
        return self._text[start:end].numpy().tobytes().decode("utf-8", "surrogateescape")


class Inventory(NamedTuple):
    """Names and digests of the files of a folder."""

    readable: tuple[tuple[Names, np.ndarray[Any, np.dtype[np.uint8]]], ...]
    """Names and digests [images, 16] of the images, for each split in the folder."""
    unreadable: tuple[str, ...]
    """Names of the files that were left out."""

    def marks(self) -> dict[str, str]:
        """The digest of each file in hexadecimal, by its name; empty for unreadable files."""
        marks = dict.fromkeys(self.unreadable, "")
        for names, digests in self.readable:
            marks |= {name: row.tobytes().hex() for name, row in zip(names, digests, strict=True)}
        return marks


def array_split(
    name: str,
    pixels: UInt8[Tensor, "images channels size size"],
    labels: Int64[Tensor, " images"],
    classes: Sequence[str],
) -> InMemory:
    """A labelled split of arrays; its images are named `name/00000` and so on."""
    names = Names(f"{name}/{index:05d}" for index in range(len(pixels)))
    mark = fingerprint([pixels.numpy(), labels.numpy(), *classes])
    return InMemory(pixels, names, labels, tuple(classes), mark)


def fingerprint(parts: Iterable[object]) -> str:
    """SHA-256 in hexadecimal over arrays and `Names`, and the `repr` of anything else."""
    digest = hashlib.sha256()
    for part in parts:
        arrays = part.arrays() if isinstance(part, Names) else (part,) if isinstance(part, np.ndarray) else ()
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        if not arrays:
            digest.update(repr(part).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
