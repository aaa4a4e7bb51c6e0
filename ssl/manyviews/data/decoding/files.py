"""Images that are decoded when they are read, and the threads that read many at once."""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from manyviews.data.decoding.decode import Decoding, UnreadableImageError, quiet
from manyviews.data.images import Images, Names, Report
from manyviews.data.listing.digests import State, digest, state_of
from manyviews.system import distributed
from manyviews.system.files import open_beneath, open_regular, shown
from manyviews.system.plural import plural

logger = logging.getLogger(__name__)

CHUNK = 32
OTHER_FILE = "it is another file than when the run began, or was changed since"


def open_image(root: Path, name: str, *, follow_links: bool) -> tuple[BinaryIO, State]:
    """Opens an image below a folder, and tells its state; a link on the way is refused, or else followed.

    Raises:
        RefusedFileError: if it is behind a link that is not followed, or no regular file.
        OSError: if there is none, or it may not be read.
    """
    file = open_regular(root / name) if follow_links else open_beneath(root, name)
    return file, state_of(file)


@dataclass(frozen=True, eq=False)
class Files:
    """Images on disk; what cannot be decoded when its turn comes is grey, warned of and listed in `failed`.

    So is what has other content than when it was listed, and what is behind a link that was put there: what is learned
    from is what was looked at before the first step, or nothing. A file that was touched or copied anew is read once
    more, to see that its content is the same.
    """

    root: Path
    names: Names
    labels: Int64[Tensor, " images"] | None
    classes: tuple[str, ...]
    fingerprint: str
    decoding: Decoding
    max_bad: float
    workers: int = 0
    states: Int64[Tensor, "images 5"] | None = None
    """Of each file its `State` when it was last read; None where any will do."""
    digests: UInt8[Tensor, "images 16"] | None = None
    """Of each file the digest of its content; there where the states are."""
    follow_links: bool = True
    failed: dict[str, str] = field(default_factory=dict)
    """Of each file that has become unreadable, the reason."""
    reported: set[str] = field(default_factory=set)
    """Those of them that `newly_unreadable` has returned."""

    @property
    def channels(self) -> int:
        """Channels per pixel."""
        return self.decoding.channels

    @property
    def size(self) -> int:
        """Side of the square, in pixels."""
        return self.decoding.size

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, image: int) -> UInt8[Tensor, "channels size size"]:
        """One image; raises `UnreadableImageError` where the file is broken."""
        return self.decoding.read(self.root / self.names[image], partial(self._open, image))

    def _open(self, image: int) -> BinaryIO:
        file, state = open_image(self.root, self.names[image], follow_links=self.follow_links)
        if self.states is not None and self.digests is not None and list(state) != self.states[image].tolist():
            if digest(file) != self.digests[image].numpy().tobytes():
                file.close()
                raise ValueError(OTHER_FILE)
            self.states[image] = torch.tensor(state)
        return file

    def read(self, ids: Int64[Tensor, " batch"]) -> UInt8[Tensor, "batch channels size size"]:
        """The images of these ids, in their order, decoded by `workers` threads.

        Raises:
            ValueError: more than the share `max_bad` of all images have become unreadable.
        """
        # An inference tensor could not be written to by the threads, which are not in the caller's inference mode.
        with torch.inference_mode(mode=False):
            pixels = torch.full((len(ids), self.channels, self.size, self.size), 127, dtype=torch.uint8)
        images = ids.tolist()

        def visit(position: int) -> None:
            pixels[position] = self.decode(images[position])

        for position, reason in in_threads(visit, len(images), self.workers).items():
            self.note(self.names[images[position]], reason)
        return pixels

    def note(self, name: str, reason: str) -> None:
        """Remember an image that could be opened once and cannot be decoded now.

        Raises:
            ValueError: these are more than the share `max_bad` of all.
        """
        if name in self.failed:
            return
        self.failed[name] = reason
        logger.warning("%s cannot be decoded and is left out: %s", shown(self.root / name), reason)
        refuse_too_many(self.root, list(self.failed.items()), len(self), self.max_bad)


def newly_unreadable(images: Images) -> list[tuple[str, str]]:
    """Names and reasons of files that any process has found unreadable since this was last asked; collective."""
    if not isinstance(images, Files):
        return []
    own = {name: reason for name, reason in images.failed.items() if name not in images.reported}
    found: dict[str, str] = {}
    for failures in distributed.all_gather_object(own):
        found |= failures
    new = sorted((name, reason) for name, reason in found.items() if name not in images.reported)
    images.reported.update(name for name, _ in new)
    return new


def listed(unreadable: Iterable[tuple[str, str]]) -> str:
    """The lines of a run's unreadable.txt: a name as one line can hold it, a tab, and the reason."""
    return "".join(f"{shown(name)}\t{shown(reason)}\n" for name, reason in unreadable)


def in_threads(
    visit: Callable[[int], None], count: int, workers: int, report: Report | None = None, what: str = "reading"
) -> dict[int, str]:
    """Calls `visit` with 0 to `count - 1` in threads, and returns the reasons of those that were unreadable.

    Threads, not processes: decoding and resizing release Python's lock, and threads start at once, where processes
    first import PyTorch for some seconds, and write where the result is wanted. `report` hears how many are done.
    """
    failures: dict[int, str] = {}

    def chunk(start: int) -> int:
        positions = range(start, min(start + CHUNK, count))
        for position in positions:
            try:
                visit(position)
            except UnreadableImageError as error:
                failures[position] = error.reason
        return len(positions)

    def follow(numbers: Iterable[int]) -> None:
        for done in accumulate(numbers):
            if report is not None:
                report(what, done, count)

    starts = range(0, count, CHUNK)
    # Not in the thread that asks, for that may be the main one: a signal's exception, raised in the middle of a
    # decoder, can leave it as another one, and a sound file would be called broken.
    with quiet(), ThreadPoolExecutor(max(workers, 1), thread_name_prefix="decode") as pool:
        try:
            futures: list[Future[int]] = [pool.submit(chunk, start) for start in starts]
            follow(future.result() for future in as_completed(futures))
        except RuntimeError as problem:
            if "can't start new thread" not in str(problem):
                raise
            pool.shutdown(cancel_futures=True)
            follow(map(chunk, starts))
        finally:
            pool.shutdown(cancel_futures=True)
    return dict(sorted(failures.items()))


def refuse_too_many(root: Path, unreadable: list[tuple[str, str]], total: int, max_bad: float) -> None:
    """Raise a ValueError that lists the first unreadable files where they are more than the share `max_bad`."""
    if len(unreadable) <= max_bad * total:
        return
    lines = [f"  {shown(name)}: {reason}" for name, reason in unreadable[:10]]
    if len(unreadable) > len(lines):
        lines.append(f"  and {len(unreadable) - len(lines)} more")
    share = f"{len(unreadable)} of {plural(total, 'image')} in {shown(root)} cannot be read"
    share += f", more than data.max_bad={max_bad:g}"
    way_out = "Repair or remove them, or allow a larger share with data.max_bad"
    raise ValueError("\n".join([f"{share} allows:", *lines, way_out]))
