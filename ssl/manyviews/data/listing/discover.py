"""Discovers the training and held-out images of a data folder and their labels."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from manyviews.data.images import Images
from manyviews.data.labels import read_labels
from manyviews.data.listing.digests import Digests
from manyviews.data.listing.listing import Listing, by_folder, hold_out, labelled, listing_of, splits_of
from manyviews.data.listing.walk import OTHER_SPLIT, PassedOver, identity, walk
from manyviews.data.sources.paths import same_spelling
from manyviews.system import distributed
from manyviews.system.files import shown
from manyviews.system.names import some
from manyviews.system.plural import plural

logger = logging.getLogger(__name__)

MOST_CLASSES = 10
"""Classes whose counts are listed one by one."""


class ReadSplit(NamedTuple):
    """One split of a folder after reading its files."""

    images: Images
    unreadable: list[tuple[str, str]]
    """Names and reasons of files that were left out."""
    digests: Digests


class Discovery(NamedTuple):
    """The images of a data folder, before they are read."""

    train: Listing
    test: Listing | None
    held_out: str
    """Source of the held-out images; empty if there are none."""
    passed: tuple[tuple[Path, PassedOver], ...]
    """What was passed over below each folder."""
    notes: tuple[str, ...]
    """Sentences on guesses about the layout."""

    def line(self, train: Images, test: Images | None) -> str:
        """The folders, their splits and classes, in one line."""
        parts = [f"{_origin(self.train)}: {_counted(train)}"]
        parts += [] if test is None else [f"held out, {self.held_out}: {_counted(test)}"]
        parts += self.notes
        parts += [f"passed over: {text}" for _, passed in self.passed if (text := str(passed))]
        return shown("; ".join(parts))

    def warn(self, read: Sequence[ReadSplit]) -> None:
        """Logs on rank 0 what a user would not expect."""
        if distributed.rank():
            return
        root = self.train.root
        sentences = [(folder, sentence) for folder, passed in self.passed for sentence in passed.warnings()]
        sentences += [(root, note) for note in self.notes]
        if len(read) == 2:
            own = {row.tobytes() for row in read[0].digests}
            copies = sum(row.tobytes() in own for row in read[1].digests)
            share = f"{copies:,} of {plural(len(read[1].digests), 'held-out image')}"
            sentences += [(root, f"{share} are also training images, byte for byte")] if copies else []
        for folder, sentence in sentences:
            logger.warning("%s: %s", shown(folder), shown(sentence))


def discover(
    root: Path,
    test: Path | None,
    *,
    follow_links: bool,
    splits: bool,
    labels: Path | str | None,
    holdout: float,
    seed: int,
    also: Collection[str] = (),
) -> Discovery:
    """Lists the images of a folder by the settings of `Folder`; a table in `labels` is a `Path`.

    `also` are names that are listed even if they do not exist.

    Raises:
        ValueError: a folder cannot be listed or has no images, its layout or labels are ambiguous, or the held-out
            images have other classes.
    """
    names, passed = _walked(root, follow_links, test)
    names += sorted(set(also) - set(names))
    train, candidates = (
        splits_of(root, names, passed, tested=test is not None) if splits else (listing_of(root, names), ())
    )
    everything, table, classes = [(root, passed)], None, list[str]()
    if test is not None:
        tested, besides = _walked(test, follow_links, root)
        candidates = (listing_of(test, tested),)
        everything.append((test, besides))
    if isinstance(labels, Path):
        inside = [f"{below}/{name}" for below in passed.names[OTHER_SPLIT] for name in candidates[0].names]
        table = read_labels(labels, [*names, *inside])
        classes = sorted(set(table.values()))
        train = labelled(train, map(table.get, train.names), classes)
    elif labels != "none":
        train = by_folder(train, asked=labels == "folders")
    notes = _notes(train) if table is None and labels != "none" else []
    held, origin = None, ""
    for candidate in candidates:
        below = f"{passed.names[OTHER_SPLIT][0]}/" if passed.names[OTHER_SPLIT] else ""
        named, chosen = _origin(candidate), candidate
        if table is not None:
            chosen = labelled(
                candidate, [table.get(f"{below}{name}", table.get(name)) for name in candidate.names], classes
            )
        if train.labels is not None and (table is None or max(chosen.labels or [-1]) < 0):
            chosen = _with_classes_of(train, candidate)
        count = f"{plural(len(candidate.names), 'image')} in {named}"
        if held is not None:
            notes.append(f"{count} not used: {origin} is held out (data.test={named} measures on these)")
        elif train.labels is None or chosen.labels is not None:
            held, origin = chosen, named
        elif test is not None:
            raise ValueError(
                f"{shown(test)} has no sub-folder per class, so nothing can be measured on it; give it the sub-folders "
                "of data.path, or use data.labels=none to measure without labels"
            )
        else:
            notes.append(f"{count} not used: without one sub-folder per class nothing can be measured on them")
    if held is None and train.labels is not None and holdout:
        train, held = hold_out(train, holdout, seed)
        held, origin = (held, f"{100 * holdout:.3g} % of each class") if held.names else (None, "")
    return Discovery(train, held, origin, tuple(everything), tuple(notes))


def _walked(folder: Path, follow_links: bool, other: Path | None) -> tuple[list[str], PassedOver]:
    """The images of a folder, without those of the other one, and what was passed over."""
    exclude = () if other is None else (identity(other),)
    if identity(folder) in exclude:
        raise ValueError(
            f"data.path and data.test are one folder, {shown(folder)}; leave data.test out, to hold out a share"
        )
    names, passed = walk(folder, follow_links=follow_links, exclude=exclude)
    if not names:
        about = f"; passed over: {passed}" if str(passed) else ""
        raise ValueError(
            f"{shown(folder)} holds no images (no .jpg, .png, .webp, .tif or the like, at any depth){about}"
        )
    return names, passed


def _with_classes_of(train: Listing, test: Listing) -> Listing:
    """The held-out listing with the classes of training; unlabelled if it has none of them."""
    folders, spelled = set(test.folders()) - {""}, same_spelling(train.classes)
    unknown = sorted(folder for folder in folders if spelled(folder) is None)
    known = folders.difference(unknown)
    if unknown and (known or len(unknown) > 1):
        raise ValueError(
            f"{shown(test.root / test.below)}: the held-out images have classes that {shown(train.root / train.below)} "
            f"lacks: {some(unknown, 5)}; it has {some(train.classes, 5)}"
        )
    return labelled(test, map(spelled, test.folders()), train.classes) if known else test


def _notes(train: Listing) -> list[str]:
    folders = train.folders()
    beside, inside = folders.count(""), len(set(folders) - {""})
    if train.labels is not None and beside:
        return [f"{plural(beside, 'image')} beside the class folders, without a label"]
    if beside and inside > 1:
        share = f"{beside:,} of {len(folders):,}"
        return [f"no labels: most images ({share}) lie beside sub-folders; data.labels=folders makes these classes"]
    return []


def _origin(listing: Listing) -> str:
    return str(listing.root / listing.below)


def _counted(images: Images) -> str:
    if images.labels is None:
        return f"{plural(len(images), 'image')} without labels"
    counts = images.labels[images.labels >= 0].bincount(minlength=len(images.classes)).tolist()
    none = f", {missing:,} without a label" if (missing := len(images) - sum(counts)) else ""
    if len(counts) > MOST_CLASSES:
        classes = f"{len(counts):,} classes of {min(counts):,} to {max(counts):,}"
    else:
        of_each = ", ".join(f"{name}: {count:,}" for name, count in zip(images.classes, counts, strict=True))
        classes = f"{plural(len(counts), 'class', 'classes')} ({of_each})"
    return f"{plural(len(images), 'image')} in {classes}{none}"
