"""The images of a split in natural order, and the folders that are splits and classes."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from manyviews.data.listing.walk import PassedOver
from manyviews.system.files import shown
from manyviews.system.plural import plural

TRAIN = ("train", "training")
HELD_OUT = (("test", "testing"), ("val", "valid", "validation"), ("dev",), ("eval", "evaluation"))
"""Names of folders of held-out images, in any case; the first one with labels is used."""
MOST_NAMED = 3
NO_SPLITS = "data.splits=false reads folders of any name alike"


class Listing(NamedTuple):
    """The image files of one split: names below the data folder, and their classes, -1 for none."""

    root: Path
    names: list[str]
    labels: list[int] | None
    classes: tuple[str, ...]
    below: str = ""
    """Prefix of the names: the folder of the split, such as `train/`."""

    def folders(self) -> list[str]:
        """The first sub-folder of each image below the split; "" for none."""
        return [
            folder if slash else ""
            for folder, slash, _ in (name[len(self.below) :].partition("/") for name in self.names)
        ]


def listing_of(root: Path, names: Sequence[str], below: str = "") -> Listing:
    """The images of one split, without labels, in natural order: 2.jpg before 10.jpg.

    Examples:
        >>> listing_of(Path(), ["10.jpg", "2.jpg"]).names
        ['2.jpg', '10.jpg']
    """
    return Listing(root, sorted(names, key=_natural), None, (), below)


def by_folder(listing: Listing, *, asked: bool) -> Listing:
    """The listing with each first sub-folder with images as a class; -1 for images in none.

    It stays without labels if there are fewer than two folders, or if most images are in none, unless `asked`
    (`data.labels=folders`); raises ValueError if `asked` and there are fewer than two.
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
    return labelled(listing, listing.folders(), sorted(counts))


def labelled(listing: Listing, labels: Iterable[str | None], classes: Sequence[str]) -> Listing:
    """The listing with these classes and labels; -1 for a label that is not a class."""
    number: dict[str | None, int] = {name: index for index, name in enumerate(classes)}
    return listing._replace(labels=[number.get(label, -1) for label in labels], classes=tuple(classes))


def hold_out(listing: Listing, share: float, seed: int) -> tuple[Listing, Listing]:
    """Splits a labelled listing: the second part gets a share, at least one, of each class.

    Images are chosen by a hash of their name, which does not depend on other images. Images without a label stay in the
    first part.
    """
    assert listing.labels is not None
    names, labels = listing.names, listing.labels
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        if label >= 0:
            members.setdefault(label, []).append(index)

    def draw(index: int) -> bytes:
        return hashlib.sha256(f"{seed}\n{names[index]}".encode("utf-8", "surrogateescape")).digest()

    def part(indices: Iterable[int]) -> Listing:
        return listing._replace(names=[names[i] for i in indices], labels=[labels[i] for i in indices])

    held: set[int] = set()
    for indices in members.values():
        count = min(max(round(share * len(indices)), 1), len(indices) - 1)
        held.update(sorted(indices, key=draw)[:count])
    return part([index for index in range(len(names)) if index not in held]), part(sorted(held))


def splits_of(
    root: Path, names: Sequence[str], passed: PassedOver, *, tested: bool
) -> tuple[Listing, tuple[Listing, ...]]:
    """The training images, and those that may be held out, the first choice first.

    Adds images of no split to `passed`. `tested`: the held-out images are elsewhere (`data.test`).

    Raises:
        ValueError: the layout is ambiguous; the message has the settings that resolve it.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, slash, _ = name.partition("/")
        folders.setdefault(folder if slash else "", []).append(name)
    trains = sorted(folder for folder in folders if folder.casefold() in TRAIN)
    groups = [sorted(folder for folder in folders if folder.casefold() in group) for group in HELD_OUT]
    held_out = [folder for group in groups for folder in group]
    others = sorted(folders.keys() - {*trains, *held_out})
    here = shown(root)

    for same in (trains, *([] if tested else groups)):
        if len(same) > 1:
            first = shown(root / same[0])
            way = f"data.path={first} data.test=FOLDER" if same is trains else f"data.test={first}"
            raise ValueError(f"{here} holds {_all(same)}, names of one split: say which, as in {way}; {NO_SPLITS}")
    if not trains and not held_out:
        _refuse_splits_below(root, names)
        return listing_of(root, names), ()
    if trains and (held_out or tested or not others):
        unused = [*others, *held_out] if tested else others
        where = {folder: f"in {folder}/" if folder else "in no sub-folder" for folder in unused}
        passed.unused += [
            f"{plural(len(folders[name]), 'image')} {where[name]}, beside {trains[0]}/" for name in unused
        ]
        train, *tests = (listing_of(root, folders[name], f"{name}/") for name in (trains[0], *held_out))
        return train, () if tested else tuple(tests)
    if trains:
        raise ValueError(
            f"{here} holds {trains[0]}/ beside {_all(others)}, and no folder of held-out images. "
            f"data.path={shown(root / trains[0])} reads {trains[0]}/ alone; {NO_SPLITS}"
        )
    if tested and others:
        reason = f"a name of held-out images, while data.test is another folder ({NO_SPLITS})"
        passed.unused += [f"{plural(len(folders[name]), 'image')} in {name}/, {reason}" for name in held_out]
        return listing_of(root, [name for folder in others for name in folders[folder]]), ()
    if len(held_out) == 1 and not others:
        return listing_of(root, names, f"{held_out[0]}/"), ()
    ways = f"data.test={shown(root / held_out[0])} holds it out; " if others else ""
    raise ValueError(
        f"{here} holds {_all([*held_out, *others])}, and no train/: which images are for training? {ways}"
        f"data.path={shown(root / held_out[0])} reads it alone; {NO_SPLITS}"
    )


def _natural(name: str) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _refuse_splits_below(root: Path, names: Sequence[str]) -> None:
    """Raises ValueError if a sub-folder has both training and held-out folders."""
    seen: dict[str, set[str]] = {}
    for name in names:
        parts = name.split("/", 2)
        if len(parts) > 2:
            seen.setdefault(parts[0], set()).add(parts[1].casefold())
    known = {folder for group in HELD_OUT for folder in group}
    mixed = sorted(folder for folder, below in seen.items() if below & known and below & {*TRAIN})
    if mixed:
        raise ValueError(
            f"{shown(root / mixed[0])} holds training and held-out images, in folders of such names. "
            f"data.path={shown(root / mixed[0])} reads them as such; {NO_SPLITS}"
        )


def _all(folders: Sequence[str]) -> str:
    named = [shown(f"{folder}/") if folder else "images in no sub-folder" for folder in folders[:MOST_NAMED]]
    rest = [f"{len(folders) - MOST_NAMED} more"] if len(folders) > MOST_NAMED else []
    *first, last = [*named, *rest]
    return f"{', '.join(first)} and {last}" if first else last
