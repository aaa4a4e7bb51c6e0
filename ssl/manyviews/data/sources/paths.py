"""Paths in settings, hints for wrong ones, and the download folder."""

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
"""A folder, made absolute: a recorded run must not depend on the working directory."""
FilePath = FolderPath
"""A file, made absolute."""
WORDS = ("none", "folders")


def _labels_source(source: str) -> str:
    path = Path(source)
    if source not in WORDS and not path.suffix and not path.exists() and path.name == source:
        hint = did_you_mean(source, WORDS)
        raise ValueError(f"data.labels={source} is neither none nor folders nor a CSV file{hint}")
    return source if source in WORDS else _absolute(source)


LabelsSource = Annotated[str, AfterValidator(_labels_source)]
"""Source of labels: a file, made absolute, or one of two words."""


def existing_folder(path: str) -> Path:
    """The folder at `path`; raises ValueError, with a hint, if there is none or it is forbidden."""
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
    """The end of a message on a wrong path: its existing part, and similar names there."""
    present = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(present).parts[0]
    near = closest(missing, sorted(os.listdir(present)), 3)
    hint = f", and holds {shown(', '.join(near))}" if near else f", but holds nothing like {shown(repr(missing))}"
    return f"{shown(present)} does{hint}"


def same_spelling(known: Iterable[str]) -> Callable[[str], str | None]:
    """Returns a lookup of known names: the name itself, or the only one equal in NFC, or None.

    macOS writes accents in file names as letters of their own (NFD), tables and keyboards do not (NFC).

    Examples:
        >>> same_spelling(["caf\u00e9"])("cafe\u0301") == "caf\u00e9"
        True
    """
    exact = set(known)
    composed: dict[str, str | None] = {}
    for name in exact:
        form = unicodedata.normalize("NFC", name)
        composed[form] = None if form in composed else name
    return lambda name: name if name in exact else composed.get(unicodedata.normalize("NFC", name))


def cache_folder() -> Path:
    """The default download folder: `manyviews` in PyTorch's cache (`TORCH_HOME`)."""
    return Path(torch.hub.get_dir()).parent / "manyviews"


def download(folder: Path, name: str, fetch: Callable[[], object]) -> None:
    """Fetches a data set, one process of a machine at a time; raises ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            fetch()
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} is not in {folder} and could not be downloaded ({reason}); "
            f"put it there in torchvision's layout, or set data.path=FOLDER"
        ) from error
