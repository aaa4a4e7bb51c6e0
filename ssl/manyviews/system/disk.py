"""System errors as messages with a way out, and a check that a folder can be written to."""

import errno
import os
from pathlib import Path

from manyviews.system.files import shown

LONGEST_PART = 255
"""Bytes of a file's name on nearly all file systems."""
WORDS = {
    errno.EROFS: "is on a read-only file system; name a folder elsewhere",
    errno.EACCES: "may not be read or written: permission denied; change its permissions, or name another one",
    errno.EPERM: "may not be changed: the system does not permit it; name another folder",
    errno.ENOSPC: "cannot be written: no space is left on its disk; make room, or name a folder elsewhere",
    errno.EDQUOT: "cannot be written: the disk quota is used up; make room, or name a folder elsewhere",
    errno.ENOTDIR: "cannot be had: a part of its path is a file and not a folder",
    errno.EISDIR: "is a folder, and a file belongs there",
    errno.EEXIST: "is there already; remove it, or name another one",
    errno.ENOTEMPTY: "holds other files; name another folder",
    errno.ENAMETOOLONG: f"has too long a name: a part of a path has at most {LONGEST_PART} bytes",
    errno.ENOENT: "does not exist, and cannot be made there",
    errno.ELOOP: "cannot be followed: its symbolic links lead in a circle",
    errno.EIO: "cannot be read or written: the disk reports an error (dmesg tells more)",
    errno.ESTALE: "is gone: the network file system has lost it",
    errno.EMFILE: "cannot be opened: too many files are open; raise the limit (ulimit -n), or use fewer workers",
}
"""Messages by errno."""


def in_words(problem: OSError) -> str:
    """Describes a system error with its file and a way out."""
    message = WORDS.get(problem.errno or 0)
    if message is None or problem.filename is None:
        return shown(problem)
    name = os.fsdecode(problem.filename) if isinstance(problem.filename, bytes | str) else str(problem.filename)
    return f"{_short(name)} {message}"


def check_writable(folder: Path) -> None:
    """Raises ValueError if an output folder cannot be written to or created."""
    existing = nearest_existing(folder)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output={_short(str(folder))}: {shown(existing)} may not be written to; name another folder")


def nearest_existing(folder: Path) -> Path:
    """The nearest existing folder on a path; raises ValueError if there can be none."""
    output = f"output={_short(str(folder))}"
    if any(len(os.fsencode(part)) > LONGEST_PART for part in folder.parts):
        raise ValueError(f"{output} has too long a name: a part of a path has at most {LONGEST_PART} bytes")
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as problem:
        raise ValueError(f"{output}: {in_words(problem)}") from problem
    if not existing.is_dir():
        raise ValueError(f"{output}: {shown(existing)} is a file; name a folder")
    return existing


def _short(name: str) -> str:
    line = shown(name)
    return line if len(line) <= LONGEST_PART else f"{line[:80]}…{line[-20:]}"
