"""What a set of images is to the rest of the package: uint8 squares, read by id, with a name for each."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

Report = Callable[[str, int, int], None]
"""Called now and then, from the calling thread, with what is being done, how many are done, and how many there are."""


@runtime_checkable
class Readable(Protocol):
    """What images are read from by their ids."""

    def read(self, ids: Int64[Tensor, " batch"]) -> UInt8[Tensor, "batch channels size size"]:
        """The images of these ids, in their order."""


@runtime_checkable
class Images(Readable, Protocol):
    """A split of a data set; the id of an image is its position, from 0 to `len - 1`.

    Ids are the rows of a memory bank, so they must mean the same image in every run: two splits with equal
    fingerprints have the same images under the same ids. A part of a split is a tensor of ids.
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
        """Sixty-four hexadecimal digits that change when an image is added, removed, renamed, replaced, relabelled."""

    def __len__(self) -> int: ...


class Split(NamedTuple):
    """The images to learn from, the held-out ones, and the files that were left out: pairs of name and reason."""

    train: Images
    test: Images | None
    unreadable: tuple[tuple[str, str], ...] = ()
    layout: str = ""
    """One line: which folders were read, as what, the classes, and what was passed over; empty for other data."""
    inventory: "Inventory | None" = None
    """The files of the folder that is learned from."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images held in one tensor; reading is an index into it."""

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
    """A list of names in two tensors: a million of them reach another process as shared memory, not as objects."""

    def __init__(self, names: Iterable[str]) -> None:
        # surrogateescape: a file name need not be valid UTF-8.
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text = torch.from_numpy(np.array(bytearray(b"".join(encoded)), dtype=np.uint8))
        self._ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)

    def arrays(self) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.int64]]]:
        """The bytes of all names, and where each begins, with the end of the last."""
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
        position = range(len(self))[index]
        start, end = self._ends[position : position + 2].tolist()
        return self._text[start:end].numpy().tobytes().decode("utf-8", "surrogateescape")


class Inventory(NamedTuple):
    """The files of a folder by their names, and what tells whether they are still the same."""

    readable: tuple[tuple[Names, np.ndarray[Any, np.dtype[np.uint8]]], ...]
    """Of each part of the folder the names of its images, and the digests of their content [images, 16]."""
    unreadable: tuple[str, ...]
    """The names of the files that were left out."""

    def marks(self) -> dict[str, str]:
        """The digest of each file in hexadecimal, by its name; empty where it could not be read."""
        found = dict.fromkeys(self.unreadable, "")
        for names, digests in self.readable:
            found |= {name: row.tobytes().hex() for name, row in zip(names, digests, strict=True)}
        return found


def array_split(
    name: str,
    pixels: UInt8[Tensor, "images channels size size"],
    labels: Int64[Tensor, " images"],
    classes: Sequence[str],
) -> InMemory:
    """A labelled split of a data set that comes as arrays; its images are called `name/00000` and so on."""
    names = Names(f"{name}/{index:05d}" for index in range(len(pixels)))
    mark = fingerprint([pixels.numpy(), labels.numpy(), *classes])
    return InMemory(pixels, names, labels, tuple(classes), mark)


def fingerprint(parts: Iterable[object]) -> str:
    """A SHA-256 in hexadecimal over arrays (their bytes and shape), names likewise, and anything else (its `repr`)."""
    digest = hashlib.sha256()
    for part in parts:
        arrays = part.arrays() if isinstance(part, Names) else (part,) if isinstance(part, np.ndarray) else ()
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        if not arrays:
            digest.update(repr(part).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
