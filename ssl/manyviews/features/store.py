"""A folder of features: written by all ranks, resumable, and checked against a key.

A complete folder has a manifest.json, written last. Until then all files are in its sub-folder `.partial`, where each
rank records the rows that have been fsynced.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from manyviews.system import distributed, writing
from manyviews.system.arrays import mapped_array
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.files import LARGEST_JSON, open_lines, parse_json, read_json
from manyviews.system.writing import make_folder, open_new, rename, write_atomic, write_json

MANIFEST, PARTIAL, LOCK = "manifest.json", ".partial", ".lock"
KEY, DONE, ANY_DONE = "key.json", "done-{:05d}.txt", "done-*.txt"
PLAIN = re.compile(r"\w[\w.-]*\.(npy|parquet|fvecs)")
"""Names of the files that a manifest may list."""
REMARK = "remark "
IMAGES = ' "images": ['

State = Literal["absent", "begun", "complete"]


def state(folder: Path, key: Mapping[str, Any]) -> State:
    """The state in a folder of the features of a key, the JSON values that determine them.

    Raises:
        ValueError: the folder has features of another key, with the differences, or files that do not fit its manifest.
    """
    manifest, partial = read_manifest(folder), folder / PARTIAL / KEY
    stored = read_json(partial) if manifest is None and partial.is_file() else manifest
    if stored is None:
        return "absent"
    changed = differences({name: stored.get(name) for name in key}, json.loads(json.dumps(key)))
    if changed:
        raise ValueError("; ".join(changed))
    if manifest is None:
        return "begun"
    for name, shape in ((layer["file"], layer["shape"]) for layer in key["layers"].values()):
        try:
            rows = mapped_array(folder / name)
        except (OSError, ValueError) as problem:
            raise ValueError(f"{name} cannot be read ({problem})") from problem
        if rows.shape != tuple(shape) or rows.dtype != np.float32:
            raise ValueError(f"{name} holds {rows.dtype} {list(rows.shape)}, not float32 {list(shape)}")
    return "complete"


def ours(folder: Path) -> bool:
    """Whether a folder has features, complete or begun."""
    return (folder / MANIFEST).is_file() or (folder / PARTIAL).is_dir()


@contextmanager
def held(
    folder: Path, key: Mapping[str, Any], *, replace: bool, copies: int = 1, root: Path | None = None
) -> Iterator[bool]:
    """Locks a folder and allocates features of a key; yields whether complete; collective.

    Args:
        folder: created if it does not exist.
        key: as in `state`, with the files and shapes under "layers".
        replace: delete features of another key.
        copies: free disk space that is required, in multiples of the features.
        root: a parent that no link may lead out of; by default the folder itself.

    Raises:
        ValueError: features of another key, a folder locked by another program, or a full disk; an OSError on all
            ranks but 0.
        OSError: the folder cannot be written to.
    """
    existed, complete = folder.exists(), False
    with ExitStack() as stack:
        try:
            with raise_on_all_ranks():
                if distributed.rank() == 0:
                    make_folder(folder, root or folder)
                    try:
                        stack.enter_context(FileLock(folder / LOCK, timeout=0))
                    except Timeout as problem:
                        raise ValueError(f"{folder} is being written by another program; wait for it") from problem
                    # Removed before it is released: afterwards it may be another program's.
                    stack.callback(writing.remove, folder / LOCK, root)
                    complete = _allocate(folder, key, replace, copies, root)
        except BaseException:
            stack.close()
            if not existed and distributed.rank() == 0:
                with suppress(OSError):
                    folder.rmdir()
            raise
        yield distributed.any_over_ranks(complete)


def _allocate(folder: Path, key: Mapping[str, Any], replace: bool, copies: int, root: Path | None) -> bool:
    """Whether features are complete; allocates absent ones, to detect a full disk now."""
    try:
        progress = state(folder, key)
    except ValueError as problem:
        if not replace:
            raise ValueError(
                f"{folder} holds other features: {problem}; overwrite=true replaces them, or name another output"
            ) from problem
        remove(folder, root)
        progress = "absent"
    shapes = {name: layer["shape"] for name, layer in key["layers"].items()}
    needed = sum(4 * rows * width for rows, width in shapes.values()) * (copies - (progress != "absent"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: the features take {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free")
    if progress != "absent":
        return progress == "complete"
    partial, root = folder / PARTIAL, root or folder
    # Left by an interruption before the key was written.
    writing.remove(partial, root)
    make_folder(partial, root, new=True)
    try:
        for name, shape in shapes.items():
            with open_new(partial / f"{name}.npy", root) as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(file, header)
                size = file.tell() + 4 * math.prod(shape)
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
        write_json(partial / KEY, key, root)
    except OSError:
        # Files without their rows would only take the space.
        with suppress(OSError):
            writing.remove(partial, root)
        raise
    return False


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of complete features, without the list of images; None if there is none."""
    if not (folder / MANIFEST).is_file():
        return None
    lines, length = [], 0
    with open_lines(folder / MANIFEST) as content:
        for line in content:
            # The list of millions of images would take gigabytes.
            if line.rstrip("\n") == IMAGES:
                lines.append(f"{IMAGES}]}}")
                break
            lines.append(line)
            length += len(line)
            if length > LARGEST_JSON:
                raise ValueError(f"{folder / MANIFEST} is damaged (it has more than {LARGEST_JSON:,} letters)")
    manifest = parse_json("".join(lines), str(folder / MANIFEST))
    files = manifest.get("files")
    # Files are moved and removed by these names, and the folder may be a stranger's.
    if not isinstance(files, list) or not all(isinstance(name, str) and PLAIN.fullmatch(name) for name in files):
        raise ValueError(f"{folder / MANIFEST} is damaged (its files are not named, or lie elsewhere)")
    return {name: value for name, value in manifest.items() if name != "images"}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """The differences of two nested mappings, as sentences.

    Examples:
        >>> differences({"input": {"size": 28}}, {"input": {"size": 32}})
        ['input.size was 28 and is 32']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = dict.fromkeys([*old, *new])
        return [
            line
            for key in names
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        ]
    if old == new:
        return []
    if old is None or new is None:
        return [f"{name} was {'absent' if old is None else 'there'} and is {'absent' if new is None else 'there'}"]
    return [f"{name} was {_brief(old)} and is {_brief(new)}"]


def remove(folder: Path, root: Path | None = None) -> None:
    """Deletes features and no other file of the folder; `root` is that of `held`."""
    manifest: dict[str, Any] = {}
    with suppress(ValueError):
        manifest = read_manifest(folder) or {}
    # The manifest first: without it, what is half deleted does not look complete.
    for name in (MANIFEST, PARTIAL, *manifest.get("files", ())):
        writing.remove(folder / name, root)


def rows_done(folder: Path, total: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Bool [total]: the rows that any rank has recorded as fsynced."""
    done = np.zeros(total, dtype=np.bool_)
    for file in (folder / PARTIAL).glob(ANY_DONE):
        for line in _whole_lines(file):
            # A line that was cut off by an interruption, and ended on resuming, has no third word.
            match line.split():
                case [start, stop, "done"] if start.isdecimal() and stop.isdecimal() and len(start + stop) < 40:
                    done[int(start) : int(stop)] = True
    return done


