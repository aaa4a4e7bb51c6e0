"""Features kept as files: written by several processes at once, taken up again after a cut, known when stale.

A folder that is complete has a manifest.json, written last. Until then everything lies in its sub-folder `.partial`,
where each process notes the rows that it has safely written.
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
"""The files that stand beside a manifest, in the folder itself."""
REMARK = "remark "
IMAGES = ' "images": ['

State = Literal["absent", "begun", "complete"]


def state(folder: Path, key: Mapping[str, Any]) -> State:
    """How far the features of this key have come in a folder.

    Args:
        folder: may not exist.
        key: JSON values from which the features follow; those that were written with another key are stale.

    Raises:
        ValueError: if the features there have another key, naming what differs, or are not what their manifest says.
    """
    found = described(folder)
    begun = folder / PARTIAL / KEY
    progress: State = "complete" if found is not None else "begun"
    if found is None and begun.is_file():
        found = read_json(begun)
    if found is None:
        return "absent"
    changed = differences({name: found.get(name) for name in key}, json.loads(json.dumps(key)))
    if changed:
        raise ValueError("; ".join(changed))
    if progress == "complete":
        for layer in key["layers"].values():
            _check_rows(folder / layer["file"], layer["shape"])
    return progress


def ours(folder: Path) -> bool:
    """Whether a folder holds features, complete or begun."""
    return (folder / MANIFEST).is_file() or (folder / PARTIAL).is_dir()


@contextmanager
def held(
    folder: Path, key: Mapping[str, Any], *, replace: bool, copies: int = 1, root: Path | None = None
) -> Iterator[bool]:
    """Holds a folder for the features of a key while it is open; tells whether they are complete; collective.

    Where they are not, they are begun, or those that were begun are left as they are.

    Args:
        folder: is made where it does not exist.
        key: as in `state`, with the files and shapes under "layers".
        replace: delete the features of another key.
        copies: how many times the space of the features is needed.
        root: a folder above, which no link may lead out of; without one that is the folder itself.

    Raises:
        ValueError: if it holds features of another key, or another program holds it, or the disk has no room; on the
            first process, and an OSError on the others.
        OSError: if it cannot be written to.
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
                    # While it is held: afterwards it may be another program's.
                    stack.callback(writing.remove, folder / LOCK, root)
                    complete = _ready(folder, key, replace, copies, root)
        except BaseException:
            stack.close()
            if not existed and distributed.rank() == 0:
                with suppress(OSError):
                    folder.rmdir()
            raise
        yield distributed.any_over_ranks(complete)


