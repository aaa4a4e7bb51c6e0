"""Writing into a folder that a stranger may have made: nothing is written, renamed or removed along a link out of it.

Each function takes a path and the root that it must stay in; without one, that is the folder in which the path lies.
The root may be a link itself, for its owner names it; from there on each folder is opened by the descriptor of the one
before, and none may be a link, whenever that was put there. Windows has no descriptors of folders: there each one is
looked at first.
"""

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from manyviews.system.files import BEHIND_A_LINK, shown

IRREGULAR = "is no regular file"
BY_DESCRIPTOR = {os.open, os.mkdir, os.unlink, os.rename, os.stat} <= os.supports_dir_fd
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _FLAGS
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS
# A pipe would be waited for without O_NONBLOCK; a regular file does not care.
_THERE = os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | _FLAGS


class LinkError(OSError):
    """Something should be written where a link is, or what is no regular file."""

    def __init__(self, path: Path, reason: str = BEHIND_A_LINK) -> None:
        super().__init__(f"{shown(path)} {reason}: nothing is written there; remove it")


def make_folder(path: Path, root: Path, *, new: bool = False) -> None:
    """Makes a folder, its root and those on the way; raises OSError, also if it exists and should be new."""
    root.mkdir(parents=True, exist_ok=True)
    with _folder(path.parent if new else path, root, make=True) as above:
        if new:
            os.mkdir(_name(path, above), dir_fd=above)


def open_new(file: Path, root: Path | None = None) -> BinaryIO:
    """Makes a file, to be written and read; raises OSError, also if it exists."""
    with _folder(file.parent, root) as folder:
        return os.fdopen(_open(file, folder, _NEW), "w+b")


def open_there(file: Path, root: Path | None = None, *, append: bool = False) -> int:
    """A descriptor to read and write a file that exists; with `append` at its end, and it is made where it does not.

    Raises:
        OSError: if it cannot be opened, is a link or no regular file.
    """
    with _folder(file.parent, root) as folder:
        return _open(file, folder, _THERE | ((os.O_CREAT | os.O_APPEND) if append else 0))


def rename(old: Path, new: Path, root: Path | None = None) -> None:
    """Renames a file or a folder, in place of a file that has the new name; raises OSError."""
    with _folder(old.parent, root) as before, _folder(new.parent, root) as after:
        os.replace(_name(old, before), _name(new, after), src_dir_fd=before, dst_dir_fd=after)


def remove(path: Path, root: Path | None = None) -> None:
    """Removes a file, or a folder with all it holds, if it exists; of a link the link alone; raises OSError."""
    with suppress(FileNotFoundError), _folder(path.parent, root) as folder:
        name = _name(path, folder)
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)


def write_atomic(file: Path, content: bytes | Iterable[bytes], root: Path | None = None) -> None:
    """Writes a file that is there as a whole or not at all: aside, under a name of this writer's own, synced, renamed.

    Raises:
        OSError: if it cannot be written; what was there before stays.
    """
    with replacing(file, root) as (_, aside):
        aside.writelines([content] if isinstance(content, bytes) else content)


def write_json(file: Path, value: Mapping[str, Any], root: Path | None = None) -> None:
    """Writes a JSON file atomically; raises as `write_atomic` does."""
    write_atomic(file, f"{json.dumps(value, indent=1)}\n".encode(), root)


@contextmanager
def replacing(file: Path, root: Path | None = None, *, synced: bool = True) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file, by its path and opened, that takes the place of another one when it is written.

    A library may write to the path, in place of what is there or over it. Where /proc is, that leads through the
    descriptor of the folder, whatever is put in the folder's place meanwhile.

    Args:
        file: the name that it takes.
        root: what it must stay in.
        synced: sync it first, and the folder then; else that is left to the caller, who has more to sync.

    Raises:
        OSError: if it cannot be written; what was there before stays.
    """
    aside = aside_of(file)
    with _folder(file.parent, root) as folder:
        name = _name(aside, folder)
        try:
            with os.fdopen(_open(aside, folder, _NEW), "w+b") as opened:
                mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
                yield _path(file.parent, folder) / aside.name, opened
            # A library may have put another one in its place, safetensors one that is the owner's alone.
            descriptor = _open(aside, folder, _THERE)
            try:
                if hasattr(os, "fchmod"):
                    os.fchmod(descriptor, mode)
                if synced:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(name, _name(file, folder), src_dir_fd=folder, dst_dir_fd=folder)
            if synced and folder is not None:
                os.fsync(folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(name, dir_fd=folder)
            raise


@contextmanager
def folder_path(path: Path, root: Path) -> Iterator[Path]:
    """A path to a folder in which a library makes files; where /proc is, it leads through the folder's descriptor.

    Raises:
        OSError: if there is none, or it lies behind a link.
    """
    with _folder(path, root) as folder:
        yield _path(path, folder)


def aside_of(file: Path) -> Path:
    """A name beside a file, of this process alone, to write it under before it takes the file's name."""
    return file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


@contextmanager
def _folder(path: Path, root: Path | None, *, make: bool = False) -> Iterator[int | None]:
    """The descriptor of a folder, to which no link leads from the root on; None where the system has none of folders.

    Args:
        path: the folder.
        root: exists; None: it is the folder itself.
        make: makes the folders below the root that do not exist.
    """
    root = path if root is None else root
    parts = path.relative_to(root).parts
    if ".." in parts:
        raise LinkError(path, "leads out of its folder")
    if not BY_DESCRIPTOR:
        for depth in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:depth])
            if place.is_symlink():
                raise LinkError(place)
            if make:
                place.mkdir(exist_ok=True)
        yield None
        return
    folder = os.open(root, _FOLDER & ~getattr(os, "O_NOFOLLOW", 0))
    try:
        for depth, part in enumerate(parts, 1):
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
            below = _open(root.joinpath(*parts[:depth]), folder, _FOLDER)
            os.close(folder)
            folder = below
        yield folder
    finally:
        os.close(folder)


def _name(path: Path, folder: int | None) -> str:
    """What the functions of `os` take beside the descriptor of the folder."""
    return str(path) if folder is None else path.name


def _open(path: Path, folder: int | None, flags: int) -> int:
    """The descriptor of a regular file, or of a folder, that is no link."""
    name = _name(path, folder)
    if not BY_DESCRIPTOR and path.is_symlink():
        raise LinkError(path)
    try:
        descriptor = os.open(name, flags, 0o666, dir_fd=folder)
    except OSError as problem:
        # Where a new one is made, whatever has the name is in the way.
        with suppress(FileNotFoundError):
            kind = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
            if not flags & os.O_EXCL and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                raise LinkError(path, BEHIND_A_LINK if stat.S_ISLNK(kind) else IRREGULAR) from problem
        # The name alone tells nobody where it is.
        raise type(problem)(problem.errno, problem.strerror, str(path)) from None
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode) and not stat.S_ISDIR(mode):
        os.close(descriptor)
        raise LinkError(path, IRREGULAR)
    return descriptor


def _path(path: Path, folder: int | None) -> Path:
    by_descriptor = Path(f"/proc/self/fd/{folder}")
    return by_descriptor if folder is not None and by_descriptor.exists() else path
