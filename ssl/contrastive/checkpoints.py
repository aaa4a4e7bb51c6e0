"""Checkpoints: everything a run needs to go on, whole or not there at all, with each process's own part of it.

What is equal on all processes is written by the first one, `encoder.safetensors` and the like. What is spread over
them, such as the rows of a memory bank, each writes itself, `objective-00001-of-00004.safetensors`: at a billion rows
no process could hold it all. Reading shares it out anew: every process reads its own part from the files that hold it,
so that a run goes on with any number of processes, with the same content, bit for bit.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contrastive import distributed

SHARD = re.compile(r"(?P<part>.+)-\d{5}-of-\d{5}\.safetensors")
FORESEEN = (OSError, ValueError, KeyError, SafetensorError, UnpicklingError)
"""What a damaged checkpoint, a full disk or a wrong setting raises; anything else is a fault of the program."""


class Checkpoint(NamedTuple):
    """Everything that a run needs to go on as if it had never stopped, as one process holds it.

    `parts` are state dictionaries by the name of their owner (encoder, objective, …); `optimiser` is an optimiser's
    state dictionary; `facts` are JSON values (seconds spent, fingerprint of the data, …). `shards` names the tensors
    of which each process holds `distributed.share(length)` of the first axis, with their length over all processes:
    "objective.rows", or "optimiser.3.momentum_buffer" for what the optimiser keeps of parameter 3.
    """

    step: int
    parts: Mapping[str, Mapping[str, Tensor]]
    optimiser: Mapping[str, Any]
    facts: Mapping[str, Any]
    shards: Mapping[str, int] = {}


@contextmanager
def together() -> Iterator[None]:
    """A stretch of work that succeeds on all processes or raises on all: none goes on to wait for one that failed.

    Raises:
        OSError: naming the process and its problem, on those that had none themselves.
        RuntimeError: likewise, where the problem is a fault of the program.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as raised:
        problem = raised
    kind = "" if problem is None else "foreseen" if isinstance(problem, FORESEEN) else "fault"
    words = "" if problem is None else str(problem) or type(problem).__name__
    told = [text.split("\n", 1) for text in distributed.texts(f"{kind}\n{words}")]
    # A fault anywhere is a fault everywhere: where damage is passed over, all pass over it or none does.
    for worst, error in (("fault", RuntimeError), ("foreseen", OSError)):
        if problem is not None and kind == worst:
            raise problem
        failed = [f"process {number}: {text}" for number, (found, text) in enumerate(told) if found == worst]
        if failed:
            raise error("; ".join(failed))


def optimiser_shards(optimiser: Any, sharded: Sequence[tuple[nn.Parameter, int]]) -> dict[str, int]:
    """The names of what an optimiser keeps row by row of sharded parameters, for `Checkpoint.shards`.

    Args:
        optimiser: a torch optimiser, or Accelerate's wrapper of one.
        sharded: the parameters of which each process holds a part, with their length over all processes.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    lengths = {id(parameter): length for parameter, length in sharded}
    found: dict[str, int] = {}
    for index, state in optimiser.state_dict()["state"].items():
        parameter = parameters[index]
        if id(parameter) not in lengths:
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[f"optimiser.{index}.{key}"] = lengths[id(parameter)]
    return found


def save_checkpoint(place: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Writes `place/step-…`, all processes together: aside first, synced, then renamed; only then the oldest go.

    A cut or a failure at any moment, on any process, leaves the older checkpoints whole; a failure is raised on all
    processes. `place` is the same folder for all of them.

    Raises:
        ValueError: if `keep` is below 1, or a shard has not the rows that are this process's part.
        OSError: if a process cannot write, for want of space, say.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least 1 checkpoint must stay, or nothing could be resumed")
    first, target = distributed.rank() == 0, place / f"step-{checkpoint.step:09d}"
    aside = place / f".{target.name}.partial"
    try:
        with together():
            if first:
                place.mkdir(parents=True, exist_ok=True)
                _tidy(place)
                aside.mkdir()
        written: list[Path] = []
        with together():
            written += _write(aside, checkpoint)
        digests: dict[str, str] = {}
        with together():
            own = {file.name: _digest(file) for file in written}
        for text in distributed.texts(json.dumps(own)):
            digests |= json.loads(text)
        with together():
            if first:
                _publish(aside, target, checkpoint, dict(sorted(digests.items())))
    except BaseException:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if first:
        for old in _steps(place)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def newest_checkpoint(place: Path, *, only: Collection[str] | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line in words about each newer one that is not.

    All processes call it together and get the same step: each verifies a part of the files, and one that finds damage
    turns all of them to the next older checkpoint. Of what is spread over processes each gets its own part, whatever
    number of processes wrote it; a process alone gets the whole.

    Args:
        place: the folder of checkpoints.
        only: the parts to verify and to read ("encoder", "optimiser", …), the others being left out; by default all.
    """
    # As the first process sees the folder: a shared file system may show the others something else for a while.
    names = distributed.texts("\n".join(folder.name for folder in reversed(_steps(place, replaced=True))))[0]
    skipped: list[str] = []
    for name in names.splitlines():
        try:
            return _read(place / name, only), skipped
        except FORESEEN as problem:
            skipped.append(f"{name} is damaged and was passed over: {problem}")
    return None, skipped


