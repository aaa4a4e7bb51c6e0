"""Writes checkpoints in the background: copies in a step, writes in a thread."""

import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from manyviews.run.checkpoints.checkpoint import Checkpoint, File, Manifest, folder_name, room_needed
from manyviews.run.checkpoints.reading import steps, way_on
from manyviews.run.checkpoints.writing import copied, publish, rotate, scores, tidy, write
from manyviews.system import distributed
from manyviews.system.background import in_a_thread
from manyviews.system.distributed import FORESEEN, raise_on_all_ranks
from manyviews.system.writing import make_folder, remove

PATIENCE = 5.0
"""Seconds that a failing run waits for the thread that writes."""


class Saver:
    """Writes checkpoints in the background, one at a time; all methods are collective.

    `begin` copies a rank's part to the CPU, and a thread writes, syncs and hashes it. `poll`, called in each step, lets
    rank 0 write the manifest and rename the folder once all ranks have written. Only then are older checkpoints
    removed, all but the newest and the best. A crash at any moment leaves the older checkpoints intact; a failed save
    leaves nothing behind, and the run continues. `folder` holds the `keep` newest checkpoints and, with `keep_best`,
    the one with the highest score; `warn` is called when a save fails, and when one succeeds again.

    Raises:
        ValueError: if `keep` is below 1.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        keep_best: bool = True,
        warn: Callable[[str], object] = warnings.warn,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least 1 checkpoint must stay, or nothing could be resumed")
        self.folder, self.keep, self.keep_best, self._warn = folder, keep, keep_best, warn
        self.problem: Exception | None = None
        """Why the last save failed; None if it succeeded."""
        self.failures = 0
        """Failed saves since the last successful one."""
        self._saved = Checkpoint(0, {}, {}, {})
        """The last checkpoint, without its tensors."""
        self._work: Future[dict[str, File] | None] | None = None
        """The thread's work: first writing this rank's files, then on rank 0 publishing all of them."""
        self._room, self._finishing = 0, False

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._work is not None

    def begin(self, checkpoint: Checkpoint, *, before: Callable[[], object] | None = None) -> None:
        """Waits for the previous checkpoint, copies this one and starts to write it.

        Rank 0 calls `before` ahead of publishing it, to sync the metrics.
        """
        self.wait()
        self._saved, self._room = checkpoint._replace(parts={}, optimiser={}), room_needed(checkpoint, keep=0)
        with self._failing():
            with raise_on_all_ranks():
                if distributed.rank() == 0:
                    make_folder(self.folder, self.folder.parent)
                    tidy(self.folder)
                    make_folder(self._aside, self.folder.parent, new=True)
            with raise_on_all_ranks():
                tensors, texts = copied(checkpoint)
            self._work = in_a_thread(partial(write, self._aside, tensors, texts, before))

    def poll(self) -> None:
        """Publishes the checkpoint if all ranks have written it; does not wait."""
        if self._work is not None and not distributed.any_over_ranks(not self._work.done()):
            self._go_on(self._work)

    def wait(self) -> None:
        """Waits until nothing is being written."""
        while self._work is not None:
            wait([self._work])
            self._go_on(self._work)

    def finish(self) -> None:
        """Waits for the last checkpoint of a run.

        Raises:
            OSError: if it could not be written, naming the reason and what stays.
            ValueError: if a shard does not have the rows of this rank's share.
        """
        self._finishing = True
        self.wait()
        self._finishing = False
        if isinstance(self.problem, ValueError):
            raise self.problem
        if self.problem is not None:
            raise OSError(
                f"{self._failure()}; {self._what_stays()}; solve this, and re-run with resume=true to continue"
            ) from self.problem

    def abandon(self) -> None:
        """Gives up the checkpoint being written; not collective, for ranks that do not respond."""
        if self._work is not None:
            wait([self._work], PATIENCE)
            self._work = None
            self._clear()

    def improves(self, score: float, step: int) -> bool:
        """Whether `score` is higher than that of all checkpoints up to a step."""
        self.wait()
        scored = scores(self.folder, upto=folder_name(step)) if distributed.rank() == 0 else {}
        highest = distributed.from_first_rank(max(scored.values(), default=-math.inf))
        return self.keep_best and score > highest

    def room_warning(self, checkpoint: Checkpoint) -> str | None:
        """A warning, on rank 0, if the disk has too little room for such checkpoints."""
        self.wait()
        if distributed.rank() > 0:
            return None
        needed = room_needed(checkpoint, keep=self.keep + self.keep_best)
        try:
            used = sum(file.lstat().st_size for folder in steps(self.folder) for file in folder.glob("*"))
            free = shutil.disk_usage(self.folder.parent).free
        except OSError:  # another program has removed them, of which `Run` warns
            return None
        if used + free >= needed:
            return None
        return (
            f"the checkpoints that stay, and one that is being written, will take {_megabytes(needed)}, and there are "
            f"{_megabytes(used + free)} in {self.folder.parent}: make room, or keep fewer"
        )

    @property
    def _target(self) -> Path:
        return self.folder / folder_name(self._saved.step)

    @property
    def _aside(self) -> Path:
        return self._target.with_name(f".{self._target.name}.partial")

    def _go_on(self, work: "Future[dict[str, File] | None]") -> None:
        """Starts publishing, or ends the save, once the threads of all ranks are done."""
        self._work = None
        with self._failing():
            with raise_on_all_ranks():
                own = work.result()
            if own is not None:
                manifest = self._manifest(own)
                self._work = in_a_thread(partial(self._publish, manifest))
                return
            if self.failures:
                self._warn(
                    f"the checkpoint of step {self._saved.step:,} is written, after {self.failures} that could not be"
                )
            self.problem, self.failures = None, 0

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Records a failed save and warns of the first; re-raises program errors."""
        try:
            yield
        except BaseException as problem:
            self._work = None
            self._clear()
            if not isinstance(problem, FORESEEN):
                raise
            self.problem, self.failures = problem, self.failures + 1
            if self.failures == 1 and not self._finishing:
                self._warn(
                    f"{self._failure()}; training continues, {self._what_stays()}, and the next save is tried in time"
                )

    def _manifest(self, own: Mapping[str, File]) -> Manifest:
        files: dict[str, File] = {}
        for written in distributed.all_gather_object(dict(own)):
            files |= written
        return Manifest(
            step=self._saved.step,
            processes=distributed.world_size(),
            shards=dict(self._saved.shards),
            files=dict(sorted(files.items())),
            facts=dict(self._saved.metadata),
        )

    def _publish(self, manifest: Manifest) -> None:
        if distributed.rank() == 0:
            publish(self._aside, self._target, manifest)
            rotate(self._target, keep=self.keep, keep_best=self.keep_best)

    def _failure(self) -> str:
        try:
            lacking = self._room - shutil.disk_usage(self.folder).free
        except OSError:
            lacking = 0
        room = f" (it takes {_megabytes(self._room)}, and {_megabytes(lacking)} are missing)" if lacking > 0 else ""
        return f"the checkpoint of step {self._saved.step:,} could not be written: {self.problem}{room}"

    def _what_stays(self) -> str:
        earlier = steps(self.folder)
        return f"{earlier[-1].name} stays" if earlier else "there is none before it"

    def _clear(self) -> None:
        if distributed.rank() == 0:
            with suppress(OSError):
                remove(self._aside, self.folder.parent)


def not_finite(named: Mapping[str, Tensor | None]) -> list[str]:
    """The names of the tensors with non-finite numbers; one synchronisation with the device."""
    floating = {key: value.detach() for key, value in named.items() if value is not None and value.is_floating_point()}
    flags = [value.isfinite().all() for value in floating.values()]
    # A state may lie on the CPU in part: a scheduler's, or what is remembered of the images.
    device = next((flag.device for flag in flags if flag.device.type != "cpu"), torch.device("cpu"))
    finite = torch.stack([flag.to(device) for flag in flags]).tolist() if flags else []
    return [key for key, sound in zip(floating, finite, strict=True) if not sound]


def check_finite(named: Mapping[str, Tensor], step: int, folder: Path) -> None:
    """Refuses to save non-finite weights after `step` updates; collective.

    Raises:
        ValueError: on all ranks, naming what is not finite and the newest checkpoint in `folder`.
    """
    if names := next(filter(None, distributed.all_gather_object(not_finite(named)[:3])), None):
        raise ValueError(
            f"after step {step:,} the weights are no longer finite ({', '.join(names)}), and they are not saved; "
            f"{way_on(folder)} with a lower rate or in fp32"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
