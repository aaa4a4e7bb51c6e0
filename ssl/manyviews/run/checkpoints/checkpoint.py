"""What a checkpoint holds in memory and on the disk; its manifest is read as untrusted data."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator
from torch import Tensor, nn

from manyviews.system.files import read_bytes, sha256, shown
from manyviews.system.path_bytes import restored, storable

OVERHEAD = 1 << 16
"""Bytes for each part beside its tensors (header, manifest, blocks of the disk), rounded up."""
FILE = "manifest.json"
OPTIMISER = "optimiser.json"
"""The state of an optimiser without its tensors: groups, and numbers such as a count of steps."""
MAX_BYTES = 1 << 23
"""Of a JSON file: more than any that is written."""
MAX_ENTRIES = 1 << 16
MAX_PROCESSES = 1 << 14
PART = r"(?P<part>[a-z_]{1,40})"
WHOLE = re.compile(rf"{PART}\.safetensors")
SHARD = re.compile(rf"{PART}-\d{{5}}-of-\d{{5}}\.safetensors")
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
M = TypeVar("M", bound=BaseModel)


class Checkpoint(NamedTuple):
    """Everything that a run needs to resume, as one rank holds it.

    `parts` are state dictionaries by the name of their owner (encoder, objective, …); `optimiser` is an optimiser's
    state dictionary; `metadata` holds JSON values, with the highest `score` marking the best checkpoint. `shards` names
    the tensors of which each rank holds `distributed.share(length)` of the first axis, with their length over all
    ranks: "objective.rows", or "optimiser.3.momentum_buffer" for the state of parameter 3.
    """

    step: int
    parts: Mapping[str, Mapping[str, Tensor]]
    optimiser: Mapping[str, Any]
    metadata: Mapping[str, Any]
    shards: Mapping[str, int] = {}


def optimiser_shards(optimiser: Any, sharded: Sequence[tuple[nn.Parameter, int]]) -> dict[str, int]:
    """The optimiser state that is sharded as its parameters are, for `Checkpoint.shards`.

    `sharded` holds the parameters of which each rank has a part, with their length over all ranks.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    lengths = {id(parameter): length for parameter, length in sharded}
    return {
        f"optimiser.{index}.{key}": lengths[id(parameters[index])]
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
        if id(parameters[index]) in lengths and isinstance(value, Tensor) and value.shape == parameters[index].shape
    }


def restore_optimiser(optimiser: Any, kept: Mapping[str, Any]) -> None:
    """Loads `Checkpoint.optimiser`, each tensor in the memory format of its parameter.

    Fused optimisers index the memory of both alike: with another memory format they would mix up weights.

    Raises:
        ValueError: if it is of other groups or other parameters.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    # Rates and decays follow from the recipe, not from an untrusted checkpoint.
    groups = optimiser.state_dict()["param_groups"]
    if [group.get("params") for group in kept["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("the optimiser has other groups of parameters than the checkpoint")
    states: dict[int, dict[str, Any]] = {}
    for index, state in kept["state"].items():
        if not 0 <= index < len(parameters):
            raise ValueError(
                f"the optimiser has {len(parameters):,} parameters, and the checkpoint one of number {index:,}"
            )
        states[index], parameter = dict(state), parameters[index]
        for key, value in state.items():
            if not isinstance(value, Tensor | int | float):
                raise ValueError(f"the optimiser's {shown(key)} of parameter {index} is no number in the checkpoint")
            if isinstance(value, Tensor) and value.ndim:
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"the optimiser's {key} of parameter {index} has the shape {tuple(value.shape)} in the "
                        f"checkpoint, and the parameter {tuple(parameter.shape)}"
                    )
                states[index][key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    optimiser.load_state_dict({"state": states, "param_groups": groups})


def tensors_of(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The tensors by part and name; "3.exp_avg" and the like in the part "optimiser"."""
    states = checkpoint.optimiser["state"].items()
    kept = {f"{index}.{key}": value for index, state in states for key, value in state.items()}
    tensors = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
    return {**{part: dict(state) for part, state in checkpoint.parts.items()}, "optimiser": tensors}


