"""Images that rank 0 finds for all ranks, and a check that all see the same files."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manyviews.data.decoding.files import Files, digest, open_image
from manyviews.data.images import Images, InMemory, Split, fingerprint
from manyviews.system import distributed
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.files import shown
from manyviews.system.first_rank import from_first

COMPARED = 64
"""Files of each split that every rank reads, spread evenly over all."""
SENT = 1 << 26
"""Bytes of pixels that are sent at once."""


def for_all_ranks(find: Callable[[], Split]) -> Split:
    """Calls `find` on rank 0 and returns its result on all ranks; collective."""
    if distributed.world_size() == 1:
        return find()
    splits: list[Split] = []

    def sent() -> Split:
        splits.append(find())
        # Pixels are sent in parts: a pickle of all would take their memory again.
        return Split(*map(_without_pixels, splits[0]))

    split = from_first(sent)
    own = splits[0] if splits else split
    test = None if split.test is None else _with_pixels(split.test, own.test)
    return split._replace(train=_with_pixels(split.train, own.train), test=test)


def check_files(split: Split, root: Path, *, follow_links: bool) -> None:
    """Compares some files below `root` with those that rank 0 has listed; collective.

    Raises:
        ValueError: on all ranks, if a rank sees others; on a rank that does not see the cache of decoded images.
    """
    if distributed.world_size() == 1:
        return
    with raise_on_all_ranks():
        for images in (split.train, split.test):
            if isinstance(images, Files) and images.cache is not None:
                images.cache.open()
    marks = distributed.all_gather_object(fingerprint(_contents(split, root, follow_links)))
    others = [str(rank) for rank, other in enumerate(marks) if other != marks[0]]
    if others:
        raise ValueError(
            f"{shown(root)} is not the same for all processes: process {', '.join(others)} sees other images there "
            "than process 0; copy it anew to that machine, or name a folder that all machines share"
        )


def _without_pixels(part: Any) -> Any:
    if not isinstance(part, InMemory):
        return part
    return dataclasses.replace(part, pixels=part.pixels.new_empty(0, *part.pixels.shape[1:]))


def _with_pixels(images: Images, own: Images | None) -> Images:
    """Images in memory with their pixels, which rank 0 has in its `own`; collective."""
    if not isinstance(images, InMemory):
        return images
    pixels = images.pixels.new_empty(len(images.names), *images.pixels.shape[1:])
    if isinstance(own, InMemory) and len(own):
        pixels = own.pixels
    for part in pixels.split(max(1, SENT // pixels[0].numel())):
        # An array: a tensor would be sent with all of its memory.
        part.copy_(torch.from_numpy(from_first(part.numpy)))
    return dataclasses.replace(images, pixels=pixels)


def _contents(split: Split, root: Path, follow_links: bool) -> Iterator[str]:
    """The digests of some files of the inventory: as rank 0 knows them, and as another rank reads them."""
    lost = dict(split.unreadable)
    for names, digests in () if split.inventory is None else split.inventory.readable:
        for index in np.unique(np.linspace(0, len(names) - 1, COMPARED).astype(np.int64)).tolist():
            if (name := names[index]) in lost:
                continue
            content = digests[index].tobytes()
            if distributed.rank():
                try:
                    file, _ = open_image(root, name, follow_links=follow_links)
                    with file:
                        content = digest(file)
                except (OSError, ValueError):
                    content = b""
            yield content.hex()
