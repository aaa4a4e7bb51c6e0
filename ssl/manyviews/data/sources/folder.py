"""Any folder of images: nested or flat, of mixed sizes and formats."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from manyviews.data.decoding.decode import PILLOW_LIMIT, Decoding
from manyviews.data.decoding.files import (
    DIGEST,
    OTHER_FILE,
    Files,
    State,
    digest,
    in_threads,
    open_image,
    refuse_too_many,
)
from manyviews.data.decoding.jpeg import require_torchcodec
from manyviews.data.decoding.picture_cache import DECODER, SPLITS, PictureCache
from manyviews.data.images import Images, InMemory, Inventory, Names, Report, Split, fingerprint
from manyviews.data.listing.digests import Digests, Rows, digests_of
from manyviews.data.listing.discover import ReadSplit, discover
from manyviews.data.listing.listing import Listing
from manyviews.data.listing.one_rank import check_files, for_all_ranks
from manyviews.data.sources.paths import WORDS, FolderPath, LabelsSource, existing_folder
from manyviews.data.sources.source import Source
from manyviews.system.hardware import cores, host

GREYS = {"white": 255, "grey": 128, "black": 0}
Byte = Annotated[int, Field(ge=0, le=255)]


class Table(NamedTuple):
    """A row for each file of a listing."""

    digests: Digests
    states: Rows
    aspects: Float[Tensor, " files"]
    """Width over height of the upright image; 1 for what cannot be read."""


class Folder(Source):
    """Images in a folder, at any depth.

    Ids count the readable images in natural order of their names. Every run checks which files are readable; the
    fingerprint covers names, contents, labels and the decoding.
    """

    name: Literal["folder"] = "folder"

    path: FolderPath
    """The folder; with one sub-folder per class its images have labels, for measuring."""

    labels: LabelsSource | None = None
    """null: sub-folders are classes if there are two and most images lie in them. folders: they are, and images beside
    them have no label. none: no labels. Or a CSV file (with commas, semicolons or tabs, with a header or none): in each
    line an image's name below the folder, such as a/1.jpg, and its label; an image that it leaves out has no label."""

    test: FolderPath | None = None
    """Folder of held-out images, one sub-folder per class, never learned from though it lie within `path`; null: test
    or val beside train, or else `holdout`."""

    splits: bool = True
    """Read folders called train, test, val and the like as splits; false: as folders of any other name."""

    holdout: float = Field(default=0.1, ge=0, lt=1)
    """Share of each class that is held out for measuring when there is no folder for it."""

    holdout_seed: int = Field(default=0, ge=0, lt=2**31)
    """Which images are held out; not the run's seed, so that runs stay comparable."""

    size: int = Field(default=96, ge=8, le=1024)
    """Side in pixels of the square that a whole image is squeezed into, to be kept in memory; its aspect ratio is kept
    beside it. Images beyond `memory` are cropped from their files as they are needed, at full resolution."""

    channels: Literal[1, 3] = 3
    """Stored channels: 3 for colour, 1 for grey."""

    background: Literal["white", "grey", "black"] | tuple[Byte, Byte, Byte] = "white"
    """What shows through transparent pixels: a name, or red, green and blue from 0 to 255."""

    bits: int | None = Field(default=None, ge=8, le=16)
    """Significant bits of 16-bit images that do not declare them; null: the fewest of 8, 10, 12, 14 and 16 that hold an
    image's largest value."""

    max_bad: float = Field(default=0.01, ge=0, lt=1)
    """Share of files that may be unreadable; they are left out and listed, and beyond it the run stops."""

    max_pixels: int = Field(default=120_000_000, gt=0, le=PILLOW_LIMIT)
    """Files of more pixels are refused before they are decoded."""

    decoder: Literal["auto", "pillow", "torchcodec"] = "auto"
    """What decodes a JPEG at its full size when training crops are taken from the files: torchcodec takes less time for
    the same pixels. auto: torchcodec if it is installed and gives Pillow's pixels. All else is decoded by Pillow."""

    memory: float = Field(default=2.0, ge=0, le=1_000_000)
    """GiB per process that the decoded images may take; a larger set is decoded again in each epoch. 0: always."""

    follow_links: bool = False
    """Follow symbolic links, also out of the folder."""

    cache: FolderPath | None = None
    """Folder where the decoded images are kept, size × size × channels bytes each: made at the first start, and read
    instead of the files from then on; null: none."""

    def build(
        self, *, workers: int | None = 0, report: Report | None = None, began: Mapping[str, str] | None = None
    ) -> Split:
        """Reads the images: decoded into memory or, beyond the budget, only checked; collective.

        Rank 0 alone lists and opens the files, and sends what it has found to the others.

        Args:
            workers: threads that decode; None: one for each core.
            report: progress callback.
            began: for a resumed run, `Inventory.marks` of its start. Files that were lost since keep their ids, as
                images on disk that have failed.

        Raises:
            ValueError: a folder is missing, may not be read or has no images, its layout is ambiguous, too many files
                are unreadable, the cache is of other images, torchcodec is asked for and cannot be used, or the ranks
                do not see the same files; an OSError on the other ranks, except for the last.
        """
        threads = cores() if workers is None else workers
        split = for_all_ranks(partial(self._find, threads, report, began or {}))
        check_files(split, Path(self.path), follow_links=self.follow_links)
        return split

    def _find(self, threads: int, report: Report | None, began: Mapping[str, str]) -> Split:
        if self.decoder == "torchcodec":
            require_torchcodec()
        discovered = discover(
            existing_folder(self.path),
            None if self.test is None else existing_folder(self.test),
            follow_links=self.follow_links,
            splits=self.splits,
            labels=self.labels if self.labels in (None, *WORDS) else Path(str(self.labels)),
            holdout=self.holdout,
            seed=self.holdout_seed,
            also=began,
        )
        listings = [discovered.train] if discovered.test is None else [discovered.train, discovered.test]
        total = sum(len(listing.names) for listing in listings)
        fits = total * self.channels * self.size**2 <= min(self.memory * 2**30, host() / 2)
        read = [
            self._read(listing, name, fits, threads, report, began)
            for listing, name in zip(listings, SPLITS, strict=False)
        ]
        unreadable = [entry for part in read for entry in part.unreadable]
        refuse_too_many(discovered.train.root, unreadable, total, self.max_bad)
        for name, part in zip(("training", "evaluation"), read, strict=False):
            if not len(part.images):
                raise ValueError(f"{self.path}: no readable image is left for {name}")
        discovered.warn(read)
        test = read[1].images if len(read) > 1 else None
        own = [part for part, listing in zip(read, listings, strict=True) if listing.root == discovered.train.root]
        lost = {name for part in own if isinstance(part.images, Files) for name in part.images.failed}
        inventory = Inventory(
            tuple((Names(part.images.names), part.digests) for part in own),
            tuple(name for part in own for name, _ in part.unreadable if name not in lost),
        )
        return Split(read[0].images, test, tuple(unreadable), discovered.line(read[0].images, test), inventory)

    def _read(
        self,
        listing: Listing,
        split: str,
        fits: bool,
        threads: int,
        report: Report | None,
        began: Mapping[str, str],
    ) -> ReadSplit:
        root, names = listing.root, listing.names
        in_memory, whole = fits and not began, fits or self.cache is not None
        decoding, decoded = self.decoding(), in_memory and self.cache is None
        aspects = torch.ones(len(names), dtype=torch.float64)
        states = np.zeros((len(names), len(State._fields)), np.int64)
        digests = np.zeros((len(names), DIGEST), np.uint8)
        pixels = torch.empty(len(names) if decoded else 0, self.channels, self.size, self.size, dtype=torch.uint8)

        def opener(index: int) -> tuple[BufferedReader, State]:
            return open_image(root, names[index], follow_links=self.follow_links)

        def open_file(index: int) -> BufferedReader:
            file, states[index] = opener(index)
            if decoded:
                digests[index] = np.frombuffer(digest(file), np.uint8)
            return file

        def visit(index: int) -> None:
            path = root / names[index]
            if decoded:
                pixels[index], aspects[index] = decoding.read_whole(path, partial(open_file, index))
            else:
                aspects[index] = decoding.check(path, partial(open_file, index))

        failures = in_threads(visit, len(names), threads, report, "decoding" if decoded else "checking")
        if not decoded:
            digests = digests_of(root, states, failures, opener, threads, report)
        lost: dict[str, str] = {}
        for index, name in enumerate(names) if began else ():
            before = bytes.fromhex(began.get(name, ""))
            if before and (index in failures or digests[index].tobytes() != before):
                lost[name] = failures.pop(index, OTHER_FILE)
                digests[index], states[index] = np.frombuffer(before, np.uint8), 0
        kept = [index for index in range(len(names)) if index not in failures]
        if failures and decoded:
            # The gaps are closed in place: a copy would need the memory twice.
            for target, index in enumerate(kept):
                pixels[target] = pixels[index]
        table = Table(digests, states, aspects)
        files = self._files(listing, kept, table, lost, threads, whole=whole)
        if self.cache is not None and kept:
            rows = torch.arange(len(kept))
            cache = self._pictures(files, split, threads, report)
            if in_memory:
                # Left out, as if they had been decoded into memory.
                failures |= {kept[row]: reason for row, reason in cache.unreadable.items()}
                rows = torch.tensor([row for row in range(len(kept)) if row not in cache.unreadable], dtype=torch.int64)
                kept = [kept[row] for row in rows.tolist()]
                files = self._files(listing, kept, table, lost, threads, whole=whole)
            rows[[name in lost for name in files.names]] = -1
            files = replace(files, cache=cache, rows=rows)
            pixels = files.read(torch.arange(len(kept))) if in_memory else pixels
        unreadable = [*((names[index], reason) for index, reason in sorted(failures.items())), *lost.items()]
        images: Images = files
        if in_memory:
            described = (files.names, files.labels, files.classes, files.fingerprint, files.aspects)
            images = InMemory(pixels[: len(kept)], *described)
        return ReadSplit(images, unreadable, digests[kept])

    def _files(
        self, listing: Listing, kept: list[int], table: Table, lost: dict[str, str], threads: int, *, whole: bool
    ) -> Files:
        """The files of these numbers in a listing; the table has a row for each of its files."""
        names, decoding = Names(listing.names[index] for index in kept), self.decoding()
        labels = None if listing.labels is None else torch.tensor([listing.labels[index] for index in kept])
        aspects = table.aspects[kept]
        square = bool((aspects == 1).all())
        # Without path and times: a copy elsewhere has the same fingerprint.
        marks: list[object] = [] if labels is None else [labels.numpy(), listing.classes]
        marks += [] if square else [aspects.numpy()]
        marks += [] if whole else ["cropped from the files"]
        return Files(
            listing.root,
            names,
            labels,
            listing.classes,
            fingerprint([decoding, names, table.digests[kept], *marks]),
            decoding,
            self.max_bad,
            threads,
            states=torch.from_numpy(table.states[kept]),
            digests=torch.from_numpy(table.digests[kept]),
            follow_links=self.follow_links,
            failed=dict(lost),
            reported=set(lost),
            aspects=None if square else aspects,
            whole=whole,
        )

    def _pictures(self, files: Files, split: str, threads: int, report: Report | None) -> PictureCache:
        """The cache of decoded images, made if it is not there."""
        assert self.cache is not None
        assert files.digests is not None
        shape = len(files), files.channels, files.size, files.size
        key = {
            "images": fingerprint([files.names, files.digests.numpy()]),
            "shape": " × ".join(map(str, shape)),
            "background": str(files.decoding.background),
            "bits": files.decoding.bits,
            "decoder": DECODER,
        }
        lost = [index for index, name in enumerate(files.names) if name in files.failed]
        return PictureCache(Path(self.cache), split, shape).make(key, files.decode, lost, threads, report)

    def decoding(self) -> Decoding:
        """How files are decoded."""
        background = self.background if isinstance(self.background, tuple) else (GREYS[self.background],) * 3
        fast = self.decoder != "pillow"
        return Decoding(self.channels, self.size, background, self.max_pixels, self.bits, torchcodec=fast)