def room_needed(checkpoint: Checkpoint, *, keep: int) -> int:
    """Bytes on the disk, over all ranks, for `keep` checkpoints and one being written.

    The checkpoint must be of after a step: before it an optimiser has no state.
    """
    total = 0
    for part, state in tensors_of(checkpoint).items():
        total += OVERHEAD
        for key, value in state.items():
            length = checkpoint.shards.get(f"{part}.{key}")
            total += value.nbytes if length is None else length * value[:1].nbytes if len(value) else 0
    return (keep + 1) * total


def sync(path: Path) -> None:
    """Syncs a file, or the entries of a folder, to the disk."""
    with suppress(PermissionError):  # Windows opens no folder
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def few(value: Any) -> Any:
    """Refuses a huge collection before its items are validated: errors take memory."""
    if isinstance(value, list | dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"{len(value):,} entries, and at most {MAX_ENTRIES:,} are read")
    return value


class File(BaseModel):
    """Size and hash of a file."""

    model_config = STRICT

    bytes: int = Field(ge=0, le=1 << 50)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """The files of a checkpoint, with size and hash, and the metadata of the run."""

    model_config = STRICT

    step: int = Field(ge=0, lt=10**9)
    processes: int = Field(ge=1, le=MAX_PROCESSES)
    """World size of the run that wrote it."""
    shards: Annotated[dict[str, Annotated[int, Field(ge=0, le=1 << 48)]], BeforeValidator(few)]
    files: Annotated[dict[str, File], BeforeValidator(few)]
    metadata: dict[str, JsonValue] = Field(alias="facts")
    """`facts` on the disk."""
    seal: str = ""
    """The hash of all other fields."""

    @model_validator(mode="after")
    def _the_files_are_those_of_a_checkpoint(self) -> "Manifest":
        expected: set[str] = set()
        for part in {name.partition(".")[0] for name in self.shards}:
            if len(expected) > len(self.files):
                break
            expected |= {f"{part}.safetensors", *(shard_file(part, n, self.processes) for n in range(self.processes))}
        for name in self.files:
            if name not in expected and name != OPTIMISER and not WHOLE.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is not the name of a checkpoint's file")
        for name in sorted(expected - self.files.keys())[:1]:
            raise ValueError(f"{name[:80]!r} is not among the files")
        return self

    def text(self) -> str:
        """The JSON text with its seal."""
        content = storable(self.model_dump(by_alias=True, exclude={"seal"}))
        return json.dumps(content | {"seal": _seal(content)}, indent=1)


def shard_file(part: str, number: int, processes: int) -> str:
    """The file with a rank's shard of a part."""
    return f"{part}-{number + 1:05d}-of-{processes:05d}.safetensors"


def part_of(file: str) -> str:
    """The part that a file, or a shard, belongs to."""
    match = SHARD.fullmatch(file)
    return match["part"] if match else file.partition(".")[0]


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:09d}"


def read_manifest(folder: Path) -> Manifest:
    """Reads and validates the manifest of a checkpoint's folder.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not what a run wrote into a folder of this name.
    """
    if folder.is_symlink():
        raise ValueError("it is a link, not a folder")
    manifest = read_model(folder / FILE, Manifest)
    if manifest.seal != _seal(manifest.model_dump(by_alias=True, exclude={"seal"})):
        raise ValueError(f"{FILE} is not what was written")
    if folder.name.partition(".")[0] != folder_name(manifest.step):
        raise ValueError(f"{FILE} is that of step {manifest.step:,}")
    return manifest.model_copy(update={"metadata": restored(manifest.metadata)})


def read_model(file: Path, model: type[M]) -> M:
    """Reads a JSON file strictly as a model.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no regular file, larger than any that is written, or of another form.
    """
    _regular_size(file)
    try:
        return model.model_validate_json(read_bytes(file, MAX_BYTES))
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False, include_context=False)[0]
        key = f", at {'.'.join(map(str, first['loc']))[:80]!a}" if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{file.name} is not of the form that is written: {message}{key}") from None


def _regular_size(file: Path) -> int:
    """The size of a file; refuses links and pipes."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.name} is no regular file")
    return status.st_size


def verify(file: Path, known: File) -> None:
    """Raises ValueError for a file of another size or hash, and OSError if it cannot be read."""
    size = _regular_size(file)
    if size != known.bytes:
        raise ValueError(f"{file.name} has {size:,} bytes, not the {known.bytes:,} that were written")
    if sha256(file) != known.sha256:
        raise ValueError(f"{file.name} is not what was written")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