def _ready(folder: Path, key: Mapping[str, Any], replace: bool, copies: int, root: Path | None) -> bool:
    try:
        found = state(folder, key)
    except ValueError as problem:
        if not replace:
            raise ValueError(
                f"{folder} holds other features: {problem}; overwrite=true replaces them, or name another output"
            ) from problem
        remove(folder, root)
        found = "absent"
    shapes = {name: layer["shape"] for name, layer in key["layers"].items()}
    needed = sum(4 * rows * width for rows, width in shapes.values()) * (copies - (found != "absent"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: the features take {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free")
    if found == "absent":
        _begin(folder, key, shapes, root or folder)
    return found == "complete"


def described(folder: Path) -> dict[str, Any] | None:
    """What the manifest of complete features says, without the list of images; None where there is none."""
    if not (folder / MANIFEST).is_file():
        return None
    lines, length = [], 0
    with open_lines(folder / MANIFEST) as content:
        for line in content:
            # Of millions of images the rest would take gigabytes.
            if line.rstrip("\n") == IMAGES:
                lines.append(f"{IMAGES}]}}")
                break
            lines.append(line)
            length += len(line)
            if length > LARGEST_JSON:
                raise ValueError(f"{folder / MANIFEST} is damaged (it says more than {LARGEST_JSON:,} letters)")
    found = parse_json("".join(lines), str(folder / MANIFEST))
    files = found.get("files")
    # They are moved and removed by these names, and the folder may be a stranger's.
    if not isinstance(files, list) or not all(isinstance(name, str) and PLAIN.fullmatch(name) for name in files):
        raise ValueError(f"{folder / MANIFEST} is damaged (its files are not named, or lie elsewhere)")
    return {name: value for name, value in found.items() if name != "images"}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """In words, which values of two nested mappings differ: "input.size was 28 and is 32"."""
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
    """Deletes features, complete or begun, and nothing else that lies in the folder; `root` is that of `held`."""
    found: dict[str, Any] = {}
    with suppress(ValueError):
        found = described(folder) or {}
    # First of all: what is half deleted must not look complete.
    for name in (MANIFEST, PARTIAL, *found.get("files", ())):
        writing.remove(folder / name, root)


def rows_done(folder: Path, total: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows have been safely written, by any process."""
    done = np.zeros(total, dtype=np.bool_)
    for file in (folder / PARTIAL).glob(ANY_DONE):
        for line in _whole_lines(file):
            # A line that was cut off in the middle, and ended when the work was taken up again, has no third word.
            match line.split():
                case [start, stop, "done"] if start.isdecimal() and stop.isdecimal() and len(start + stop) < 40:
                    done[int(start) : int(stop)] = True
    return done


def remarks(folder: Path) -> list[Any]:
    """What the processes have remarked, each value once."""
    lines = [line for file in sorted((folder / PARTIAL).glob(ANY_DONE)) for line in _whole_lines(file)]
    found = dict.fromkeys(line for line in lines if line.startswith(REMARK))
    return [json.loads(line.removeprefix(REMARK)) for line in found]


def finish(
    folder: Path,
    names: Sequence[str],
    manifest: Mapping[str, Any],
    images: Iterable[Sequence[str | int]],
    root: Path | None = None,
) -> None:
    """Moves complete files to their place and writes the manifest, last; called by one process.

    Args:
        folder: whose features are complete.
        names: the files in `.partial` to keep.
        manifest: JSON values, the key among them.
        images: for each row its entry in the manifest, streamed.
        root: that of `held`.
    """
    root = root or folder
    for name in names:
        if (folder / PARTIAL / name).exists():  # or a cut came between the moves
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
    """The rows of a .npy file, mapped into memory: they are read from the disk when they are used."""
    # Copy on write: torch warns of arrays that cannot be written to, and the file stays as it is.
    return torch.from_numpy(mapped_array(file, "c"))


def _begin(folder: Path, key: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], root: Path) -> None:
    """Makes the files NAME.npy, with their space on the disk, so that a full disk is found now."""
    place = folder / PARTIAL
    # What was cut off before the key was written is nothing to go on from.
    writing.remove(place, root)
    make_folder(place, root, new=True)
    try:
        _allocate(place, shapes, root)
        write_json(place / KEY, key, root)
    except OSError:
        # Files without their rows would only take the room.
        with suppress(OSError):
            writing.remove(place, root)
        raise


def _allocate(place: Path, shapes: Mapping[str, Sequence[int]], root: Path) -> None:
    for name, shape in shapes.items():
        with open_new(place / f"{name}.npy", root) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)})
            size = file.tell() + 4 * math.prod(shape)
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)


def _whole_lines(file: Path) -> list[str]:
    with open_lines(file) as lines:
        return [line.removesuffix("\n") for line in lines if line.endswith("\n")]


def _check_rows(file: Path, shape: Sequence[int]) -> None:
    try:
        rows = mapped_array(file)
    except (OSError, ValueError) as problem:
        raise ValueError(f"{file.name} cannot be read ({problem})") from problem
    if rows.shape != tuple(shape) or rows.dtype != np.float32:
        raise ValueError(f"{file.name} holds {rows.dtype} {list(rows.shape)}, not float32 {list(shape)}")


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:12]}…" if isinstance(value, str) and len(text) > 40 else text
