"""Reads the newest valid checkpoint; each rank gets its own shard."""

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

from manyviews.run.checkpoints.checkpoint import (
    OPTIMISER,
    STRICT,
    WHOLE,
    Checkpoint,
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
    """An optimiser's state dictionary without its tensors."""

    model_config = STRICT

    state: Annotated[dict[str, dict[str, JsonValue]], BeforeValidator(few)]
    """By index of the parameter."""
    param_groups: Annotated[list[dict[str, JsonValue]], BeforeValidator(few)]


def newest_checkpoint(parent: Path, *, only: Collection[str] | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Reads the newest valid checkpoint; returns it and a message for each damaged one.

    Collective: all ranks return the same step, each with its own shards, whatever the world size of the writers, which
    is added to the metadata as `processes`. Each rank verifies some files; damage on one makes all take the
    next older checkpoint. `only` names the parts to verify and to read ("encoder", "optimiser", …); by default all.
    """
    skipped: list[str] = []
    tried: set[tuple[str, int]] = set()
    # A run that is still writing may have replaced all of them meanwhile.
    while untried := [identity for identity in _listed(parent) if identity not in tried]:
        for identity in untried:
            tried.add(identity)
            folder = parent / identity[0]
            try:
                return _read(folder, only), skipped
            except FORESEEN as problem:
                if _identity(folder) == identity:
                    skipped.append(f"{folder.name} is damaged and was passed over: {problem}")
    return None, skipped


def _listed(parent: Path) -> list[tuple[str, int]]:
    """The checkpoints, newest first, as rank 0 sees them in a shared file system."""
    identities = list(filter(None, map(_identity, reversed(steps(parent, replaced=True)))))
    return distributed.all_gather_object(identities)[0]


def _identity(folder: Path) -> tuple[str, int] | None:
    """Name and inode; None if the folder is gone."""
    try:
        return folder.name, folder.stat().st_ino
    except OSError:
        return None


def steps(parent: Path, *, replaced: bool = False) -> list[Path]:
    """The folders of checkpoints, oldest first; with `replaced` also replaced ones."""
    pattern = re.compile(r"step-\d{9}(\.replaced)?" if replaced else r"step-\d{9}")
    # A replaced one is older than its replacement.
    return sorted(
        (folder for folder in parent.glob("step-*") if pattern.fullmatch(folder.name)),
        key=lambda folder: (folder.stem, not folder.suffix),
    )


def way_on(parent: Path) -> str:
    """Advice after non-finite numbers: the newest checkpoint, by its manifest."""
    for folder in reversed(steps(parent)):
        with suppress(*FORESEEN):
            read_manifest(folder)
            return f"the newest checkpoint, {folder.name}, is sound: continue from it with resume=true, or start again"
    return "there is no checkpoint to resume from: start again, with another output=…,"


def _read(folder: Path, only: Collection[str] | None) -> Checkpoint:
    """Verifies and reads this rank's part; an error on one rank is raised on all."""
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
    """Reads verified files, whose content is still untrusted."""
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
    state: dict[str, dict[str, Any]] = {index: dict(values) for index, values in rest.state.items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if index not in state:
            raise ValueError(f"{OPTIMISER} has no entry for the tensor {name[:80]!r}")
        state[index][key] = tensor
    # JSON has no tuples; only the indices of parameters are a list in an optimiser.
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in rest.param_groups
    ]
    return {"state": {int(index): values for index, values in state.items()}, "param_groups": groups}


def _own_rows(folder: Path, part: str, key: str, length: int, writers: int) -> Tensor:
    """Reads this rank's rows of a tensor from the shards that hold them."""
    own = distributed.share(length)
    # Row r is in the share of the last writer n with n · length < (r + 1) · writers. A rank without rows reads an empty
    # piece, for its dtype and width.
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
            count, expected = rows.get_shape()[0], written.stop - written.start
            if count != expected:
                raise ValueError(f"{count:,} rows, not the {expected:,} of its share of {key}")
            first, last = (start - written.start, stop - written.start) if start < stop else (0, 0)
            pieces.append(rows[first:last])
    if len({(piece.dtype, piece.shape[1:]) for piece in pieces}) > 1:
        raise ValueError(f"the rows of {part}.{key} are of several kinds")
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@contextmanager
def _damage(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as problem:
        raise ValueError(f"{name} cannot be read: {problem}") from problem
