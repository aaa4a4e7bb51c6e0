"""The run folder: configuration, metrics and curves, safe from full disks and crashes."""

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
from manyviews.system import distributed
from manyviews.system.append_file import MOST_KEPT, AppendFile
from manyviews.system.disk import check_writable
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.files import LONGEST_LINE, check_links, open_lines, open_regular, shown
from manyviews.system.folder_lock import LOCK
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, open_new, remove, write_atomic

CONFIG, METRICS, CHECKPOINTS, DONE = "config.yaml", "metrics.jsonl", "checkpoints", "done"
CLASSIFIER = "classifier"
"""The export of fine-tuning, instead of a backbone."""
FOLDERS = ("backbone", CHECKPOINTS, CLASSIFIER, "tensorboard")
UNREADABLE, INVENTORY = "unreadable.txt", "images.jsonl"
VIEWS, SAMPLING = "views", "sampling"
"""Names of pictures."""
HISTOGRAM_BINS = 100
START = ".start-"
SMALL = (CONFIG, UNREADABLE, f"{VIEWS}.png")
"""Files that are rewritten if another program removes them during the run."""
MOST_NAMED = 5
"""Lines of metrics.jsonl that a warning names."""


class Run:
    """The run folder as rank 0 writes it: configuration, metrics and TensorBoard events.

    A full disk does not end a run: lines are buffered, with one warning, until there is room. Metrics and curves after
    `step`, that of the resumed checkpoint, are dropped; 0 is a new run. `lock_again` is called after the folder had to
    be created again, because another program has removed it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int = 0,
        warn: Callable[[str], object] = warnings.warn,
        lock_again: Callable[[], object] = lambda: None,
    ) -> None:
        self.folder, metrics = folder, folder / METRICS
        self._warn, self._lock_again = warn, lock_again
        for name in (*SMALL, INVENTORY, METRICS, DONE, f"{SAMPLING}.png", f"{SAMPLING}.json"):
            for left in folder.glob(f".{name}.*.partial"):
                remove(left)
        if metrics.exists() or metrics.is_symlink():
            rubbish: list[int] = []
            # A new run keeps none, not even of step 0, which it measures again.
            write_atomic(metrics, _kept_lines(metrics, step or -1, rubbish))
            if rubbish:
                named, others = ", ".join(f"{line:,}" for line in rubbish[:MOST_NAMED]), len(rubbish) - MOST_NAMED
                lines = f"line{'s' * (len(rubbish) > 1)} {named}{f' and {others:,} more' if others > 0 else ''}"
                warn(f"{shown(metrics)}: removed {lines}, which held no metrics")
        elif step:
            warn(f"{shown(metrics)} is missing: the metrics up to step {step:,} are lost")
        # Before the metrics: this creates the folder.
        self._curves = Curves(folder / "tensorboard", folder, step, warn)
        self._metrics = AppendFile(metrics, folder, warn)
        small = [folder / name for name in SMALL if (folder / name).is_file()]
        self._small = {file.name: file.read_bytes() for file in small if file.stat().st_size <= MOST_KEPT}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line to metrics.jsonl (NaN as null) and a point to each TensorBoard curve."""
        values = {key: float(value) for key, value in values.items()}
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._metrics.write((json.dumps({"step": step, **line}) + "\n").encode())
        self._restore()
        for key, value in values.items():
            self._curves.show(summary.scalar(key, value), step)

    def text(self, name: str, text: str) -> None:
        """Writes a text to TensorBoard."""
        self._curves.show(summary.text(name, f"```\n{text}\n```"), 0)

    def picture(self, name: str, picture: Tensor, step: int = 0) -> None:
        """Writes a picture (uint8, [3, height, width]) to NAME.png and to TensorBoard."""
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

    def keep(self, name: str, text: str) -> None:
        """Writes a small file of the run; one that cannot be written is a warning."""
        try:
            write_atomic(self.folder / name, [f"{text}\n".encode()])
        except OSError as problem:
            self._warn(f"{self.folder / name} could not be written: {problem}")

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Writes a histogram of the finite values to TensorBoard."""
        values = values.float().cpu()
        values = values[values.isfinite()]
        if len(values):
            self._curves.show(summary.histogram(name, values, HISTOGRAM_BINS), step)

    def sync(self) -> None:
        """Returns once all lines and points are on the disk; from any thread.

        Raises:
            OSError: if metrics cannot be written; after a resume they would be missing.
        """
        self._metrics.sync()
        self._restore()
        self._curves.file.flush()
        with suppress(OSError):
            self._curves.file.sync()

    def unreadable(self, text: str) -> None:
        """Adds lines to unreadable.txt, if the disk takes them: each was warned of."""
        whole = self._small.get(UNREADABLE, b"") + text.encode()
        with suppress(OSError):
            write_atomic(self.folder / UNREADABLE, [whole])
        self._small[UNREADABLE] = whole

    def close(self) -> None:
        """Closes the files; the run can still be resumed."""
        self._metrics.close()
        self._curves.file.close()

    def finish(self, exported: Path, needed: Sequence[Path] = ()) -> None:
        """Closes the files, syncs the `exported` folder and writes `done`.

        Raises:
            OSError: if a file of the run, or one of `needed`, is missing or incomplete; `done` is not written then.
        """
        self._restore()
        self.close()
        for file in (*filter(Path.is_file, exported.iterdir()), exported):
            sync(file)
        files = (self._metrics, self._curves.file)
        lacking = [f"{shown(file.path)} lacks {plural(file.lost, 'byte')}" for file in files if file.lost]
        needed = (*(file.path for file in files), *(self.folder / name for name in self._small), *needed)
        lacking += [f"{shown(path)} is missing" for path in needed if not path.exists()]
        if lacking:
            raise OSError(f"the run is at its end, but not complete: {'; '.join(lacking)}; {DONE} is not written")
        write_atomic(self.folder / DONE, [f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n".encode()])

    def _restore(self) -> None:
        """Rewrites small files that another program has removed; tries again later where that fails."""
        gone = [name for name in self._small if not (self.folder / name).exists()]
        with suppress(OSError):
            for name in gone:
                make_folder(self.folder, self.folder)
                write_atomic(self.folder / name, [self._small[name]])
                self._warn(
                    f"{shown(self.folder / name)} was removed or renamed by another program: it is written again"
                )
            if gone:
                self._lock_again()
        if lost := self._curves.lost():
            self._warn(
                f"{plural(lost, 'file')} of earlier curves removed from {shown(self.folder / 'tensorboard')} by "
                f"another program; {METRICS} has their numbers"
            )


def prepare(folder: Path, *, resume: bool) -> None:
    """Checks that a run may write to a folder; leaves no file; collective.

    Raises:
        ValueError: as `check_content`, and if it is not the same folder for all ranks.
    """
    with raise_on_all_ranks():
        check_content(folder, resume=resume)
    if distributed.world_size() > 1:
        _check_shared(folder)


def check_content(folder: Path, *, resume: bool) -> None:
    """Checks that a folder is writable and new, empty, or with `resume` that of a run.

    Raises:
        ValueError: if it is not.
    """
    check_writable(folder)
    # The hidden files of a failed start may be lost.
    if not folder.is_dir() or all(entry.name.startswith((LOCK, START)) for entry in folder.iterdir()):
        return
    state = "a finished run" if (folder / DONE).exists() else "a run" if (folder / CONFIG).exists() else "other files"
    if state == "other files":
        raise ValueError(f"output={folder} holds {state}; a run needs a folder of its own: name another with output=…")
    if not resume:
        raise ValueError(f"output={folder} holds {state}; add resume=true to continue it, or output=… for a new one")
    check_links(folder)
    for name in FOLDERS:
        if (folder / name).is_symlink():
            raise ValueError(
                f"{shown(folder / name)} is a symbolic link; a run writes into folders of its own: put what it leads "
                "to in its place"
            )


def _check_shared(folder: Path) -> None:
    start = distributed.all_gather_object(secrets.token_hex(8))[0]
    own = folder / f"{START}{start}-{distributed.rank()}"
    try:
        with raise_on_all_ranks():
            make_folder(folder, folder)
            open_new(own).close()
        absent = [
            str(rank) for rank in range(distributed.world_size()) if not (folder / f"{START}{start}-{rank}").exists()
        ]
        absent = distributed.all_gather_object(absent)[0]
    finally:
        remove(own)
    if absent:
        raise ValueError(
            f"output={folder} is not one folder for all {distributed.world_size()} processes: the first does not see "
            f"what processes {', '.join(absent)} write there; name a folder on a file system that all machines share"
        )


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of metrics.jsonl, oldest first."""
    with (folder / METRICS).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def read_unreadable(folder: Path) -> list[tuple[str, str]]:
    """The names, as `shown`, and reasons in unreadable.txt; empty without the file."""
    file = folder / UNREADABLE
    if not file.is_file():
        return []
    with open_lines(file) as lines:
        parts = [line.rstrip("\r\n").partition("\t") for line in lines]
    return [(name, reason) for name, _, reason in parts if name]


def _kept_lines(metrics: Path, step: int, rubbish: list[int]) -> Iterator[bytes]:
    """Yields the lines of metrics up to a step; adds other line numbers to `rubbish`.

    An incomplete last line, as an interrupted write leaves it, is dropped silently.
    """
    number = 0
    with open_regular(metrics) as file:
        while line := file.readline(LONGEST_LINE):
            number += 1
            whole = line.endswith(b"\n")
            while not whole and (rest := file.readline(LONGEST_LINE)):
                line, whole = b"", rest.endswith(b"\n")  # longer than any that is written
            at = _step_of(line)
            if at is None and whole:
                rubbish.append(number)
            elif at is not None and at <= step:
                yield line if whole else line + b"\n"


def _step_of(line: bytes) -> float | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(step) if type(step) in (int, float) and abs(step) < math.inf else None
