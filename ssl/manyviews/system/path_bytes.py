"""Bytes of paths that are no UTF-8, as records in UTF-8 can hold them, and such paths, as any library takes them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

RAW_BYTES = {0xDC00 + byte: 0x10FC00 + byte for byte in range(0x80, 0x100)}
"""For each such byte, which Python holds as a lone surrogate (PEP 383), a letter of the private plane 16."""
_READ = {written: surrogate for surrogate, written in RAW_BYTES.items()}
NOT_UTF8 = "the table is not in UTF-8 (Latin-1, perhaps): save it as “CSV UTF-8”"


def is_raw(text: str) -> bool:
    """Whether a text holds such bytes."""
    return any("\udc80" <= letter <= "\udcff" for letter in text)


def storable(tree: T) -> T:
    """A tree of plain values with no text in it that YAML or JSON would refuse; `restored` gives it back."""
    return _with_letters(tree, RAW_BYTES)


def restored(tree: T) -> T:
    """What `storable` was given."""
    return _with_letters(tree, _READ)


@contextmanager
def utf8_path(file: Path) -> Iterator[Path]:
    """A path to a file or folder, for libraries that take none but UTF-8: its own or, while open, a descriptor's.

    Raises:
        OSError: if it may not be read.
    """
    try:
        os.fspath(file).encode()
    except UnicodeEncodeError:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        yield file


def _with_letters(tree: T, letters: dict[int, int]) -> T:
    if isinstance(tree, dict):
        return type(tree)((_with_letters(key, letters), _with_letters(value, letters)) for key, value in tree.items())
    if isinstance(tree, list):
        return type(tree)(_with_letters(value, letters) for value in tree)
    return type(tree)(tree.translate(letters)) if isinstance(tree, str) else tree
