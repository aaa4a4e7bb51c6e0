"""Bytes of paths that are no UTF-8, as records in UTF-8 can hold them."""

from typing import TypeVar

T = TypeVar("T")

RAW_BYTES = {0xDC00 + byte: 0x10FC00 + byte for byte in range(0x80, 0x100)}
"""For each such byte, which Python holds as a lone surrogate (PEP 383), a letter of the private plane 16."""
_READ = {written: surrogate for surrogate, written in RAW_BYTES.items()}


def storable(tree: T) -> T:
    """A tree of plain values with no text in it that YAML or JSON would refuse; `restored` gives it back."""
    return _with_letters(tree, RAW_BYTES)


def restored(tree: T) -> T:
    """What `storable` was given."""
    return _with_letters(tree, _READ)


def _with_letters(tree: T, letters: dict[int, int]) -> T:
    if isinstance(tree, dict):
        return type(tree)((_with_letters(key, letters), _with_letters(value, letters)) for key, value in tree.items())
    if isinstance(tree, list):
        return type(tree)(_with_letters(value, letters) for value in tree)
    return type(tree)(tree.translate(letters)) if isinstance(tree, str) else tree
