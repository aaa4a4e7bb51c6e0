"""Writing a checkpoint beside training: the copy is taken in a step, and a thread waits for the disk."""

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyviews.run.checkpoints.checkpoint import Checkpoint, room_needed
from manyviews.run.checkpoints.manifest import File, Manifest, folder_name
from manyviews.run.checkpoints.reading import steps, way_on
from manyviews.run.checkpoints.writing import copied, publish, rotate, scores, tidy, write
from manyviews.system import distributed
from manyviews.system.distributed import FORESEEN, raise_on_all_ranks
from manyviews.system.writing import make_folder, remove

PATIENCE = 5.0
"""Seconds that a run which an error ends still gives the thread that writes."""


class Saver:
    """Writes the checkpoints of a run, one at a time, while it goes on; all processes call each method together.

    `begin` copies what a process holds to the CPU, and a thread writes, syncs and hashes it. In each step `poll` agrees
    whether all processes have written; then the first one writes the manifest, syncs, and renames the folder into its
    place. Only after that older ones go: all but the newest and the best. A cut or a failure at any moment, on any
    process, leaves the older checkpoints whole; a save that fails leaves nothing behind, and the run goes on.
    """

    def __init__(self, place: Path, *, keep: int = 2, keep_best: bool = True) -> None:
        """Prepares to write `place/step-…`.

        Args:
            place: the folder of checkpoints, the same one for all processes.
            keep: how many of the newest stay.
            keep_best: whether the one with the highest score stays too.

        Raises:
            ValueError: if `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: at least 1 checkpoint must stay, or nothing could be resumed")
        self.place, self.keep, self.keep_best = place, keep, keep_best
        self.problem: Exception | None = None
        """Why the last save failed; None if it did not."""
        self.failures = 0
        """How many saves have failed since one did not."""
        self._saved = Checkpoint(0, {}, {}, {})
        """What is being written, or was last, without its tensors."""
        self._work: Future[dict[str, File] | None] | None = None
        """What a thread is doing: first it writes this process's files, then the first process's publishes them all."""
        self._room = 0
        self._news: list[str] = []

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._work is not None

    def begin(self, checkpoint: Checkpoint, *, before: Callable[[], object] | None = None) -> None:
        """Copies a checkpoint and begins to write it, once the one that is being written is done.

        Args:
            checkpoint: what is written; it may change as soon as this returns.
            before: what the first process must have done before the checkpoint counts, such as syncing the metrics.
        """
        self.wait()
        self._saved, self._room = checkpoint._replace(parts={}, optimiser={}), room_needed(checkpoint, keep=0)
        with self._failing():
            with raise_on_all_ranks():
                if distributed.rank() == 0:
                    make_folder(self.place, self.place.parent)
                    tidy(self.place)
                    make_folder(self._aside, self.place.parent, new=True)
            with raise_on_all_ranks():
                tensors, texts = copied(checkpoint)
            self._work = _in_a_thread(partial(write, self._aside, tensors, texts, before))

    def poll(self) -> list[str]:
        """Goes on with what is being written if all processes can, without waiting; news that a person should hear."""
        if self._work is not None and not distributed.any_over_ranks(not self._work.done()):
            self._go_on(self._work)
        return self._take_news()

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        while self._work is not None:
            wait([self._work])
            self._go_on(self._work)

    def finish(self) -> list[str]:
        """Waits, and raises if the last save failed: at the end of a run there is no other try; else the last news.

        Raises:
            OSError: saying why, and what stays.
            ValueError: if a shard has not the rows that are this process's part.
        """
        self.wait()
        if isinstance(self.problem, ValueError):
            raise self.problem
        if self.problem is not None:
            words = f"{self._failure()}; {self._what_stays()}; once it can be, resume=true goes on from there"
            raise OSError(words) from self.problem
        return self._take_news()

    def abandon(self) -> None:
        """Gives up what is being written, on this process alone: the others may not answer any more."""
        if self._work is not None:
            wait([self._work], PATIENCE)
            self._work = None
            self._clear()

    def improves(self, score: float, step: int) -> bool:
        """Whether the best of the checkpoints up to a step, as their manifests tell, has a lower score than this."""
        self.wait()
        found = scores(self.place, upto=folder_name(step)) if distributed.rank() == 0 else {}
        highest = distributed.from_first_rank(max(found.values(), default=-math.inf))
        return self.keep_best and score > highest

    def room_warning(self, checkpoint: Checkpoint) -> str | None:
        """What to say, on the first process, if the disk has too little room for all that will be there; else None.

        It waits for what is being written, as files come and go until then.

        Args:
            checkpoint: one as the run writes it, taken after a step.
        """
        self.wait()
        if distributed.rank() > 0:
            return None
        needed = room_needed(checkpoint, keep=self.keep + self.keep_best)
        try:
            there = sum(file.lstat().st_size for folder in steps(self.place) for file in folder.glob("*"))
            free = shutil.disk_usage(self.place.parent).free
        except OSError:  # another program has removed them; the run says so, and a warning is not worth its end
            return None
        if there + free >= needed:
            return None
        return (
            f"the checkpoints that stay, and one that is being written, will take {_megabytes(needed)}, and there are "
            f"{_megabytes(there + free)} in {self.place.parent}: make room, or keep fewer"
        )

    @property
    def _target(self) -> Path:
        return self.place / folder_name(self._saved.step)

    @property
    def _aside(self) -> Path:
        return self._target.with_name(f".{self._target.name}.partial")

    def _go_on(self, work: "Future[dict[str, File] | None]") -> None:
        """Publishes what all processes have written, or ends the save; their threads are done."""
        self._work = None
        with self._failing():
            with raise_on_all_ranks():
                own = work.result()
            if own is not None:
                manifest = self._manifest(own)
                self._work = _in_a_thread(partial(self._publish, manifest))
                return
            if self.failures:
                news = (
                    f"the checkpoint of step {self._saved.step:,} is written, after {self.failures} that could not be"
                )
                self._news.append(news)
            self.problem, self.failures = None, 0

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Notes a failure of the save, such as a full disk, and tells of the first; raises a fault of the program."""
        try:
            yield
        except BaseException as problem:
            self._work = None
            self._clear()
            if not isinstance(problem, FORESEEN):
                raise
            self.problem, self.failures = problem, self.failures + 1
            if self.failures == 1:
                news = f"{self._failure()}; training goes on, {self._what_stays()}, and the next one is tried in time"
                self._news.append(news)

    def _manifest(self, own: Mapping[str, File]) -> Manifest:
        """The manifest of the files that all processes have written; collective."""
        files: dict[str, File] = {}
        for text in distributed.all_gather_strings(json.dumps({name: file.model_dump() for name, file in own.items()})):
            files |= {name: File(**values) for name, values in json.loads(text).items()}
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

    def _take_news(self) -> list[str]:
        news, self._news = self._news, []
        return news

    def _failure(self) -> str:
        try:
            lacking = self._room - shutil.disk_usage(self.place).free
        except OSError:
            lacking = 0
        room = f" (it takes {_megabytes(self._room)}, and {_megabytes(lacking)} are missing)" if lacking > 0 else ""
        return f"the checkpoint of step {self._saved.step:,} could not be written: {self.problem}{room}"

    def _what_stays(self) -> str:
        there = steps(self.place)
        return f"{there[-1].name} stays" if there else "there is none before it"

    def _clear(self) -> None:
        if distributed.rank() == 0:
            with suppress(OSError):
                remove(self._aside, self.place.parent)


