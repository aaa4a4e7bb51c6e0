"""Reads untrusted files: regular, bounded in size, not behind links below a folder."""

import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

MEBIBYTE = 1 << 20
LARGEST_JSON = 16 * MEBIBYTE
"""Bytes of a JSON file, which takes thirty times as much memory."""
LONGEST_LINE = MEBIBYTE
LONGEST_SHOWN = 1000
UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks."""
BEHIND_A_LINK = "is a symbolic link, or lies behind one"
IRREGULAR = "is no regular file"

# O_NONBLOCK: a pipe would block; a regular file does not care.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
FLAGS = _NO_LINK | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | FLAGS
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | FLAGS
BY_DESCRIPTOR = {os.open, os.mkdir, os.unlink, os.rename, os.stat} <= os.supports_dir_fd


def shown(text: object) -> str:
    """Formats a name or value as one line of a message, without control characters."""
    line = spelled(str(text))
    return line if len(line) <= LONGEST_SHOWN else f"{line[:LONGEST_SHOWN]}…"


def spelled(text: str, *, ascii_only: bool = False) -> str:
    r"""Escapes unprintable letters, raw bytes as \xe9; with `ascii_only` all non-ASCII."""
    if text.isascii() if ascii_only else text.isprintable():
        return text
    return "".join(_letter(letter, ascii_only) for letter in text)


def _letter(letter: str, ascii_only: bool) -> str:
    if letter.isprintable() and (letter.isascii() or not ascii_only):
        return letter
    # surrogateescape (PEP 383).
    return f"\\x{ord(letter) - 0xDC00:02x}" if "\udc80" <= letter <= "\udcff" else ascii(letter)[1:-1]


class RefusedFileError(ValueError):
    """Raised for what is no regular file, or behind a link, with the `reason`."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{shown(path)} {reason}")
        self.reason = reason


class LinkError(OSError):
    """Raised for a link, or what is no regular file, in a path to be written."""

    def __init__(self, path: Path, reason: str = BEHIND_A_LINK) -> None:
        super().__init__(f"{shown(path)} {reason}: nothing is written there; remove it")


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a regular file for reading, following links.

    Raises:
        RefusedFileError: if it is a folder, a pipe, a socket or a device.
        OSError: if it cannot be read.
    """
    _check_regular(path.stat(), path)
    return _opened(path, path, _READING & ~_NO_LINK, None)


def open_beneath(root: Path, name: str) -> io.BufferedReader:
    """Opens a regular file below a folder for reading, without following links below it.

    Raises:
        RefusedFileError: if a part of the name is a symbolic link or `..`, or it is no regular file.
        OSError: if it cannot be read.
    """
    path = root / name
    if not {"", ".", ".."}.isdisjoint(name.split("/")) or PurePosixPath(name).is_absolute():
        raise RefusedFileError(path, "leads out of its folder")
    try:
        with folder_beneath(path.parent, root) as folder:
            last = name_at(path, folder)
            _check_regular(os.stat(last, dir_fd=folder, follow_symlinks=False), path)
            return _opened(last, path, _READING, folder)
    except LinkError as problem:
        raise RefusedFileError(path, BEHIND_A_LINK) from problem


def read_bytes(path: Path, most: int) -> bytes:
    """Reads a regular file of at most `most` bytes; raises ValueError or OSError otherwise."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{shown(path)} has more than {most:,} bytes, the most that is read of such a file")
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal; raises ValueError or OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, most: int) -> str:
    """Reads a regular file of at most `most` bytes as UTF-8; raises ValueError or OSError."""
    content = read_bytes(path, most)
    if content[:2] in UTF16:
        raise ValueError(f"{shown(path)} is text in UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{shown(path)} is no text in UTF-8: {problem.reason} at byte {problem.start:,}") from problem


