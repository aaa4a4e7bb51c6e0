"""Folders that a person names, and the folder for what is downloaded."""

import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import torch
from filelock import FileLock
from pydantic import AfterValidator

from manyviews.system.files import shown
from manyviews.system.names import closest, did_you_mean


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


FolderPath = Annotated[str, AfterValidator(_absolute)]
"""A folder, made absolute when it is read: a recorded run must not depend on where it was started."""
WORDS = ("none", "folders")


def _labels_source(source: str) -> str:
    path = Path(source)
    if source not in WORDS and not path.suffix and not path.exists() and path.name == source:
        hint = did_you_mean(source, WORDS)
        raise ValueError(f"data.labels={source} is neither none nor folders nor a CSV file{hint}")
    return source if source in WORDS else _absolute(source)


LabelsSource = Annotated[str, AfterValidator(_labels_source)]
"""Where labels come from: a file, made absolute likewise, or one of two words."""


def existing_folder(path: str) -> Path:
    """The folder at `path`.

    Raises:
        ValueError: there is none (the message says how far the path leads, and what is spelled alike), it is a file,
            or it may not be read.
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            os.scandir(folder).close()
            return folder
        if folder.exists():
            raise ValueError(f"{path} is a file, not a folder of images; its folder is {folder.parent}")
        raise ValueError(f"{path} does not exist; {nearest(folder)}")
    except PermissionError as error:
        raise ValueError(f"{error.filename or path} may not be read: permission denied") from error


def nearest(path: Path) -> str:
    """The half sentence that helps with a wrong path: how far it leads, and what is spelled alike there."""
    present = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(present).parts[0]
    alike = closest(missing, sorted(os.listdir(present)), 3)
    held = f", and holds {shown(', '.join(alike))}" if alike else f", but holds nothing like {shown(repr(missing))}"
    return f"{shown(present)} does{held}"


def same_spelling(known: Iterable[str]) -> Callable[[str], str | None]:
    """Looks names up among those that are known: a name itself, or else the only one of the same letters.

    A letter with an accent is one or two in Unicode: macOS keeps names of files with two (NFD), tables and keyboards
    give one (NFC). Names that differ by this alone are two, of which each must be given as it is.

    Returns:
        A function from a name to the known one; None: there is none, or there are two.
    """
    exact = set(known)
    composed: dict[str, str | None] = {}
    for name in exact:
        form = unicodedata.normalize("NFC", name)
        composed[form] = None if form in composed else name
    return lambda name: name if name in exact else composed.get(unicodedata.normalize("NFC", name))


def cache_folder() -> Path:
    """Where data sets are downloaded to when no path is given: `manyviews` in PyTorch's cache (`TORCH_HOME`)."""
    return Path(torch.hub.get_dir()).parent / "manyviews"


def download(folder: Path, name: str, fetch: Callable[[], object]) -> None:
    """Fetch into a folder, one process of the machine at a time; `fetch` must do nothing when all is there.

    Raises:
        ValueError: it fails; the message says why, and where the files can be put by hand.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            fetch()
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} is not in {folder} and could not be downloaded ({reason}); "
            f"put it there in torchvision's layout, or say where it is: data.path=FOLDER"
        ) from error
