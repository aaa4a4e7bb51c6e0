"""Writing a checkpoint beside training: the copy is taken in a step, and a thread waits for the disk."""

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
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
        """How many saves have failed."""
        self._course: Iterator[_Work] | None = None
        self._work: _Work | None = None
        self._in_a_row = 0
        self._step = self._room = 0
        self._news: list[str] = []

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._course is not None

    def begin(self, checkpoint: Checkpoint, *, before: Callable[[], object] | None = None) -> None:
        """Copies a checkpoint and begins to write it, once the one that is being written is done.

        Args:
            checkpoint: what is written; it may change as soon as this returns.
            before: what the first process must have done before the checkpoint counts, such as syncing the metrics.
        """
        self.wait()
        self._step, self._room = checkpoint.step, room_needed(checkpoint, keep=0)
        self._course = self._writing(checkpoint, before)
        self._go_on()

    def poll(self) -> list[str]:
        """Goes on with what is being written if all processes can, without waiting; news that a person should hear."""
        if self._work is not None and not distributed.any_over_ranks(self._work.is_alive()):
            self._go_on()
        return self._take_news()

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        while self._work is not None:
            self._work.join()
            self._go_on()

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
            self._work.join(PATIENCE)
        if self._course is not None:
            self._course = self._work = None
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

    def _writing(self, checkpoint: Checkpoint, before: Callable[[], object] | None) -> Iterator["_Work"]:
        """The course of a save: what it yields must have ended on all processes before it goes on."""
        first = distributed.rank() == 0
        target = self.place / folder_name(checkpoint.step)
        aside = _aside(target)
        with raise_on_all_ranks():
            if first:
                make_folder(self.place, self.place.parent)
                tidy(self.place)
                make_folder(aside, self.place.parent, new=True)
        with raise_on_all_ranks():
            tensors, texts = copied(checkpoint)
        written = _Work(partial(write, aside, tensors, texts, before))
        # Of the copies only the thread knows, so that their memory goes when it ends.
        del tensors
        yield written
        with raise_on_all_ranks():
            own = written.outcome()
        files: dict[str, File] = {}
        for text in distributed.all_gather_strings(json.dumps({name: file.model_dump() for name, file in own.items()})):
            files |= {name: File(**values) for name, values in json.loads(text).items()}
        manifest = Manifest(
            step=checkpoint.step,
            processes=distributed.world_size(),
            shards=dict(checkpoint.shards),
            files=dict(sorted(files.items())),
            facts=dict(checkpoint.metadata),
        )
        published = _Work(partial(self._publish, aside, target, manifest) if first else dict)
        yield published
        with raise_on_all_ranks():
            published.outcome()

    def _go_on(self) -> None:
        assert self._course is not None
        self._work = None
        try:
            self._work = next(self._course)
        except StopIteration:
            self._settle(None)
        except FORESEEN as problem:
            self._settle(problem)
        except BaseException:
            self._course = None
            self._clear()
            raise

    def _settle(self, problem: Exception | None) -> None:
        """A save has ended, well or not."""
        self._course, self.problem = None, problem
        if problem is None:
            if self._in_a_row:
                news = f"the checkpoint of step {self._step:,} is written, after {self._in_a_row} that could not be"
                self._news.append(news)
            self._in_a_row = 0
            return
        self._clear()
        self.failures += 1
        self._in_a_row += 1
        if self._in_a_row == 1:
            news = f"{self._failure()}; training goes on, {self._what_stays()}, and the next one is tried in time"
            self._news.append(news)

    def _take_news(self) -> list[str]:
        news, self._news = self._news, []
        return news

    def _failure(self) -> str:
        try:
            lacking = self._room - shutil.disk_usage(self.place).free
        except OSError:
            lacking = 0
        room = f" (it takes {_megabytes(self._room)}, and {_megabytes(lacking)} are missing)" if lacking > 0 else ""
        return f"the checkpoint of step {self._step:,} could not be written: {self.problem}{room}"

    def _what_stays(self) -> str:
        there = steps(self.place)
        return f"{there[-1].name} stays" if there else "there is none before it"

    def _publish(self, aside: Path, target: Path, manifest: Manifest) -> None:
        publish(aside, target, manifest)
        rotate(target, keep=self.keep, keep_best=self.keep_best)

    def _clear(self) -> None:
        if distributed.rank() == 0:
            with suppress(OSError):
                remove(_aside(self.place / folder_name(self._step)), self.place.parent)


class _Work(threading.Thread):
    """What a thread does beside training, and what came of it."""

    def __init__(self, work: Callable[[], dict[str, Any] | None]) -> None:
        # A second Ctrl-C ends the run at once: nothing waits for the disk then.
        super().__init__(name="checkpoint", daemon=True)
        self._work: Callable[[], dict[str, Any] | None] | None = work
        self._result: dict[str, Any] = {}
        self._problem: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Does the work; the thread's own method."""
        assert self._work is not None
        try:
            self._result = self._work() or {}
        except BaseException as problem:
            self._problem = problem
        self._work = None

    def outcome(self) -> dict[str, Any]:
        """What was returned, or raises what was raised."""
        if self._problem is not None:
            raise self._problem
        return self._result


def check_finite(named: Mapping[str, Tensor], step: int, place: Path) -> None:
    """Refuses weights of which a number is not finite, so that none is written over a sound checkpoint; collective.

    Args:
        named: the weights, and what else must be finite, by name.
        step: the updates that led to them.
        place: the folder of checkpoints, for the advice.

    Raises:
        ValueError: naming what is not finite, on all processes.
    """
    floating = {key: value.detach() for key, value in named.items() if value.is_floating_point() and value.numel()}
    # One answer from the device for all of them.
    finite = torch.stack([value.isfinite().all() for value in floating.values()]).tolist() if floating else []
    bad = [key for key, sound in zip(floating, finite, strict=True) if not sound]
    told = [text for text in distributed.all_gather_strings(", ".join(bad[:3])) if text]
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


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
