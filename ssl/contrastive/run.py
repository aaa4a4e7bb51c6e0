"""The run folder: what a run writes, how it is resumed, and how it never loses what it has."""

import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from contrastive import distributed
from contrastive.checkpoints import Checkpoint, save_checkpoint, sync, together

CONFIG, METRICS, CHECKPOINTS, DONE = "config.yaml", "metrics.jsonl", "checkpoints", "done"
CLASSIFIER = "classifier"
"""What a fine-tuned run has in place of a backbone."""


class Run:
    """A folder that the first process writes: the configuration, metrics, TensorBoard events and checkpoints.

    Of a checkpoint every process writes a part: while the first one saves, the others call `save_checkpoint`.
    """

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

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Writes how some values are distributed to TensorBoard."""
        self._writer.add_histogram(name, values.float().cpu(), step)

    def save(self, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
        """Writes a checkpoint beside the older ones, whole or not at all; then the oldest beyond `keep` go."""
        self._writer.flush()
        return save_checkpoint(self.folder / CHECKPOINTS, checkpoint, keep=keep)

    def close(self) -> None:
        """Closes the files; the run can still be resumed."""
        self._metrics.close()
        self._writer.close()

    def finish(self) -> None:
        """Closes the files and writes `done`, the last thing a run that is complete ever writes."""
        self.close()
        _write_whole(self.folder / DONE, time.strftime("%Y-%m-%dT%H:%M:%S%z") + "\n")


def prepare(folder: Path, *, resume: bool) -> None:
    """Checks that a run may be written here, before anything is done; leaves no file.

    All processes call it together: each must see the same folder, for each writes its part of a checkpoint there.

    Raises:
        ValueError: if the folder holds anything and `resume` is false, if it holds something else than a run, or if it
            is not the same folder for all processes.
    """
    with together():
        _check_content(folder, resume=resume)
    if distributed.size() > 1:
        _check_shared(folder)


def _check_content(folder: Path, *, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={folder} is a file; name a folder that does not exist yet")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    state = "a finished run" if (folder / DONE).exists() else "a run" if (folder / CONFIG).exists() else "other files"
    if state == "other files":
        raise ValueError(f"output={folder} holds {state}; a run needs a folder of its own: name another with output=…")
    if not resume:
        raise ValueError(f"output={folder} holds {state}; add resume=true to go on with it, or output=… for a new one")


def _check_shared(folder: Path) -> None:
    """Every process leaves a token of this start, and the first one must find all of them."""
    start = distributed.texts(secrets.token_hex(8))[0]
    own = folder / f".start-{start}-{distributed.rank()}"
    try:
        with together():
            folder.mkdir(parents=True, exist_ok=True)
            own.touch()
        there = [(folder / f".start-{start}-{number}").exists() for number in range(distributed.size())]
        seen = json.loads(distributed.texts(json.dumps(there))[0])
    finally:
        own.unlink(missing_ok=True)
    absent = [str(number) for number, found in enumerate(seen) if not found]
    if absent:
        raise ValueError(
            f"output={folder} is not one folder for all {distributed.size()} processes: the first does not see what "
            f"processes {', '.join(absent)} write there; name a folder on a file system that all machines share"
        )


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


def _write_whole(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text)
    sync(aside)
    aside.replace(file)
