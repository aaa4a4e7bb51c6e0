"""The manifest: what the folder of a checkpoint must hold, read as if a stranger had written it."""

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from manyviews.system.files import read_bytes, sha256
from manyviews.system.path_bytes import restored, storable

FILE = "manifest.json"
OPTIMISER = "optimiser.json"
"""What an optimiser keeps beside tensors: its groups, and numbers such as a count of steps."""
MAX_BYTES = 1 << 23
"""Of a JSON file: more than any that is written, and read in a moment."""
MAX_ENTRIES = 1 << 16
MAX_PROCESSES = 1 << 14
PART = r"(?P<part>[a-z_]{1,40})"
WHOLE = re.compile(rf"{PART}\.safetensors")
SHARD = re.compile(rf"{PART}-\d{{5}}-of-\d{{5}}\.safetensors")
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
M = TypeVar("M", bound=BaseModel)


def few(value: Any) -> Any:
    """Refuses a collection of very many before each of them is judged, which would fill the memory with complaints."""
    if isinstance(value, list | dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"{len(value):,} entries, and at most {MAX_ENTRIES:,} are read")
    return value


class File(BaseModel):
    """What a file is known by."""

    model_config = STRICT

    bytes: int = Field(ge=0, le=1 << 50)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a checkpoint says of itself: which files it has, of which size and content, and the metadata of the run."""

    model_config = STRICT

    step: int = Field(ge=0, lt=10**9)
    processes: int = Field(ge=1, le=MAX_PROCESSES)
    """How many wrote it."""
    shards: Annotated[dict[str, Annotated[int, Field(ge=0, le=1 << 48)]], BeforeValidator(few)]
    files: Annotated[dict[str, File], BeforeValidator(few)]
    metadata: dict[str, JsonValue] = Field(alias="facts")
    """Called `facts` on the disk."""
    seal: str = ""
    """The hash of all the rest."""

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
        """The text of its file, sealed: a change of any value is found."""
        content = storable(self.model_dump(by_alias=True, exclude={"seal"}))
        return json.dumps(content | {"seal": _seal(content)}, indent=1)


def shard_file(part: str, number: int, processes: int) -> str:
    """The file in which a process keeps what it alone holds of a part."""
    return f"{part}-{number + 1:05d}-of-{processes:05d}.safetensors"


def part_of(file: str) -> str:
    """The part that a file belongs to, its shards included."""
    match = SHARD.fullmatch(file)
    return match["part"] if match else file.partition(".")[0]


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:09d}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder, judged in every respect before any other file is opened.

    Raises:
        OSError: if it cannot be read.
        ValueError: in words, if it is not what a run wrote into a folder of this name.
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
    """A JSON file as a model, strictly.

    Raises:
        OSError: if it cannot be read.
        ValueError: in words, if it is no regular file, is larger than any that is written, or is of another form.
    """
    size = regular_size(file)
    if size > MAX_BYTES:
        raise ValueError(f"{file.name} has {size:,} bytes, and at most {MAX_BYTES:,} are read")
    try:
        return model.model_validate_json(read_bytes(file, MAX_BYTES))
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False, include_context=False)[0]
        place = f", at {'.'.join(map(str, first['loc']))[:80]!a}" if first["loc"] else ""
        words = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{file.name} is not of the form that is written: {words}{place}") from None


def regular_size(file: Path) -> int:
    """The size of a file that must be one itself: a link could lead anywhere, and a pipe would never end."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.name} is no regular file")
    return status.st_size


def verify(file: Path, known: File) -> None:
    """Refuses a file that is not the one that was written; its size is looked at first.

    Raises:
        OSError: if it cannot be read.
        ValueError: in words, if it is another.
    """
    size = regular_size(file)
    if size != known.bytes:
        raise ValueError(f"{file.name} has {size:,} bytes, not the {known.bytes:,} that were written")
    if sha256(file) != known.sha256:
        raise ValueError(f"{file.name} is not what was written")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
