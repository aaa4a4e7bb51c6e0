"""The run folder: what a run writes, how it is resumed, and how it never loses what it has."""

import io
import json
import math
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import summary

from manyviews.run.checkpoints import sync
from manyviews.run.curves import Curves
from manyviews.run.metrics_lines import in_words, kept_lines
from manyviews.system import distributed
from manyviews.system.append_file import MOST_KEPT, Growing
from manyviews.system.disk import check_writable
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.files import check_links, open_lines, shown
from manyviews.system.folder_lock import LOCK
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, open_new, remove, write_atomic

CONFIG, METRICS, CHECKPOINTS, DONE = "config.yaml", "metrics.jsonl", "checkpoints", "done"
CLASSIFIER = "classifier"
"""What a fine-tuned run has in place of a backbone."""
FOLDERS = ("backbone", CHECKPOINTS, CLASSIFIER, "tensorboard")
"""What a run makes in its folder."""
UNREADABLE, INVENTORY = "unreadable.txt", "images.jsonl"
VIEWS = "views"
HISTOGRAM_BINS = 100
START = ".start-"
SMALL = (CONFIG, UNREADABLE, f"{VIEWS}.png")
"""Files that are written again where another program removes them during the run."""


class Run:
    """A folder that the first process writes: the configuration, metrics and TensorBoard events.

    A disk that is full never ends a run: what cannot be written is kept, told of once, and written when there is room.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int = 0,
        warn: Callable[[str], object] = warnings.warn,
        lock_again: Callable[[], object] = lambda: None,
    ) -> None:
        """Opens the folder to write on from a step.

        What a run that was cut off has written of later steps is dropped: its lines of metrics and, by an event that
        TensorBoard knows, its points in the curves.

        Args:
            folder: the run folder.
            step: that of the checkpoint that is gone on from; 0: the run begins.
            warn: hears that something cannot be written.
            lock_again: called once the folder had to be made anew, as another program has removed it.
        """
        self.folder, metrics = folder, folder / METRICS
        self._warn, self._lock_again = warn, lock_again
        for name in (*SMALL, INVENTORY, METRICS, DONE):
            for left in folder.glob(f".{name}.*.partial"):
                remove(left)
        if metrics.exists() or metrics.is_symlink():
            rubbish: list[int] = []
            # What begins anew keeps none, not even of step 0, which it measures again.
            write_atomic(metrics, kept_lines(metrics, step or -1, rubbish))
            if rubbish:
                warn(f"{shown(metrics)}: removed {in_words(rubbish)}, for want of metrics")
        elif step:
            warn(f"{shown(metrics)} is missing: the metrics up to step {step:,} are lost")
        # Before the metrics: their folder may have to be made.
        self._curves = Curves(folder / "tensorboard", folder, step, self._save_what_can_be)
        self._metrics = Growing(metrics)
        there = [folder / name for name in SMALL if (folder / name).is_file()]
        self._small = {file.name: file.read_bytes() for file in there if file.stat().st_size <= MOST_KEPT}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and one point to each TensorBoard curve; NaN is written as null."""
        values = {key: float(value) for key, value in values.items()}
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._metrics.write((json.dumps({"step": step, **line}) + "\n").encode())
        self._save_what_can_be(self._metrics)
        self._restore()
        for key, value in values.items():
            self._curves.show(summary.scalar(key, value), step)

    def text(self, name: str, text: str) -> None:
        """Writes a text to TensorBoard."""
        self._curves.show(summary.text(name, f"```\n{text}\n```"), 0)

    def picture(self, name: str, picture: Tensor, step: int = 0) -> None:
        """Writes a picture, uint8 [3, height, width], to `name.png` in the folder and to TensorBoard."""
        file = self.folder / f"{name}.png"
        content = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(content, "PNG")
        try:
            write_atomic(file, [content.getvalue()])
            if file.name in SMALL:
                self._small[file.name] = content.getvalue()
        except OSError as problem:
            self._warn(f"{file} could not be written: {problem}")
        self._curves.show(summary.image(name, picture, dataformats="CHW"), step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Writes how some values are distributed to TensorBoard."""
        values = values.float().cpu()
        values = values[values.isfinite()]
        if len(values):
            self._curves.show(summary.histogram(name, values, HISTOGRAM_BINS), step)

    def sync(self) -> None:
        """Returns once all lines and points are on the disk; a checkpoint counts only after that.

        From any thread, beside those who log.

        Raises:
            OSError: if metrics cannot be written; after a resume they would be missing.
        """
        if news := self._metrics.sync():
            self._warn(news)
        self._restore()
        self._save_what_can_be(self._curves.file)
        with suppress(OSError):
            self._curves.file.sync()

    def unreadable(self, text: str) -> None:
        """Adds lines to unreadable.txt; a disk that does not take them ends nothing, for each was warned of."""
        whole = self._small.get(UNREADABLE, b"") + text.encode()
        with suppress(OSError):
            write_atomic(self.folder / UNREADABLE, [whole])
        self._small[UNREADABLE] = whole

    def close(self) -> None:
        """Closes the files; the run can still be resumed."""
        for file in (self._metrics, self._curves.file):
            self._save_what_can_be(file)
            before = file.lost
            file.close()
            if file.lost > before:
                self._warn(f"{plural(file.lost - before, 'byte')} are missing at the end of {file.path}")

    def finish(self, exported: Path, needed: Sequence[Path] = ()) -> None:
        """Closes the files and writes `done`, the last thing a run that is complete ever writes.

        What was exported is on the disk before it.

        Args:
            exported: the folder of what is published.
            needed: what else must be there.

        Raises:
            OSError: if a file of the run is missing or incomplete, naming it; `done` is not written then.
        """
        self._restore()
        self.close()
        for file in (*filter(Path.is_file, exported.iterdir()), exported):
            sync(file)
        files = (self._metrics, self._curves.file)
        lacking = [f"{shown(file.path)} lacks {plural(file.lost, 'byte')}" for file in files if file.lost]
        there = (*(file.path for file in files), *(self.folder / name for name in self._small), *needed)
        lacking += [f"{shown(path)} is missing" for path in there if not path.exists()]
        if lacking:
            raise OSError(f"the run is at its end, but not complete: {'; '.join(lacking)}; {DONE} is not written")
        write_atomic(self.folder / DONE, [f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n".encode()])

    def _save_what_can_be(self, file: Growing) -> None:
        """Writes what a file keeps; warns when that begins to fail."""
        before = file.failing
        try:
            if news := file.flush():
                self._warn(news)
        except OSError as problem:
            if not before:
                self._warn(f"{file.path} cannot be written ({problem}): its lines are kept until they can be")

    def _restore(self) -> None:
        """Writes small files again that another program has removed, and says so; what cannot be is tried again."""
        gone = [name for name in self._small if not (self.folder / name).exists()]
        with suppress(OSError):
            for name in gone:
                make_folder(self.folder, self.folder)
                write_atomic(self.folder / name, [self._small[name]])
                self._warn(f"{shown(self.folder / name)} was removed or renamed by another program: it is written anew")
            if gone:
                self._lock_again()
        if lost := self._curves.lost():
            self._warn(
                f"{plural(lost, 'file')} of earlier curves removed from {shown(self.folder / 'tensorboard')} by "
                f"another program; {METRICS} has their numbers"
            )


def prepare(folder: Path, *, resume: bool) -> None:
    """Checks that a run may be written here, before anything is done; leaves no file.

    All processes call it together: each must see the same folder, for each writes its part of a checkpoint there.

    Raises:
        ValueError: if the folder holds anything and `resume` is false, if it holds something else than a run, or if it
            is not the same folder for all processes.
    """
    with raise_on_all_ranks():
        check_content(folder, resume=resume)
    if distributed.world_size() > 1:
        _check_shared(folder)


def check_content(folder: Path, *, resume: bool) -> None:
    """Checks that a folder is none, empty, or with `resume` a run's, without links out of it.

    Raises:
        ValueError: it is not, or cannot be written to.
    """
    check_writable(folder)
    # Hidden files of a start that came no further are nothing that could be lost.
    if not folder.is_dir() or all(entry.name.startswith((LOCK, START)) for entry in folder.iterdir()):
        return
    state = "a finished run" if (folder / DONE).exists() else "a run" if (folder / CONFIG).exists() else "other files"
    if state == "other files":
        raise ValueError(f"output={folder} holds {state}; a run needs a folder of its own: name another with output=…")
    if not resume:
        raise ValueError(f"output={folder} holds {state}; add resume=true to go on with it, or output=… for a new one")
    # What is written and removed from here on stays inside.
    check_links(folder)
    for name in FOLDERS:
        if (folder / name).is_symlink():
            raise ValueError(
                f"{shown(folder / name)} is a symbolic link; a run writes into folders of its own: put what it leads "
                "to in its place"
            )


def _check_shared(folder: Path) -> None:
    """Every process leaves a token of this start, and the first one must find all of them."""
    start = distributed.all_gather_object(secrets.token_hex(8))[0]
    own = folder / f"{START}{start}-{distributed.rank()}"
    try:
        with raise_on_all_ranks():
            make_folder(folder, folder)
            open_new(own).close()
        there = [(folder / f"{START}{start}-{number}").exists() for number in range(distributed.world_size())]
        seen = distributed.all_gather_object(there)[0]
    finally:
        remove(own)
    absent = [str(number) for number, found in enumerate(seen) if not found]
    if absent:
        raise ValueError(
            f"output={folder} is not one folder for all {distributed.world_size()} processes: the first does not see "
            f"what processes {', '.join(absent)} write there; name a folder on a file system that all machines share"
        )


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first."""
    with (folder / METRICS).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def read_unreadable(folder: Path) -> list[tuple[str, str]]:
    """The names, as lines show them, and the reasons in a run's unreadable.txt; none where there is none."""
    file = folder / UNREADABLE
    if not file.is_file():
        return []
    with open_lines(file) as lines:
        parts = [line.rstrip("\r\n").partition("\t") for line in lines]
    return [(name, reason) for name, _, reason in parts if name]