def read_json(path: Path, most: int = LARGEST_JSON) -> dict[str, Any]:
    """Reads a JSON object from at most `most` bytes; raises ValueError or OSError."""
    return parse_json(read_text(path, most), shown(path))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Parses a JSON object; raises ValueError with the name of the text otherwise."""
    try:
        value = json.loads(text)
    except RecursionError as problem:
        raise ValueError(f"{name} is damaged: it is nested too deep") from problem
    except ValueError as problem:
        raise ValueError(f"{name} is damaged: {shown(problem)}") from problem
    if not isinstance(value, dict):
        raise ValueError(f"{name} is damaged: it holds a {type(value).__name__} and no object")
    return value


@contextmanager
def open_lines(path: Path, longest: int = LONGEST_LINE) -> Iterator[Iterator[str]]:
    """Opens a regular file; yields its lines with their ends, raw bytes as surrogates.

    Raises:
        ValueError: if it is no regular file, or in UTF-16; while iterating, for a line longer than `longest`.
        OSError: if it cannot be read.
    """
    # newline="": a CSV reader needs the original ends.
    with open_regular(path) as file:
        if file.read(2) in UTF16:
            raise ValueError(f"{shown(path)} is text in UTF-16; save it as “CSV UTF-8”")
        file.seek(0)
        with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
            yield _lines(text, path, longest)


def _lines(text: io.TextIOWrapper, path: Path, longest: int) -> Iterator[str]:
    number = 0
    while line := text.readline(longest + 1):
        number += 1
        if len(line) > longest:
            raise ValueError(f"{shown(path)}, line {number:,}: it is longer than {longest:,} letters")
        yield line


def check_links(folder: Path) -> None:
    """Raises ValueError for a symbolic link out of a folder, or a broken one."""
    root = folder.resolve()
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(root)):
                raise ValueError(
                    f"{shown(path)} is a symbolic link out of {shown(folder)}; put what it leads to in its place"
                )


@contextmanager
def folder_beneath(path: Path, root: Path | None, *, make: bool = False) -> Iterator[int | None]:
    """Opens a folder without following links below the root, by default the folder itself.

    Yields its descriptor, or None on systems that have none for folders. `make` creates the missing folders.

    Raises:
        LinkError: if a link is on the way.
        OSError: if it cannot be opened.
    """
    root = path if root is None else root
    parts = path.relative_to(root).parts
    if ".." in parts:
        raise LinkError(path, "leads out of its folder")
    if not BY_DESCRIPTOR:
        for depth in range(1, len(parts) + 1):
            part_path = root.joinpath(*parts[:depth])
            if part_path.is_symlink():
                raise LinkError(part_path)
            if make:
                part_path.mkdir(exist_ok=True)
        yield None
        return
    folder = os.open(root, _FOLDER & ~getattr(os, "O_NOFOLLOW", 0))
    try:
        for depth, part in enumerate(parts, 1):
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
            below = open_at(root.joinpath(*parts[:depth]), folder, _FOLDER)
            os.close(folder)
            folder = below
        yield folder
    finally:
        os.close(folder)


def name_at(path: Path, folder: int | None) -> str:
    """The path that functions of `os` take beside the descriptor of its folder."""
    return str(path) if folder is None else path.name


def open_at(path: Path, folder: int | None, flags: int) -> int:
    """Opens a regular file or a folder that is no link; raises LinkError otherwise."""
    name = name_at(path, folder)
    if not BY_DESCRIPTOR and path.is_symlink():
        raise LinkError(path)
    try:
        descriptor = os.open(name, flags, 0o666, dir_fd=folder)
    except OSError as problem:
        # With O_EXCL, whatever has the name is in the way.
        with suppress(FileNotFoundError):
            kind = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
            if not flags & os.O_EXCL and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                raise LinkError(path, BEHIND_A_LINK if stat.S_ISLNK(kind) else IRREGULAR) from problem
        # With the whole path, not the name alone.
        raise type(problem)(problem.errno, problem.strerror, str(path)) from None
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode) and not stat.S_ISDIR(mode):
        os.close(descriptor)
        raise LinkError(path, IRREGULAR)
    return descriptor


def _opened(name: str | Path, path: Path, flags: int, folder: int | None) -> io.BufferedReader:
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        # Again: it may have been replaced.
        _check_regular(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(status: os.stat_result, path: Path) -> None:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    if stat.S_ISLNK(status.st_mode):
        raise RefusedFileError(path, BEHIND_A_LINK)
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for test, kind in kinds.items() if test(status.st_mode)), "something else")
        raise RefusedFileError(path, f"is {kind} and no file")
