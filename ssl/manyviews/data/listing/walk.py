"""Lists the image files below a folder, and what was passed over."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from manyviews.data.decoding.decode import looks_like_an_image
from manyviews.system.files import shown
from manyviews.system.names import some
from manyviews.system.plural import plural

MACOS_ARCHIVE = "__MACOSX"
"""Folder that macOS adds to archives: for each file one of the same ending that is no image."""
RUN_CONFIG = "config.yaml"
RUN_PARTS = frozenset({"metrics.jsonl", "checkpoints", "tensorboard", "backbone", "classifier", "done"})
"""A folder with a config.yaml and one of these is a run; its pictures are not images of a data set."""
CAMERA_ENDINGS = frozenset(
    {".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raw", ".svg", ".jxl", ".exr", ".hdr", ".dcm"}
)
"""Pictures that Pillow does not read either."""
MOST_ENDINGS = 10
LINK, BROKEN, UNREADABLE = "symbolic link", "broken symbolic link", "unreadable folder"
RUN, OTHER_SPLIT = "run folder", "folder"
KINDS = {
    LINK: " (data.follow_links=true follows them)",
    BROKEN: "",
    UNREADABLE: "",
    RUN: "",
    OTHER_SPLIT: " that is read as another split",
}
"""What may be passed over by name, with a remark."""
Identity = tuple[int, int]


@dataclass
class PassedOver:
    """What is below a folder and not read as an image, by reason."""

    endings: Counter[str] = field(default_factory=Counter)
    """Other files by their ending in lower case; "" for none."""
    hidden: int = 0
    """Files and folders whose name begins with a dot, and `__MACOSX`."""
    special: int = 0
    """Pipes, sockets and devices."""
    names: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Names of each of `KINDS`."""
    unused: list[str] = field(default_factory=list)
    """Sentences about images of no split."""

    def __str__(self) -> str:
        common = self.endings.most_common(MOST_ENDINGS)
        files = [f"{count:,} {ending or 'without an ending'}" for ending, count in common]
        if others := self.endings.total() - sum(count for _, count in common):
            files.append(f"{others:,} of other endings")
        parts = [", ".join(files)] if files else []
        parts += [f"{self.hidden:,} hidden"] if self.hidden else []
        parts += [plural(self.special, "pipe or device", "pipes or devices")] if self.special else []
        parts += [
            f"{plural(len(names), kind)}{KINDS[kind]}: {some(names)}" for kind, names in self.names.items() if names
        ]
        return shown("; ".join([*parts, *self.unused]))

    def warnings(self) -> Iterator[str]:
        """Yields sentences on what a user would not expect to be passed over."""
        pictures = [f"{count:,} {ending}" for ending, count in sorted(self.endings.items()) if ending in _pictures()]
        if pictures:
            yield f"pictures of kinds that are not read were passed over: {', '.join(pictures)}; convert them to PNG"
        for kind, names in self.names.items():
            if names and kind not in (RUN, OTHER_SPLIT):
                verb = "was" if len(names) == 1 else "were"
                yield f"{plural(len(names), kind)} {verb} passed over{KINDS[kind]}: {some(names)}"
        yield from self.unused


def walk(start: Path, *, follow_links: bool, exclude: Collection[Identity] = ()) -> tuple[list[str], PassedOver]:
    """Names of all image files below a folder, separated by `/`, and what was passed over.

    `start` may be a link itself; `exclude` are folders that are not entered, by `identity`.

    Raises:
        ValueError: the folder may not be read or is a run folder, or one below cannot be listed.
    """
    names: list[str] = []
    passed = PassedOver()
    folders = [""]
    visited: set[Identity] = set()
    while folders:
        below = folders.pop()
        folder = start / below
        try:
            own = identity(folder)
            # A loop of links, or a second way to the same folder.
            if own in visited:
                continue
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError as error:
            if not below:
                raise ValueError(f"{shown(folder)} may not be read: permission denied") from error
            passed.names[UNREADABLE].append(below.rstrip("/"))
            continue
        except OSError as error:
            raise ValueError(f"{shown(folder)} cannot be listed: {(error.strerror or str(error)).lower()}") from error
        visited.add(own)
        if own in exclude:
            passed.names[OTHER_SPLIT].append(below.rstrip("/"))
            continue
        present = {entry.name for entry in entries}
        if RUN_CONFIG in present and not RUN_PARTS.isdisjoint(present):
            if not below:
                raise ValueError(f"{shown(folder)} is a run folder, not a folder of images")
            passed.names[RUN].append(below.rstrip("/"))
            continue
        for entry in entries:
            name = below + entry.name
            if entry.name.startswith(".") or entry.name == MACOS_ARCHIVE:
                passed.hidden += 1
            elif entry.is_symlink() and not follow_links:
                passed.names[LINK].append(name)
            elif _is(entry.is_dir):
                folders.append(f"{name}/")
            elif not _is(entry.is_file):
                if entry.is_symlink():
                    passed.names[BROKEN].append(name)
                else:
                    passed.special += 1
            elif looks_like_an_image(start / name):
                names.append(name)
            else:
                passed.endings[Path(entry.name).suffix.lower()] += 1
    return names, passed


def identity(folder: Path) -> Identity:
    """Device and inode of a folder, equal for all names and links."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # links in a circle
        return False


@cache
def _pictures() -> frozenset[str]:
    """Endings of pictures, without the films and documents that Pillow has plugins for."""
    Image.init()
    return CAMERA_ENDINGS | (set(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg", ".h5", ".hdf"})
