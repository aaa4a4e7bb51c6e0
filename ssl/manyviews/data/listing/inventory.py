"""Which files a run began with, kept in its folder, so that what has changed since can be named."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from manyviews.data.images import Inventory
from manyviews.data.listing.digests import DIGEST
from manyviews.system.files import open_lines, shown
from manyviews.system.writing import write_atomic

MOST_NAMED = 3


class Changes(NamedTuple):
    """What has become of the files of a run, by their names."""

    added: list[str]
    removed: list[str]
    replaced: list[str]
    """Those with other content, and those that cannot be read any more."""

    def __str__(self) -> str:
        kinds = zip(self._fields, self, strict=True)
        return ", ".join(f"{len(names):,} {kind} ({_some(names)})" for kind, names in kinds if names)


def write_inventory(file: Path, inventory: Inventory) -> None:
    """Writes a line of JSON for each file: its name and its mark; raises OSError where that cannot be."""

    def lines() -> Iterator[bytes]:
        for entry in inventory.marks().items():
            yield (json.dumps(entry) + "\n").encode()

    write_atomic(file, lines())


def read_inventory(file: Path) -> dict[str, str]:
    """The marks of an inventory by the names of the files.

    Raises:
        ValueError: if it is damaged, naming the line.
        OSError: if it cannot be read.
    """
    found: dict[str, str] = {}
    with open_lines(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                name, mark = json.loads(line)
                if len(bytes.fromhex(mark)) not in (0, DIGEST):
                    raise ValueError
                found[str(name)] = mark
            except (ValueError, TypeError, RecursionError):
                raise ValueError(f"{shown(file)}, line {number:,}: it holds no name and mark of a file") from None
    return found


def changes(before: Mapping[str, str], now: Inventory) -> Changes:
    """What has become of the files of a run that were readable when it began, and which others are there.

    Args:
        before: the marks that they had.
        now: the files that are there.
    """
    there = now.marks()
    known = {name: mark for name, mark in before.items() if mark}
    return Changes(
        [name for name, mark in there.items() if mark and name not in known],
        [name for name in known if name not in there],
        [name for name, mark in known.items() if there.get(name, mark) != mark],
    )


def _some(names: list[str]) -> str:
    rest = len(names) - MOST_NAMED
    return ", ".join(map(shown, names[:MOST_NAMED])) + (f" and {rest:,} more" if rest > 0 else "")
