"""Warnings about an evaluation: foreign images, copies, small classes, collapsed features."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from manyviews.data import AnyData, Folder, Images, InMemory, Split, of_classes
from manyviews.data.listing.inventory import read_inventory
from manyviews.engine import top_k
from manyviews.evaluation.job import FOREIGN
from manyviews.evaluators.distance import searchable
from manyviews.evaluators.results.measurement import Evaluation, is_learned, label
from manyviews.evaluators.splits import uneven
from manyviews.features.encoding import raw_pixels
from manyviews.features.placing import placed
from manyviews.run.folder import INVENTORY
from manyviews.run.health import LEAST_RANK
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.plural import plural
from manyviews.views import StandardView

DECODED = {"size", "channels", "background", "bits", "max_bad", "max_pixels", "memory", "decoder"}
"""Settings of a folder that change the pixels of its images, not which images there are."""
HELD_OUT = {"test", "holdout", "holdout_seed"}
SIDE = 8
"""Side in pixels of the thumbnails that are compared to detect copies."""
SAME = 0.04
"""Largest root mean square distance of two thumbnails of one picture, relative to its contrast: sizes, formats and
compressions of one photograph are below it."""
LEAST_CONTRAST = 1 / 255
FEW = 5
"""Number of test images of a class below which one image is more than a fifth of the class's accuracy."""
MOST_NAMED = 5
FEWEST_IMAGES, LEAST_SPREAD = 8, -0.01
"""Least number of images for a warning of collapse, and the uniformity above which features have collapsed."""


def is_own(data: AnyData | None, own: AnyData, inventory: Mapping[str, str], split: Split) -> bool:
    """Returns whether images are a run's own, whatever is held out and whatever their size.

    `data` are the settings asked for (None: the run's own), `own` those of the run's recipe; `inventory`, the hashes of
    the run's files (see `inventory_of`), identifies a copy in another folder.
    """
    # Relations change no image.
    data = None if data is None else data.model_copy(update={"relations": own.relations})
    if data is None or data == own:
        return True
    if isinstance(data, Folder) and isinstance(own, Folder):
        changed = {name for name in Folder.model_fields if getattr(data, name) != getattr(own, name)}
        same_path = os.path.realpath(data.path) == os.path.realpath(own.path)
        if not changed - DECODED - HELD_OUT - ({"path"} if same_path else set()):
            return True
    marks = set(inventory.values())
    return bool(marks) and split.inventory is not None and {*split.inventory.marks().values()} <= marks


def inventory_of(folder: Path) -> dict[str, str]:
    """Reads the hashes of a run's files, by their names; empty if unknown; collective."""
    with raise_on_all_ranks():
        try:
            return read_inventory(folder / INVENTORY)
        except (OSError, ValueError):
            return {}


def whose(data: AnyData | None, own: AnyData, inventory: Mapping[str, str], split: Split) -> Iterator[str]:
    """Warns of images that are not the run's, or that it may have learned from."""
    if is_own(data, own, inventory, split):
        if split.test is None:
            yield "No images were held out: those shown are images that the run has learned from."
        elif isinstance(data, Folder) and isinstance(own, Folder) and _held_out_otherwise(data, own):
            yield (
                "Other images are held out than in the run, which may have learned from some of them: leave data out, "
                "or name others by data.test=FOLDER."
            )
        return
    yield f"The images are {FOREIGN}."
    if split.inventory is not None:
        marks = set(inventory.values()) - {""}
        known = sum(mark in marks for mark in split.inventory.marks().values())
        if known:
            yield f"Among them are {plural(known, 'file')} of the run's own data, byte for byte."


def _held_out_otherwise(data: Folder, own: Folder) -> bool:
    if data.test is None:
        return any(getattr(data, name) != getattr(own, name) for name in HELD_OUT)
    return data.test != own.test and Path(os.path.realpath(data.test)).is_relative_to(os.path.realpath(data.path))


def learned_pairs(paired: Int[Tensor, " images"], train: Images, unseen: Sequence[int | str]) -> Iterator[str]:
    """Warns of images to verify that a run may have learned from: of its `train` images, but not of unseen classes."""
    known = paired[~torch.isin(paired, of_classes(train, unseen))] if unseen else paired
    if len(known):
        yield (
            f"{plural(len(known), 'image')} of the pairs are training images of the run: their pairs are judged better "
            "than those of new images; list held-out images alone"
        )


