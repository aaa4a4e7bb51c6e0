"""Sets of images that are read by id, as uint8 squares, with names, labels and a fingerprint."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Report = Callable[[str, int, int], None]
"""Progress callback, called from the calling thread with the task, the number done and the total."""


Interpolation = Literal["bilinear", "bicubic"]


class Crops(NamedTuple):
    """Boxes to crop from each image of a batch."""

    boxes: Float[Tensor, "crops batch 4"]
    """Left, top, right and bottom, as shares of the width and height of the whole upright image."""
    side: int
    """Side in pixels of the squares that the crops are resized to."""
    exact: bool = True
    """Keep fractions of pixels; otherwise boxes may be rounded to whole ones, which takes less time."""


@runtime_checkable
class Cropper(Protocol):
    """Chooses the boxes that are cropped from images, as a function of id, epoch and aspect ratio alone."""

    @property
    def interpolation(self) -> Interpolation:
        """How crops are resized."""

    def crops(
        self, ids: Int64[Tensor, " batch"], epoch: int, aspects: Float[Tensor, " batch"] | None
    ) -> tuple[Crops, ...]:
        """The boxes for each size of crops; `aspects` are widths over heights, None for square images."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pixels of a batch: whole images, or crops of them.

    Examples:
        >>> whole = Pictures((torch.zeros(4, 3, 8, 8, dtype=torch.uint8),))
        >>> [len(part) for part in whole.tensor_split(3)]
        [2, 1, 1]
    """

    squares: tuple[UInt8[Tensor, "..."], ...]
    """Of whole images one tensor [batch, channels, side, side], each image squeezed into a square; of crops a tensor
    [crops, batch, channels, side, side] for each of the cropper's sizes."""
    aspects: Float[Tensor, " batch"] | None = None
    """Width over height of each whole image; None: all are square."""
    cropped: bool = False

    def __len__(self) -> int:
        return self.squares[0].shape[int(self.cropped)]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Pictures":
        """Copies the pixels to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Pictures":
        """Copies the pixels to pinned memory, from which they are copied to a GPU while it computes."""
        return self._map(Tensor.pin_memory)

    def tensor_split(self, parts: int) -> list["Pictures"]:
        """Splits the batch into parts whose lengths differ by at most one image."""
        squares = zip(*(tensor.tensor_split(parts, int(self.cropped)) for tensor in self.squares), strict=True)
        aspects = [None] * parts if self.aspects is None else self.aspects.tensor_split(parts)
        return [Pictures(own, aspect, self.cropped) for own, aspect in zip(squares, aspects, strict=True)]

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [*self.squares, *([] if self.aspects is None else [self.aspects])]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Pictures":
        aspects = None if self.aspects is None else change(self.aspects)
        return Pictures(tuple(map(change, self.squares)), aspects, self.cropped)


@runtime_checkable
class Readable(Protocol):
    """Anything that images can be read from by their ids."""

    def read(self, ids: Int64[Tensor, " batch"]) -> UInt8[Tensor, "batch channels size size"]:
        """The whole images of these ids, in their order, each squeezed into a square."""


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
    def aspects(self) -> Float[Tensor, " images"] | None:
        """Width over height of each image as it is upright, in float64; None: all are square."""

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
    left_out: Sequence[str] = ()
    """Names of the training images of classes that are left out."""


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
    aspects: Float[Tensor, " images"] | None = None

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
        """The whole images of these ids, in their order, each squeezed into a square."""
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
