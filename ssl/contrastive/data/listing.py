"""Which images lie in a folder, in an order that no file system decides, and which classes its sub-folders tell."""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from contrastive.data.decode import looks_like_an_image
from contrastive.data.paths import existing_folder
from contrastive.untrusted.files import shown

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Listing(NamedTuple):
    """The image files of one split: names below the data folder, and the class of each, -1 where it has none."""

    root: Path
    names: list[str]
    labels: list[int] | None
    classes: tuple[str, ...]


def list_images(root: Path, below: str = "", *, follow_links: bool) -> Listing:
    """All images in the folder `below` of `root` and in its sub-folders, in natural order (2.jpg before 10.jpg).

    Files that are no images by their ending, and everything whose name starts with a dot or `__`, is passed over.
    Where every image lies in a first-level sub-folder, and there are at least two of those with images, they are the
    classes, numbered in alphabetical order.

    Raises:
        ValueError: the folder is missing or may not be read, or holds no image.
    """
    start = existing_folder(str(root / below))
    names, links = _walk(start, follow_links)
    if not names:
        hint = f"; {links} symbolic links were passed over (data.follow_links=true follows them)" if links else ""
        raise ValueError(f"{start} holds no images (no .jpg, .png, .webp, .tif or the like, at any depth){hint}")
    if links:
        logger.warning("%s: %d symbolic links were passed over; data.follow_links=true follows them", start, links)
    names.sort(key=_natural)
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = tuple(sorted(set(folders)))
    prefix = f"{below}/" if below else ""
    full = [prefix + name for name in names]
    if len(classes) < 2 or "" in classes:
        return Listing(root, full, None, ())
    number = {name: index for index, name in enumerate(classes)}
    return Listing(root, full, [number[folder] for folder in folders], classes)


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


def _walk(start: Path, follow_links: bool) -> tuple[list[str], int]:
    names: list[str] = []
    links = 0
    folders = [""]
    visited: set[tuple[int, int]] = set()
    while folders:
        below = folders.pop()
        folder = start / below
        status = _or_words(folder.stat, folder)
        if (status.st_dev, status.st_ino) in visited:
            continue  # a loop of links, or a second way to the same folder
        visited.add((status.st_dev, status.st_ino))
        for entry in sorted(_or_words(partial(os.scandir, folder), folder), key=lambda entry: entry.name):
            name = below + entry.name
            if entry.name.startswith((".", "__")):
                continue
            if entry.is_symlink() and not follow_links:
                links += 1
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # links in a circle
                links += 1
                continue
            if is_folder:
                folders.append(f"{name}/")
            elif is_file and looks_like_an_image(start / name):
                names.append(name)
    return names, links


def _or_words(look: Callable[[], T], folder: Path) -> T:
    try:
        return look()
    except PermissionError as error:
        raise ValueError(f"{shown(folder)} may not be read: permission denied") from error
    except OSError as error:
        raise ValueError(f"{shown(folder)} cannot be listed: {(error.strerror or str(error)).lower()}") from error
