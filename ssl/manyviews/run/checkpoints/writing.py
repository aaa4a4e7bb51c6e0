"""Writes, publishes and removes the files and folders of checkpoints."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from manyviews.run.checkpoints.checkpoint import (
    FILE,
    OPTIMISER,
    Checkpoint,
    File,
    Manifest,
    read_manifest,
    shard_file,
    sync,
    tensors_of,
)
from manyviews.run.checkpoints.reading import steps
from manyviews.system import distributed
from manyviews.system.distributed import FORESEEN
from manyviews.system.files import sha256
from manyviews.system.writing import open_new, remove, rename, replacing


def copied(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Copies what this rank writes: tensors and texts, by file."""
    first, missing = distributed.rank() == 0, set(checkpoint.shards)
    files: dict[str, dict[str, Tensor]] = {}
    for part, state in tensors_of(checkpoint).items():
        if first:
            files[f"{part}.safetensors"] = {}
        for key, value in state.items():
            length = checkpoint.shards.get(f"{part}.{key}")
            if length is None:
                if first:
                    files[f"{part}.safetensors"][key] = _copy(value)
                continue
            own = distributed.share(length)
            if len(value) != own.stop - own.start:
                raise ValueError(f"{part}.{key} has {len(value)} rows here, not the {own.stop - own.start} of {length}")
            missing.remove(f"{part}.{key}")
            files.setdefault(shard_file(part, distributed.rank(), distributed.world_size()), {})[key] = _copy(value)
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} should be spread over the processes, but is no part of a state")
    if not first:
        return files, {}
    numbers = {
        str(index): {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        for index, state in checkpoint.optimiser["state"].items()
    }
    rest = {"state": numbers, "param_groups": checkpoint.optimiser["param_groups"]}
    return files, {OPTIMISER: json.dumps(rest, allow_nan=False)}


def write(
    aside: Path,
    tensors: dict[str, dict[str, Tensor]],
    texts: dict[str, str],
    before: Callable[[], object] | None,
) -> dict[str, File]:
    """Writes and syncs the files of this rank; returns their sizes and hashes."""
    root = root_of(aside)
    for name, text in texts.items():
        with open_new(aside / name, root) as file:
            file.write(text.encode())
    for name, state in tensors.items():
        with replacing(aside / name, root, synced=False) as (path, _):
            save_file(state, path)
    written = [aside / name for name in (*tensors, *texts)]
    for path in written:
        sync(path)
    if before is not None and distributed.rank() == 0:
        before()
    return {path.name: File(bytes=path.stat().st_size, sha256=sha256(path)) for path in written}


def publish(aside: Path, target: Path, manifest: Manifest) -> None:
    """Writes the manifest of the files in the temporary folder and renames it."""
    root = root_of(aside)
    with open_new(aside / FILE, root) as file:
        file.write(manifest.text().encode())
    sync(aside / FILE)
    sync(aside)
    # An older save of the same step stays readable until this one is: it may be the only checkpoint.
    replaced = target.with_name(f"{target.name}.replaced")
    if target.exists():
        rename(target, replaced, root)
    rename(aside, target, root)
    sync(target.parent)
    with suppress(OSError):
        remove(replaced, root)


def rotate(newest: Path, *, keep: int, keep_best: bool) -> None:
    """Removes all checkpoints but the last `keep` up to the newest, and the best."""
    folders = steps(newest.parent)
    # Later ones are damaged: the run has resumed from an older one.
    kept = [folder for folder in folders if folder <= newest][-keep:]
    if keep_best and (scored := scores(newest.parent, upto=newest.name)):
        kept.append(max(scored, key=lambda folder: scored[folder]))
    for folder in folders:
        if folder not in kept:
            with suppress(OSError):
                remove(folder, root_of(folder))


def scores(parent: Path, *, upto: str) -> dict[Path, float]:
    """Scores of the readable checkpoints up to a folder's name, oldest first."""
    scored: dict[Path, float] = {}
    for folder in steps(parent):
        try:
            score = read_manifest(folder).metadata.get("score") if folder.name <= upto else None
        except FORESEEN:
            continue
        if isinstance(score, float):
            scored[folder] = score
    return scored


def tidy(parent: Path) -> None:
    """Removes what an interrupted save has left."""
    for folder in parent.glob(".step-*.partial*"):
        remove(folder, root_of(folder))
    for folder in parent.glob("step-*.replaced"):
        original = folder.with_suffix("")
        if original.exists():
            remove(folder, root_of(folder))
        else:
            rename(folder, original, root_of(folder))


def root_of(folder: Path) -> Path:
    """The run folder, which writing must not leave: RUN/checkpoints may be a link."""
    return folder.parent.parent


def _copy(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
