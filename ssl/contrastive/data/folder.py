"""Any folder of images: nested or flat, of mixed sizes and kinds, with other files among them."""

from itertools import chain
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
import torch
from pydantic import Field

from contrastive.config import Settings
from contrastive.data.decode import PILLOW_LIMIT, check_header
from contrastive.data.files import Decoding, Files, in_threads, named, open_image, refuse_too_many
from contrastive.data.images import Images, InMemory, Names, Report, Split, fingerprint
from contrastive.data.labels import labelled, read_labels
from contrastive.data.listing import Listing, hold_out, list_images
from contrastive.data.paths import FilePath, FolderPath, existing_folder

GREYS = {"white": 255, "grey": 128, "black": 0}
Byte = Annotated[int, Field(ge=0, le=255)]
HELD_OUT_FOLDERS = ("test", "val", "valid", "validation")


class Folder(Settings):
    """Images in a folder, at any depth.

    Ids count the readable images in natural order of their names. Which files are readable is found anew in each run,
    and the same for the same folder; the fingerprint, over names, file sizes and the stored form, tells when not.
    """

    name: Literal["folder"] = "folder"

    path: FolderPath
    """The folder; with one sub-folder per class its images have labels, for measuring."""

    labels: FilePath | None = None
    """CSV file with a header, then in each line an image's name below the folder, such as a/1.jpg, and its label, in
    place of classes by sub-folders; an image that it leaves out has no label."""

    test: FolderPath | None = None
    """Folder of held-out images, one sub-folder per class; none: test or val beside train, or else `holdout`."""

    holdout: float = Field(default=0.1, ge=0, lt=1)
    """Share of each class that is held out for measuring when there is no folder for it."""

    holdout_seed: int = Field(default=0, ge=0)
    """Which images are held out; not the run's seed, so that runs stay comparable."""

    size: int = Field(default=96, ge=8, le=1024)
    """Side of the stored square in pixels: the shorter side is resized to it, then the centre is cut out."""

    channels: Literal[1, 3] = 3
    """Stored channels: 3 for colour, 1 for grey."""

    background: Literal["white", "grey", "black"] | tuple[Byte, Byte, Byte] = "white"
    """What shows through transparent pixels: a name, or red, green and blue from 0 to 255."""

    max_bad: float = Field(default=0.01, ge=0, lt=1)
    """Share of files that may be unreadable; they are left out and listed, and beyond it the run stops."""

    max_pixels: int = Field(default=120_000_000, gt=0, le=PILLOW_LIMIT)
    """Files of more pixels are refused before they are decoded."""

    memory: float = Field(default=2.0, ge=0)
    """GiB per process that the decoded images may take; a larger set is decoded again in each epoch."""

    follow_links: bool = False
    """Follow symbolic links, also out of the folder."""

    def build(self, *, workers: int = 0, report: Report | None = None) -> Split:
        """The readable images, decoded into memory or, beyond the budget, opened once to see that they are images.

        Raises:
            ValueError: a folder is missing, may not be read or holds no images, or too many files are unreadable.
        """
        train, test = self._listings()
        listings = [train] if test is None else [train, test]
        total = sum(len(listing.names) for listing in listings)
        in_memory = total * self.channels * self.size**2 <= self.memory * 2**30
        splits: list[Images] = []
        unreadable: list[tuple[str, str]] = []
        for listing in listings:
            images, bad = self._read(listing, in_memory, workers, report)
            splits.append(images)
            unreadable += bad
        refuse_too_many(train.root, unreadable, total, self.max_bad)
        for name, images in zip(("learn from", "measure with"), splits, strict=False):
            if not len(images):
                raise ValueError(f"{self.path}: no readable image is left to {name}")
        return Split(splits[0], splits[1] if test else None, tuple(unreadable))

    def _listings(self) -> tuple[Listing, Listing | None]:
        root = existing_folder(self.path)
        if self.test is not None:
            (train,) = self._labelled(list_images(root, follow_links=self.follow_links))
            test = list_images(Path(self.test), follow_links=self.follow_links)
            if test.labels is None:
                raise ValueError(f"{self.test} has no sub-folder per class, so nothing can be measured on it")
            return train, _with_classes_of(train, test)
        folders = {child.name.lower(): child.name for child in sorted(root.iterdir()) if child.is_dir()}
        beside = [folders[name] for name in HELD_OUT_FOLDERS if name in folders]
        if "train" in folders and beside:
            train, *tests = self._labelled(
                *(list_images(root, name, follow_links=self.follow_links) for name in (folders["train"], *beside))
            )
            for test in tests:
                if test.labels is not None and max(test.labels) >= 0:
                    return train, _with_classes_of(train, test)
        else:
            (train,) = self._labelled(list_images(root, follow_links=self.follow_links))
        if train.labels is None or self.holdout == 0:
            return train, None
        train, test = hold_out(train, self.holdout, self.holdout_seed)
        return train, test if test.names else None

    def _labelled(self, *listings: Listing) -> tuple[Listing, ...]:
        """The listings with the labels of the table, where there is one."""
        if self.labels is None:
            return listings
        table = read_labels(Path(self.labels), [name for listing in listings for name in listing.names])
        return tuple(labelled(listing, table) for listing in listings)

    def _read(
        self, listing: Listing, in_memory: bool, workers: int, report: Report | None
    ) -> tuple[Images, list[tuple[str, str]]]:
        root, names = listing.root, listing.names
        decoding = self.decoding()
        states = np.zeros((len(names), 2), np.int64)
        pixels = torch.empty(len(names) if in_memory else 0, self.channels, self.size, self.size, dtype=torch.uint8)

        def visit(index: int) -> None:
            def opener() -> BinaryIO:
                file, states[index] = open_image(root, names[index], follow_links=self.follow_links)
                return file

            path = root / names[index]
            if in_memory:
                pixels[index] = decoding.read(path, opener)
            else:
                check_header(path, self.max_pixels, opener=opener)

        failures = in_threads(visit, len(names), workers, named(report, "decoding" if in_memory else "checking"))
        kept = [index for index in range(len(names)) if index not in failures]
        if failures and in_memory:
            # Closing the gaps in place: a copy would need the memory twice.
            for target, index in enumerate(kept):
                pixels[target] = pixels[index]
        kept_names = Names(names[index] for index in kept)
        labels = None if listing.labels is None else torch.tensor([listing.labels[index] for index in kept])
        # Classes by sub-folders are in the names already.
        table = [] if self.labels is None or listing.labels is None else [listing.classes, listing.labels]
        mark = fingerprint(chain([decoding], ((names[index], int(states[index, 0])) for index in kept), table))
        bad = [(names[index], reason) for index, reason in failures.items()]
        if in_memory:
            return InMemory(pixels[: len(kept)], kept_names, labels, listing.classes, mark), bad
        files = Files(
            root,
            kept_names,
            labels,
            listing.classes,
            mark,
            decoding,
            self.max_bad,
            workers,
            states=torch.from_numpy(states[kept]),
            follow_links=self.follow_links,
        )
        return files, bad

    def decoding(self) -> Decoding:
        """How a file becomes a square."""
        return Decoding(self.channels, self.size, self._colour(), self.max_pixels)

    def _colour(self) -> tuple[int, int, int]:
        if isinstance(self.background, str):
            return (GREYS[self.background],) * 3
        return self.background


def _with_classes_of(train: Listing, test: Listing) -> Listing:
    """The held-out listing with its labels counted by the classes of the images to learn from."""
    if train.labels is None:
        return test
    assert test.labels is not None
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise ValueError(
            f"{test.root}: the held-out images have classes that {train.root} lacks: {', '.join(unknown[:5])}; "
            f"it has {', '.join(train.classes[:5])}{' ...' if len(train.classes) > 5 else ''}"
        )
    number = {name: index for index, name in enumerate(train.classes)}
    labels = [label if label < 0 else number[test.classes[label]] for label in test.labels]
    return test._replace(labels=labels, classes=train.classes)