def _write(aside: Path, checkpoint: Checkpoint) -> list[Path]:
    """Writes and syncs the files of this process."""
    spread: dict[str, dict[str, Tensor]] = {}

    def stays(part: str, key: str, value: Any) -> bool:
        length = checkpoint.shards.get(f"{part}.{key}")
        if length is None:
            return True
        own = distributed.share(length)
        if len(value) != own.stop - own.start:
            raise ValueError(f"{part}.{key} has {len(value)} rows here, not the {own.stop - own.start} of {length}")
        spread.setdefault(part, {})[key] = value
        return False

    whole = {
        part: {key: value for key, value in state.items() if stays(part, key, value)}
        for part, state in checkpoint.parts.items()
    }
    optimiser = dict(checkpoint.optimiser)
    optimiser["state"] = {
        index: {key: value for key, value in state.items() if stays("optimiser", f"{index}.{key}", value)}
        for index, state in checkpoint.optimiser["state"].items()
    }
    missing = checkpoint.shards.keys() - {f"{part}.{key}" for part, state in spread.items() for key in state}
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} should be spread over the processes, but is no part of a state")

    contents = {_shard(part, distributed.rank(), distributed.size()): state for part, state in spread.items()}
    first = distributed.rank() == 0
    if first:
        contents |= {f"{part}.safetensors": state for part, state in whole.items()}
        torch.save(optimiser, aside / "optimiser.pt")
        (aside / "facts.json").write_text(json.dumps(dict(checkpoint.facts), indent=1))
    for name, state in contents.items():
        save_file({key: value.contiguous() for key, value in state.items()}, aside / name)
    written = [aside / name for name in (*contents, *(("optimiser.pt", "facts.json") if first else ()))]
    for file in written:
        sync(file)
    return written


def _publish(aside: Path, target: Path, checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
    """Makes a checkpoint of the files that all processes have written."""
    manifest: dict[str, Any] = {"step": checkpoint.step, "processes": distributed.size()}
    manifest |= {"shards": dict(checkpoint.shards), "sha256": dict(digests)}
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
    sync(aside / "manifest.json")
    sync(aside)
    # The same step may have been saved before, and be the only checkpoint: it stays readable until the new one is.
    replaced = target.with_name(f"{target.name}.replaced")
    if target.exists():
        target.rename(replaced)
    aside.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _tidy(place: Path) -> None:
    """Removes what a run that was cut off while it saved has left."""
    for folder in place.glob(".step-*.partial*"):
        shutil.rmtree(folder)
    for folder in place.glob("step-*.replaced"):
        original = folder.with_suffix("")
        if original.exists():
            shutil.rmtree(folder)
        else:
            folder.rename(original)


def _read(folder: Path, only: Collection[str] | None) -> Checkpoint:
    """This process's part of a checkpoint; a problem that one process has is raised on all."""
    with together():
        manifest = json.loads((folder / "manifest.json").read_text())
        digests: dict[str, str] = manifest["sha256"]
        chosen = {name: digests[name] for name in digests if only is None or _owner(name) in {*only, "facts"}}
        for name in list(chosen)[distributed.rank() :: distributed.size()]:
            if _digest(folder / name) != chosen[name]:
                raise ValueError(f"{name} is not what was written")
    with together():
        shards: dict[str, int] = manifest.get("shards", {})
        whole = [name for name in chosen if name.endswith(".safetensors") and not SHARD.fullmatch(name)]
        parts = {_owner(name): dict(load_file(folder / name)) for name in whole}
        optimiser: dict[str, Any] = {}
        if "optimiser.pt" in chosen:
            # weights_only: a checkpoint from elsewhere must not be able to run code.
            optimiser = torch.load(folder / "optimiser.pt", map_location="cpu", weights_only=True)
        for name, length in shards.items():
            part, key = name.split(".", 1)
            if only is None or part in only:
                rows = _own_rows(folder, part, key, length, manifest["processes"])
                if part == "optimiser":
                    index, key = key.split(".", 1)
                    optimiser["state"][int(index)][key] = rows
                else:
                    parts[part][key] = rows
        facts = json.loads((folder / "facts.json").read_text())
        return Checkpoint(manifest["step"], parts, optimiser, facts, shards)


def _own_rows(folder: Path, part: str, key: str, length: int, writers: int) -> Tensor:
    """This process's part of a tensor, from the files of those processes that wrote it."""
    own = distributed.share(length)
    pieces: list[Tensor] = []
    for number in range(writers):
        written = distributed.share(length, number, writers)
        start, stop = max(own.start, written.start), min(own.stop, written.stop)
        # A process without rows reads one empty piece, which says how wide they are.
        if start < stop or (own.start == own.stop and not pieces):
            with safe_open(folder / _shard(part, number, writers), "pt") as file:
                first, last = (start - written.start, stop - written.start) if start < stop else (0, 0)
                pieces.append(file.get_slice(key)[first:last])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _steps(place: Path, *, replaced: bool = False) -> list[Path]:
    """The folders of checkpoints, oldest first; with those that a cut while they were replaced has left."""
    pattern = re.compile(r"step-\d+(\.replaced)?" if replaced else r"step-\d+")
    return sorted(folder for folder in place.glob("step-*") if pattern.fullmatch(folder.name))


def _shard(part: str, number: int, processes: int) -> str:
    return f"{part}-{number + 1:05d}-of-{processes:05d}.safetensors"


def _owner(file: str) -> str:
    """The part that a file belongs to."""
    match = SHARD.fullmatch(file)
    return match["part"] if match else file.partition(".")[0]


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Returns once a file, or a folder's list of files, is on the disk."""
    with suppress(PermissionError):  # Windows opens no folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