def remarks(folder: Path) -> list[Any]:
    """The distinct remarks of all ranks."""
    lines = [line for file in sorted((folder / PARTIAL).glob(ANY_DONE)) for line in _whole_lines(file)]
    distinct = dict.fromkeys(line for line in lines if line.startswith(REMARK))
    return [json.loads(line.removeprefix(REMARK)) for line in distinct]


def finish(
    folder: Path,
    names: Sequence[str],
    manifest: Mapping[str, Any],
    images: Iterable[Sequence[str | int]],
    root: Path | None = None,
) -> None:
    """Moves files out of `.partial` and then writes the manifest; called by one rank.

    `manifest` are JSON values, the key among them, and `images` the manifest's entries of the rows, streamed; `root` is
    that of `held`.
    """
    root = root or folder
    for name in names:
        if (folder / PARTIAL / name).exists():  # not if an interruption came between the moves
            rename(folder / PARTIAL / name, folder / name, root)
    head = json.dumps({**manifest, "files": list(names)}, indent=1)

    def lines() -> Iterable[bytes]:
        yield (head.removesuffix("\n}") + f",\n{IMAGES}").encode()
        for number, entry in enumerate(images):
            yield f"{',' if number else ''}\n  {json.dumps(list(entry))}".encode()
        yield b"\n ]\n}\n"

    write_atomic(folder / MANIFEST, lines(), root)
    with suppress(OSError):
        writing.remove(folder / PARTIAL, root)


def mapped(file: Path) -> Tensor:
    """The rows of a .npy file, mapped into memory."""
    # Copy on write: torch warns of arrays that are read-only.
    return torch.from_numpy(mapped_array(file, "c"))


def _whole_lines(file: Path) -> list[str]:
    with open_lines(file) as lines:
        return [line.removesuffix("\n") for line in lines if line.endswith("\n")]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:12]}…" if isinstance(value, str) and len(text) > 40 else text
