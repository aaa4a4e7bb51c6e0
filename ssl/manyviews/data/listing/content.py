"""What images hold, by digests that all processes have; each file is read by one of them."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from manyviews.data.decoding.decode import UnreadableImageError
from manyviews.data.decoding.files import in_threads, open_image
from manyviews.data.images import Report
from manyviews.data.listing.digests import DIGEST, DigestCache, Digests, Rows, State, digest
from manyviews.system import distributed
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.files import shown


def digests_of(
    root: Path,
    states: Rows,
    failed: dict[int, str],
    opener: Callable[[int], tuple[BinaryIO, State]],
    workers: int,
    report: Report | None,
) -> Digests:
    """The digests [images, 16] of files: from the cache, or else read, each by one process; collective.

    Args:
        root: the folder that they lie in.
        states: of each file its `State` [images, 5]; that of a file that is read is brought up to date.
        failed: the files that are left out, the same on every process; what cannot be read is added.
        opener: opens a file by its number.
        workers: threads.
        report: hears how many of the files that this process reads are done.
    """
    known = DigestCache(root)
    digests, there = known.look_up(states)
    there[list(failed)] = True
    # What any process lacks is read, and given to all.
    lacking = [
        np.unpackbits(np.frombuffer(mask, np.uint8), count=len(states)) for mask in _from_all(np.packbits(~there))
    ]
    missing = np.bitwise_or.reduce(lacking).nonzero()[0]
    mine = missing[distributed.share(len(missing))]
    began = time.time_ns()

    def visit(position: int) -> None:
        image = int(mine[position])
        try:
            file, states[image] = opener(image)
            with file:
                digests[image] = np.frombuffer(digest(file), np.uint8)
        except (OSError, ValueError) as problem:
            raise UnreadableImageError(root, str(problem)) from problem

    failures = in_threads(visit, len(mine), workers, report, "hashing")
    whole = np.array([position for position in range(len(mine)) if position not in failures], np.int64)
    known.keep(states[mine[whole]], digests[mine[whole]], began)
    digests[missing] = np.frombuffer(b"".join(_from_all(digests[mine])), np.uint8).reshape(-1, DIGEST)
    failed |= shared({int(mine[position]): reason for position, reason in failures.items()})
    return digests


def file_digests(folder: Path, names: Sequence[str], workers: int, report: Report | None) -> Digests:
    """The digests [files, 16] of a few large files of a folder; collective.

    Raises:
        ValueError: naming one that cannot be read.
    """

    def opener(number: int) -> tuple[BinaryIO, State]:
        return open_image(folder, names[number], follow_links=True)

    states, failed = np.zeros((len(names), len(State._fields)), np.int64), dict[int, str]()
    with raise_on_all_ranks():
        for number in range(len(names)):
            file, states[number] = opener(number)
            file.close()
    digests = digests_of(folder, states, failed, opener, workers, report)
    for number, reason in failed.items():
        raise ValueError(f"{folder / names[number]} cannot be read: {reason}")
    return digests


def shared(failures: dict[int, str]) -> dict[int, str]:
    """The files that any process cannot read, with the first one's reason, in order; collective."""
    found: dict[int, str] = {}
    for own in distributed.all_gather_object(failures):
        found = own | found
    return dict(sorted(found.items()))


def refuse_differences(folder: str, does: str, mark: str) -> None:
    """Raises a ValueError on all processes where one of them sees other images than the first; collective.

    Ids would mean other images there. The mark is that of what this process sees.
    """
    everywhere = distributed.all_gather_object(mark)
    others = [str(number) for number, other in enumerate(everywhere) if other != everywhere[0]]
    if others:
        raise ValueError(
            f"{shown(folder)} is not the same for all processes: process {', '.join(others)} {does} other images there "
            "than process 0; copy it anew to that machine, or name a folder that all machines share"
        )


def _from_all(own: Digests) -> list[bytes]:
    return distributed.all_gather_object(own.tobytes())
