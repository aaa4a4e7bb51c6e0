"""Paths that are not UTF-8, in JSON and YAML and for libraries that need UTF-8."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

RAW_BYTES = {0xDC00 + byte: 0x10FC00 + byte for byte in range(0x80, 0x100)}
"""For each surrogate of a raw byte (PEP 383), a letter of the private plane 16."""
_READ = {written: surrogate for surrogate, written in RAW_BYTES.items()}
NOT_UTF8 = "the table is not in UTF-8 (Latin-1, perhaps): save it as “CSV UTF-8”"


def is_raw(text: str) -> bool:
    """Whether a text has surrogates of raw bytes."""
    return any("\udc80" <= letter <= "\udcff" for letter in text)


def storable(tree: T) -> T:
    """Replaces raw bytes in plain values, for YAML and JSON; `restored` is the inverse."""
    return _with_letters(tree, RAW_BYTES)


def restored(tree: T) -> T:
    """The inverse of `storable`."""
    return _with_letters(tree, _READ)


@contextmanager
def utf8_path(file: Path) -> Iterator[Path]:
    """A UTF-8 path of a file or folder, perhaps of its descriptor; raises OSError."""
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
