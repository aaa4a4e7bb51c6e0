"""Inventory of the files of a run, their changes since its start, and copied images."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from manyviews.data.decoding.files import DIGEST
from manyviews.data.images import Images, Inventory, Split
from manyviews.system.files import open_lines, shown
from manyviews.system.names import some
from manyviews.system.plural import plural
from manyviews.system.writing import write_atomic

COMPARED = 64
"""Images whose pixels are compared, spread evenly over all."""
SAME = 2.0
"""Mean difference of pixels, of 255, up to which two images count as equal."""
COPIES = 0.1
"""Share of copies among the images from which there is a warning."""


class Changes(NamedTuple):
    """Names of files that were changed since the start of a run."""

    added: list[str]
    removed: list[str]
    replaced: list[str]
    """Files with other content, or unreadable now."""

    def __str__(self) -> str:
        kinds = zip(self._fields, self, strict=True)
        return ", ".join(f"{len(names):,} {kind} ({some(names)})" for kind, names in kinds if names)


def write_inventory(file: Path, inventory: Inventory) -> None:
    """Writes a line of JSON for each file: its name and its mark; raises OSError."""
    write_atomic(file, (f"{json.dumps(entry)}\n".encode() for entry in inventory.marks().items()))


def read_inventory(file: Path) -> dict[str, str]:
    """Reads marks by file name; raises ValueError for a damaged line, or OSError."""
    marks: dict[str, str] = {}
    with open_lines(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                name, mark = json.loads(line)
                if len(bytes.fromhex(mark)) not in (0, DIGEST):
                    raise ValueError
                marks[str(name)] = mark
            except (ValueError, TypeError, RecursionError):
                raise ValueError(f"{shown(file)}, line {number:,}: it holds no name and mark of a file") from None
    return marks


def changes(before: Mapping[str, str], now: Inventory) -> Changes:
    """Compares the readable files at the start of a run, by their marks, with those of now."""
    marks = now.marks()
    known = {name: mark for name, mark in before.items() if mark}
    return Changes(
        [name for name, mark in marks.items() if mark and name not in known],
        [name for name in known if name not in marks],
        [name for name, mark in known.items() if marks.get(name, mark) != mark],
    )


def copy_warnings(split: Split) -> Iterator[str]:
    """Yields warnings if training images are copies or all look the same; called by one rank."""
    if split.inventory is not None and split.inventory.readable:
        digests = split.inventory.readable[0][1]
        copies = len(digests) - len({row.tobytes() for row in digests})
        if copies >= COPIES * len(digests) and copies:
            yield (
                f"{copies:,} of {plural(len(digests), 'training image')} are copies of others, byte for byte: as "
                "negatives of each other they cannot be distinguished; remove them, unless they are intended"
            )
    if all_the_same(split.train):
        yield (
            "the images all look the same, so that nothing can be learned from them and the loss will stay at log N; "
            "look at them, and at data.size and data.background, by which they are decoded"
        )


def all_the_same(images: Images) -> bool:
    """Whether the pixels of 64 images, spread over all, are nearly equal."""
    if len(images) < 2:
        return False
    ids = torch.linspace(0, len(images) - 1, min(COMPARED, len(images))).long()
    try:
        pixels = images.read(ids).float()
    except (OSError, ValueError):  # of files that broke since: reported with the first batch
        return False
    return bool((pixels - pixels[:1]).abs().flatten(1).mean(1).max() <= SAME)