def _in_a_thread(work: Callable[[], Any]) -> "Future[Any]":
    """Does some work beside training; the work and what it holds go when it ends."""

    def run(work: Callable[[], Any]) -> None:
        try:
            done.set_result(work())
        except BaseException as problem:
            done.set_exception(problem)

    done: Future[Any] = Future()
    # No executor: it would wait for a disk that hangs when an error ends the run.
    threading.Thread(target=run, args=(work,), name="checkpoint", daemon=True).start()
    return done


def not_finite(named: Mapping[str, Tensor | None]) -> list[str]:
    """The names of tensors of which a number is not finite, with one answer from the device for all of them."""
    floating = {key: value.detach() for key, value in named.items() if value is not None and value.is_floating_point()}
    flags = [value.isfinite().all() for value in floating.values()]
    # A state may lie on the CPU in part: a scheduler's, or what is remembered of the images.
    device = next((flag.device for flag in flags if flag.device.type != "cpu"), torch.device("cpu"))
    finite = torch.stack([flag.to(device) for flag in flags]).tolist() if flags else []
    return [key for key, sound in zip(floating, finite, strict=True) if not sound]


def check_finite(named: Mapping[str, Tensor], step: int, place: Path) -> None:
    """Refuses weights of which a number is not finite, so that none is written over a sound checkpoint; collective.

    Args:
        named: the weights, and what else must be finite, by name.
        step: the updates that led to them.
        place: the folder of checkpoints, for the advice.

    Raises:
        ValueError: naming what is not finite, on all processes.
    """
    told = [text for text in distributed.all_gather_strings(", ".join(not_finite(named)[:3])) if text]
    if told:
        raise ValueError(
            f"after step {step:,} the weights are no longer finite ({told[0]}), and they are not saved; "
            f"{way_on(place)} with a lower rate or in fp32"
        )


def save_checkpoint(place: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Writes `place/step-…`, all processes together, and returns when it is done; a `Saver` writes beside training.

    Raises:
        ValueError: if `keep` is below 1, or a shard has not the rows that are this process's part.
        OSError: if a process cannot write, for want of space, say; on all processes.
    """
    saver = Saver(place, keep=keep)
    saver.begin(checkpoint)
    saver.finish()
    return place / folder_name(checkpoint.step)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