def of_measured(split: Split, pixels: tuple[Tensor | None, Tensor] | None, evaluation: Evaluation) -> Iterator[str]:
    """Warns of copies, small or unequal classes, and collapsed features."""
    yield from copies(split, pixels)
    if split.train.labels is not None and split.test is not None and split.test.labels is not None:
        yield from class_sizes(split.test.labels, split.train.classes)
    yield from collapsed(evaluation)


def thumbnails(images: Images, pixels: Float[Tensor, "images width"] | None) -> Float[Tensor, "images small"] | None:
    """Returns all images at 8 × 8 pixels in [0, 1]; None if reading them is expensive."""
    if pixels is not None:
        side = round((pixels.shape[1] / images.channels) ** 0.5)
        squares = pixels.view(-1, images.channels, side, side)
        return F.adaptive_avg_pool2d(squares, SIDE).flatten(1)
    return raw_pixels(images, StandardView(SIDE, images.channels)) if isinstance(images, InMemory) else None


def same_pictures(train: Float[Tensor, "train small"], test: Float[Tensor, "test small"]) -> Int[Tensor, " pictures"]:
    """Returns the indices of test images that are copies of training images, ascending.

    Two thumbnails show the same picture if their root mean square distance is at most `SAME` of its contrast.
    """
    _, nearest = top_k(*searchable(test, train, "euclidean"), 1)
    distance = (test - train[nearest[:, 0]]).square().mean(1).sqrt()
    return (distance <= SAME * test.std(1, correction=0).clamp(min=LEAST_CONTRAST)).nonzero().flatten()


def copies(split: Split, pixels: tuple[Tensor | None, Tensor] | None) -> Iterator[str]:
    """Warns of held-out images that show the same picture as a training image.

    `pixels` are those of the training images and of the held-out ones, if they have been read.
    """
    if split.test is None:
        return
    own, shown = pixels if pixels is not None else (None, None)
    train, test = thumbnails(split.train, own), thumbnails(split.test, shown)
    if train is None or test is None or train.shape[1] != test.shape[1]:
        return
    train = placed(train)
    if count := len(same_pictures(train, test.to(train.device))):
        yield (
            f"{count:,} of {plural(len(test), 'held-out image')} show the same picture as a training image, perhaps "
            "in another size or file: features that memorise the training images classify them correctly."
        )


def class_sizes(labels: Int[Tensor, " test"], classes: Sequence[str]) -> Iterator[str]:
    """Warns of classes with few test images, and of classes of unequal size."""
    counts = labels[labels >= 0].bincount()
    present = counts[counts > 0]
    if len(present) < 2:
        return
    small = [(number, count) for number, count in enumerate(counts.tolist()) if 0 < count < FEW]
    if small:
        named = ", ".join(f"{classes[number]}: {count}" for number, count in small[:MOST_NAMED])
        more = (
            f" and {plural(len(small) - MOST_NAMED, 'more class', 'more classes')}" if len(small) > MOST_NAMED else ""
        )
        none = f", and {plural(len(classes) - len(present), 'class has', 'classes have')} none" * (
            len(classes) > len(present)
        )
        yield (
            f"{len(small):,} of {len(present):,} classes have fewer than {FEW} test images ({named}{more}){none}: too "
            "few to measure each of them."
        )
    if uneven(labels):
        largest = int(counts.argmax())
        yield (
            f"Classes are of unequal size: always predicting {classes[largest]} is right on "
            f"{100 * int(counts.max()) / int(counts.sum()):.1f} %; the balanced accuracy is the mean over the classes."
        )


def collapsed(evaluation: Evaluation) -> Iterator[str]:
    """Warns of learned features that have collapsed to a point or a line, by their geometry."""
    for own in evaluation.of("geometry", metric="effective rank"):
        largest = min(own.n, own.dim or 0)
        if not is_learned(own.features) or largest < FEWEST_IMAGES:
            continue
        features = f"The {label(own.features)} features"
        (uniformity,) = evaluation.of("geometry", features=own.features, metric="uniformity")
        if own.value == 0:
            yield f"{features} are all zero: they do not tell any images apart."
        elif uniformity.value > LEAST_SPREAD:
            yield (
                f"{features} have collapsed: all images have nearly the same (uniformity "
                f"{uniformity.value:.2f}, 0 if all are equal). Either all images look the same, or training collapsed."
            )
        elif own.value < LEAST_RANK:
            yield (
                f"{features} have collapsed to a line: their effective rank is {own.value:.1f} of at most {largest:,}."
            )
