"""Reading a checkpoint: the newest one that is whole, of which each process gets its own part."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, JsonValue
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from manyviews.run.checkpoints.checkpoint import Checkpoint
from manyviews.run.checkpoints.manifest import (
    OPTIMISER,
    STRICT,
    WHOLE,
    Manifest,
    few,
    part_of,
    read_manifest,
    read_model,
    shard_file,
    verify,
)
from manyviews.system import distributed
from manyviews.system.distributed import FORESEEN, raise_on_all_ranks
from manyviews.system.path_bytes import utf8_path


class OptimiserRest(BaseModel):
    """What an optimiser's state dictionary holds beside tensors."""

    model_config = STRICT

    state: Annotated[dict[str, dict[str, JsonValue]], BeforeValidator(few)]
    """By the number of the parameter."""
    param_groups: Annotated[list[dict[str, JsonValue]], BeforeValidator(few)]


def newest_checkpoint(place: Path, *, only: Collection[str] | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line in words about each newer one that is not.

    All processes call it together and get the same step: each verifies a part of the files, and one that finds damage
    turns all of them to the next older checkpoint. Of what is spread over processes each gets its own part, whatever
    number of processes wrote it; a process alone gets the whole. Among the metadata is `processes`, how many wrote it.
    Nothing of a folder is believed before it is verified, and no file is opened but those that a run itself writes.

    Args:
        place: the folder of checkpoints.
        only: the parts to verify and to read ("encoder", "optimiser", …), the others being left out; by default all.
    """
    skipped: list[str] = []
    tried: set[str] = set()
    # A run that goes on beside may have put newer ones in the place of all that were there.
    while found := [one for one in _listed(place) if one not in tried]:
        for one in found:
            tried.add(one)
            name = one.partition(" ")[0]
            try:
                return _read(place / name, only), skipped
            except FORESEEN as problem:
                if _known_by(place / name) == one:
                    skipped.append(f"{name} is damaged and was passed over: {problem}")
    return None, skipped


def _listed(place: Path) -> list[str]:
    """The folders, newest first, as the first process sees them: a shared file system may show others less."""
    known = list(filter(None, map(_known_by, reversed(steps(place, replaced=True)))))
    return distributed.all_gather_object(known)[0]


def _known_by(folder: Path) -> str:
    """Its name, and what tells it from another one that takes its place; nothing if it is gone."""
    try:
        return f"{folder.name} {folder.stat().st_ino}"
    except OSError:
        return ""


def steps(place: Path, *, replaced: bool = False) -> list[Path]:
    """The folders of checkpoints, oldest first; with those that a cut while they were replaced has left."""
    pattern = re.compile(r"step-\d{9}(\.replaced)?" if replaced else r"step-\d{9}")
    # What is replaced is older than what replaces it.
    return sorted(
        (folder for folder in place.glob("step-*") if pattern.fullmatch(folder.name)),
        key=lambda folder: (folder.stem, not folder.suffix),
    )


def way_on(place: Path) -> str:
    """How to go on after numbers were not finite, as the start of an advice: from a checkpoint, if there is one.

    Only what the manifests say is read: a sentence is not worth hashing every file.

    Args:
        place: the folder of checkpoints.
    """
    for folder in reversed(steps(place)):
        with suppress(*FORESEEN):
            read_manifest(folder)
            return f"the newest checkpoint, {folder.name}, is sound: go on from it with resume=true, or start anew"
    return "there is no checkpoint to go on from: start anew, with another output=…,"


def _read(folder: Path, only: Collection[str] | None) -> Checkpoint:
    """This process's part of a checkpoint; a problem that one process has is raised on all."""
    with raise_on_all_ranks():
        manifest = read_manifest(folder)
        chosen = {name: file for name, file in manifest.files.items() if only is None or part_of(name) in only}
        lacking = sorted(set(only or ()) - {part_of(name) for name in chosen})
        if lacking:
            raise ValueError(f"it has no {lacking[0]}")
        for name in list(chosen)[distributed.rank() :: distributed.world_size()]:
            verify(folder / name, chosen[name])
    with raise_on_all_ranks():
        return _assembled(folder, manifest, chosen)


def _assembled(folder: Path, manifest: Manifest, chosen: Collection[str]) -> Checkpoint:
    """A checkpoint of files that are verified; their content may still be anything."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name in chosen:
        if WHOLE.fullmatch(name):
            with _damage(name), utf8_path(folder / name) as path:
                parts[part_of(name)] = dict(load_file(path))
    for name, length in manifest.shards.items():
        part, _, key = name.partition(".")
        if part in parts:
            parts[part][key] = _own_rows(folder, part, key, length, manifest.processes)
    optimiser: dict[str, Any] = {}
    if OPTIMISER in chosen:
        optimiser = _optimiser(read_model(folder / OPTIMISER, OptimiserRest), parts.pop("optimiser", {}))
    metadata = {**manifest.metadata, "processes": manifest.processes}
    return Checkpoint(manifest.step, parts, optimiser, metadata, manifest.shards)


def _optimiser(rest: OptimiserRest, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A state dictionary from the two files of an optimiser."""
    state: dict[str, dict[str, Any]] = {index: dict(values) for index, values in rest.state.items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if index not in state:
            raise ValueError(f"{OPTIMISER} knows nothing of the tensor {name[:80]!r}")
        state[index][key] = tensor
    # JSON has no tuples; the indices of parameters are the only list that an optimiser keeps.
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in rest.param_groups
    ]
    return {"state": {int(index): values for index, values in state.items()}, "param_groups": groups}


def _own_rows(folder: Path, part: str, key: str, length: int, writers: int) -> Tensor:
    """This process's part of a tensor, from the files of those processes that wrote it."""
    own = distributed.share(length)
    # A row r is in the share of the last process n with n · length < (r + 1) · writers. A process without rows reads
    # an empty piece, which says how wide they are.
    numbers = range(1)
    if own.start < own.stop:
        numbers = range(((own.start + 1) * writers - 1) // length, (own.stop * writers - 1) // length + 1)
    pieces: list[Tensor] = []
    for number in numbers:
        written = distributed.share(length, number, writers)
        start, stop = max(own.start, written.start), min(own.stop, written.stop)
        name = shard_file(part, number, writers)
        with _damage(name), utf8_path(folder / name) as path, safe_open(path, "pt") as file:
            rows = file.get_slice(key)
            there = rows.get_shape()[0]
            if there != written.stop - written.start:
                raise ValueError(f"{there:,} rows, not the {written.stop - written.start:,} of its share of {key}")
            first, last = (start - written.start, stop - written.start) if start < stop else (0, 0)
            pieces.append(rows[first:last])
    if len({(piece.dtype, piece.shape[1:]) for piece in pieces}) > 1:
        raise ValueError(f"the rows of {part}.{key} are of several kinds")
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Whatever a reader of files raises over bytes that a stranger may have written, it is damage."""
    try:
        yield
    except Exception as problem:
        raise ValueError(f"{name} cannot be read: {problem}") from problem
