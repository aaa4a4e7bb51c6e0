"""The run folder: what a run writes, how it is resumed, and how it never loses what it has."""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

CONFIG, METRICS, DONE = "config.yaml", "metrics.jsonl", "done"


class Checkpoint(NamedTuple):
    """Everything that a run needs to go on as if it had never stopped.

    `parts` are state dictionaries by the name of their owner (encoder, objective, …); `optimiser` is an optimiser's
    state dictionary; `facts` are JSON values (seconds spent, fingerprint of the data, …).
    """

    step: int
    parts: Mapping[str, Mapping[str, Tensor]]
    optimiser: Mapping[str, Any]
    facts: Mapping[str, Any]


class Run:
    """A folder that is written by one process: the configuration, metrics, TensorBoard events and checkpoints."""

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        """Opens the folder to write on from a step; metrics of later steps, of a run that was cut off, are dropped."""
        self.folder = folder
        metrics = folder / METRICS
        if metrics.exists():
            kept = [line for line in metrics.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            _write_whole(metrics, "".join(kept))
        self._metrics = metrics.open("a")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and one point to each TensorBoard curve; NaN is written as null."""
        values = {key: float(value) for key, value in values.items()}
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._metrics.write(json.dumps({"step": step, **line}) + "\n")
        self._metrics.flush()
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def text(self, name: str, text: str) -> None:
        """Writes a text to TensorBoard."""
        self._writer.add_text(name, f"```\n{text}\n```", 0)

    def picture(self, name: str, picture: Tensor, step: int = 0) -> None:
        """Writes a picture, uint8 [3, height, width], to `name.png` in the folder and to TensorBoard."""
        Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(self.folder / f"{name}.png")
        self._writer.add_image(name, picture, step)
        self._writer.flush()

    def save(self, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
        """Writes a checkpoint beside the older ones, whole or not at all; then the oldest beyond `keep` go."""
        self._writer.flush()
        return save_checkpoint(self.folder / "checkpoints", checkpoint, keep=keep)

    def close(self) -> None:
        """Closes the files; the run can still be resumed."""
        self._metrics.close()
        self._writer.close()

    def finish(self) -> None:
        """Closes the files and writes `done`, the last thing a run that is complete ever writes."""
        self.close()
        _write_whole(self.folder / DONE, time.strftime("%Y-%m-%dT%H:%M:%S%z") + "\n")


def prepare(folder: Path, *, resume: bool) -> None:
    """Checks that a run may be written here, before anything is done; creates nothing.

    Raises:
        ValueError: if the folder holds anything and `resume` is false, or if it is complete already.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={folder} is a file; name a folder that does not exist yet")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    state = "a finished run" if (folder / DONE).exists() else "a run" if (folder / CONFIG).exists() else "other files"
    if state == "other files":
        raise ValueError(f"output={folder} holds {state}; a run needs a folder of its own: name another with output=…")
    if not resume:
        raise ValueError(f"output={folder} holds {state}; add resume=true to go on with it, or output=… for a new one")


def save_checkpoint(place: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Writes `place/step-…`: aside first, synced, then renamed; a cut at any moment leaves the older ones whole.

    Raises:
        ValueError: if `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least 1 checkpoint must stay, or nothing could be resumed")
    place.mkdir(parents=True, exist_ok=True)
    target = place / f"step-{checkpoint.step:09d}"
    aside = place / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for part, tensors in checkpoint.parts.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, aside / f"{part}.safetensors")
        torch.save(dict(checkpoint.optimiser), aside / "optimiser.pt")
        (aside / "facts.json").write_text(json.dumps(dict(checkpoint.facts), indent=1))
        files = {file.name: _digest(file) for file in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps({"step": checkpoint.step, "sha256": files}, indent=1))
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        _sync(place)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in sorted(place.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_checkpoint(place: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line in words about each newer one that is not."""
    skipped: list[str] = []
    for folder in sorted(place.glob("step-*"), reverse=True):
        try:
            return _read_checkpoint(folder), skipped
        except (OSError, ValueError, KeyError, SafetensorError, UnpicklingError) as problem:
            skipped.append(f"{folder.name} is damaged and was passed over: {problem}")
    return None, skipped


def _read_checkpoint(folder: Path) -> Checkpoint:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in manifest["sha256"].items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} is not what was written")
    parts = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    # weights_only: a checkpoint from elsewhere must not be able to run code.
    optimiser = torch.load(folder / "optimiser.pt", map_location="cpu", weights_only=True)
    return Checkpoint(manifest["step"], parts, optimiser, json.loads((folder / "facts.json").read_text()))


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first."""
    with (folder / METRICS).open() as lines:
        for line in lines:
            yield json.loads(line)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf  # a line that was cut off in the middle


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with suppress(PermissionError):  # Windows opens no folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_whole(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text)
    _sync(aside)
    aside.replace(file)
