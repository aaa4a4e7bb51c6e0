"""Writes, renames and removes files in untrusted folders without following links.

Each function takes a path and the root that it must stay in, by default the folder of the path. The root itself may be
a link; below it each folder is opened relative to the descriptor of its parent (`files.folder_beneath`).
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

from manyviews.system.files import FLAGS, folder_beneath, name_at, open_at

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | FLAGS
# O_NONBLOCK: a pipe would block; a regular file does not care.
_THERE = os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | FLAGS


def make_folder(path: Path, root: Path, *, new: bool = False) -> None:
    """Creates a folder with its parents; raises OSError, also if it exists and should be `new`."""
    root.mkdir(parents=True, exist_ok=True)
    with folder_beneath(path.parent if new else path, root, make=True) as above:
        if new:
            os.mkdir(name_at(path, above), dir_fd=above)


def open_new(file: Path, root: Path | None = None) -> BinaryIO:
    """Creates a file for writing and reading; raises OSError, also if it exists."""
    with folder_beneath(file.parent, root) as folder:
        return os.fdopen(open_at(file, folder, _NEW), "w+b")


def open_there(file: Path, root: Path | None = None, *, append: bool = False) -> int:
    """Opens an existing file to read and write; with `append` at its end, creating it.

    Returns the descriptor.

    Raises:
        OSError: if it cannot be opened, is a link or no regular file.
    """
    with folder_beneath(file.parent, root) as folder:
        return open_at(file, folder, _THERE | ((os.O_CREAT | os.O_APPEND) if append else 0))


def rename(old: Path, new: Path, root: Path | None = None) -> None:
    """Renames a file or a folder, replacing a file of the new name; raises OSError."""
    with folder_beneath(old.parent, root) as before, folder_beneath(new.parent, root) as after:
        os.replace(name_at(old, before), name_at(new, after), src_dir_fd=before, dst_dir_fd=after)


def remove(path: Path, root: Path | None = None) -> None:
    """Removes a file, a link or a folder with its content, if it exists; raises OSError."""
    with suppress(FileNotFoundError), folder_beneath(path.parent, root) as folder:
        name = name_at(path, folder)
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)


def write_atomic(file: Path, content: bytes | Iterable[bytes], root: Path | None = None) -> None:
    """Writes a file atomically: under a temporary name, synced, then renamed.

    Raises:
        OSError: if it cannot be written; the old file stays.
    """
    with replacing(file, root) as (_, aside):
        aside.writelines([content] if isinstance(content, bytes) else content)


def write_json(file: Path, value: Mapping[str, Any], root: Path | None = None) -> None:
    """Writes a JSON file atomically; raises as `write_atomic` does."""
    write_atomic(file, f"{json.dumps(value, indent=1)}\n".encode(), root)


@contextmanager
def replacing(file: Path, root: Path | None = None, *, synced: bool = True) -> Iterator[tuple[Path, BinaryIO]]:
    """Creates a temporary file that replaces `file` when the context is left without an error.

    Yields its path and the open file. A library may write to the path, or replace what is there; where there is /proc,
    the path leads through the folder's descriptor. Unless `synced`, syncing file and folder is left to the caller.

    Raises:
        OSError: if it cannot be written; the old file stays.
    """
    aside = aside_of(file)
    with folder_beneath(file.parent, root) as folder:
        name = name_at(aside, folder)
        try:
            with os.fdopen(open_at(aside, folder, _NEW), "w+b") as stream:
                mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
                yield _path(file.parent, folder) / aside.name, stream
            # A library may have replaced it, safetensors by a file that only its owner may read.
            descriptor = open_at(aside, folder, _THERE)
            try:
                if hasattr(os, "fchmod"):
                    os.fchmod(descriptor, mode)
                if synced:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(name, name_at(file, folder), src_dir_fd=folder, dst_dir_fd=folder)
            if synced and folder is not None:
                os.fsync(folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(name, dir_fd=folder)
            raise


@contextmanager
def folder_path(path: Path, root: Path) -> Iterator[Path]:
    """A path of a folder for libraries, through its descriptor where there is /proc.

    Raises:
        OSError: if the folder does not exist or lies behind a link.
    """
    with folder_beneath(path, root) as folder:
        yield _path(path, folder)


def aside_of(file: Path) -> Path:
    """A temporary path beside a file, unique to this process."""
    return file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def _path(path: Path, folder: int | None) -> Path:
    by_descriptor = Path(f"/proc/self/fd/{folder}")
    return by_descriptor if folder is not None and by_descriptor.exists() else path
