"""Which images lie in a folder, in an order that no file system decides, and which classes its sub-folders tell."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from manyviews.data.sources.paths import same_spelling


class Listing(NamedTuple):
    """The image files of one split: names below the data folder, and the class of each, -1 where it has none."""

    root: Path
    names: list[str]
    labels: list[int] | None
    classes: tuple[str, ...]
    below: str = ""
    """The folder of the split below the root, such as `train/`; names begin with it."""

    def folders(self) -> list[str]:
        """For each image the first sub-folder of the split that it lies in; "" where it lies in none."""
        return [
            folder if slash else ""
            for folder, slash, _ in (name[len(self.below) :].partition("/") for name in self.names)
        ]


def listing_of(root: Path, names: Sequence[str], below: str = "") -> Listing:
    """The images of one split, without labels, in natural order: 2.jpg before 10.jpg."""
    return Listing(root, sorted(names, key=_natural), None, (), below)


def by_folder(listing: Listing, *, asked: bool) -> Listing:
    """The listing with a class for each first sub-folder that holds images, numbered in alphabetical order.

    Images beside these folders have no class, -1. There are no labels at all where there are fewer than two folders,
    or where most images lie beside them: the folders are then taken for part of a collection.

    Args:
        listing: any.
        asked: the person has said that the folders are classes.

    Raises:
        ValueError: that was said, and there are fewer than two.
    """
    counts = Counter(listing.folders())
    beside = counts.pop("", 0)
    if asked and len(counts) < 2:
        raise ValueError(
            f"data.labels=folders takes at least two sub-folders with images, and {listing.root / listing.below} has "
            f"{len(counts)}; leave it out, or name a table of labels: data.labels=labels.csv"
        )
    if len(counts) < 2 or (beside >= counts.total() and not asked):
        return listing
    return with_classes(listing, tuple(sorted(counts)))


def with_classes(listing: Listing, classes: Sequence[str]) -> Listing:
    """The listing with these classes, which are first sub-folders; images elsewhere have none, -1."""
    number, spelled = {name: index for index, name in enumerate(classes)}, same_spelling(classes)
    of_folder = {folder: number.get(spelled(folder) or "", -1) for folder in set(listing.folders())}
    return listing._replace(labels=[of_folder[folder] for folder in listing.folders()], classes=tuple(classes))


def hold_out(listing: Listing, share: float, seed: int) -> tuple[Listing, Listing]:
    """Part a labelled listing in two: the second gets this share of each class, at least one image of two or more.

    An image is chosen by a hash of its name, so that the choice outlives other images that come and go. Images without
    a label, -1, stay in the first part.
    """
    assert listing.labels is not None
    members: dict[int, list[int]] = {}
    for index, label in enumerate(listing.labels):
        if label >= 0:
            members.setdefault(label, []).append(index)
    held: set[int] = set()
    for indices in members.values():
        count = min(max(round(share * len(indices)), 1), len(indices) - 1)
        held.update(sorted(indices, key=lambda index: _draw(listing.names[index], seed))[:count])
    kept = [index for index in range(len(listing.names)) if index not in held]
    return _part(listing, kept), _part(listing, sorted(held))


def _part(listing: Listing, indices: list[int]) -> Listing:
    assert listing.labels is not None
    names, labels = [listing.names[i] for i in indices], [listing.labels[i] for i in indices]
    return listing._replace(names=names, labels=labels)


def _draw(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogateescape")).digest()


def _natural(name: str) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name
