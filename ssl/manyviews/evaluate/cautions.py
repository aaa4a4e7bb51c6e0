"""What a reader of the numbers should know of the images: whose they are, copies, small classes, collapsed features."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from manyviews.data import Data, Folder, Images, InMemory, Split
from manyviews.data.listing.inventory import read_inventory
from manyviews.engine import top_k
from manyviews.evaluate.run_tasks import FOREIGN
from manyviews.evaluators.results.kinds import is_learned, label
from manyviews.evaluators.results.measurement import Evaluation
from manyviews.evaluators.splits import uneven
from manyviews.features.encoding import raw_pixels
from manyviews.run.folder import INVENTORY
from manyviews.run.health import LEAST_RANK
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.plural import plural

DECODED = {"size", "channels", "background", "bits", "max_bad", "max_pixels", "memory"}
"""Settings of a folder that change what an image looks like, and not which images there are."""
HELD_OUT = {"test", "holdout", "holdout_seed"}
SIDE = 8
"""Side in pixels of the thumbnails by which images are found to be the same picture."""
SAME = 0.04
"""Largest distance of thumbnails of one picture, as a share of the picture's own contrast: sizes, formats and
compressions of one photograph are below it."""
LEAST_CONTRAST = 1 / 255
FEW = 5
"""Test images of a class below which one image is more than a fifth of the class's accuracy."""
MOST_NAMED = 5
FEWEST_IMAGES, LEAST_SPREAD = 8, -0.01
"""Images from which features that lie together are a finding, and the uniformity above which they do."""


def is_own(data: Data | None, own: Data, inventory: Mapping[str, str], split: Split) -> bool:
    """Whether images are those of a run, whatever is held out of them and at whatever size they are decoded.

    Args:
        data: what was asked for; None: the run's own.
        own: what the run's recipe names.
        inventory: the content of the run's files (`inventory_of`), by which a copy elsewhere is known.
        split: the images that were asked for.
    """
    if data is None or data == own:
        return True
    if isinstance(data, Folder) and isinstance(own, Folder):
        changed = {name for name in Folder.model_fields if getattr(data, name) != getattr(own, name)}
        same_path = os.path.realpath(data.path) == os.path.realpath(own.path)
        if changed - DECODED - HELD_OUT - ({"path"} if same_path else set()) == set():
            return True
    marks = set(inventory.values())
    return bool(marks) and split.inventory is not None and {*split.inventory.marks().values()} <= marks


def inventory_of(folder: Path) -> dict[str, str]:
    """The content of the files that a run began with, by their names; empty where it is not known; collective."""
    with raise_on_all_ranks():
        try:
            return read_inventory(folder / INVENTORY)
        except (OSError, ValueError):
            return {}


def whose(data: Data | None, own: Data, inventory: Mapping[str, str], split: Split) -> Iterator[str]:
    """Whether the images are the run's, and whether it has learned from those that are shown."""
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


def of_measured(split: Split, pixels: tuple[Tensor | None, Tensor] | None, evaluation: Evaluation) -> Iterator[str]:
    """What is to be said of copies, of the sizes of classes, and of features that have collapsed."""
    yield from copies(split, pixels)
    if split.train.labels is not None and split.test is not None and split.test.labels is not None:
        yield from class_sizes(split.test.labels, split.train.classes)
    yield from collapsed(evaluation)


def thumbnails(images: Images, pixels: Float[Tensor, "images width"] | None) -> Float[Tensor, "images small"] | None:
    """All images at 8 × 8 pixels in [0, 1], from their pixels where these are there; None where reading is dear."""
    if pixels is not None:
        side = round((pixels.shape[1] / images.channels) ** 0.5)
        squares = pixels.view(-1, images.channels, side, side)
        return F.adaptive_avg_pool2d(squares, SIDE).flatten(1)
    return raw_pixels(images, SIDE) if isinstance(images, InMemory) else None


def same_pictures(train: Float[Tensor, "train small"], test: Float[Tensor, "test small"]) -> Int[Tensor, " pictures"]:
    """Which test images show a picture that a training image shows too, by thumbnails: their places, ascending.

    Each is compared with the training image nearest by the Euclidean distance; both show the same picture where they
    differ by less than a share of its contrast.
    """
    # The product with a key less half its square is largest where the distance is smallest.
    keys = torch.cat([train, -train.square().sum(1, keepdim=True) / 2], 1)
    _, nearest = top_k(torch.cat([test, test.new_ones(len(test), 1)], 1), keys, 1)
    distance = (test - train[nearest[:, 0]]).square().mean(1).sqrt()
    return (distance <= SAME * test.std(1, correction=0).clamp(min=LEAST_CONTRAST)).nonzero().flatten()


def copies(split: Split, pixels: tuple[Tensor | None, Tensor] | None) -> Iterator[str]:
    """How many held-out images show what a training image shows.

    Args:
        split: the images.
        pixels: of the training images and of the held-out ones, where they are there.
    """
    if split.test is None:
        return
    own, shown = pixels if pixels is not None else (None, None)
    train, test = thumbnails(split.train, own), thumbnails(split.test, shown)
    if train is None or test is None or train.shape[1] != test.shape[1]:
        return
    if count := len(same_pictures(train, test)):
        yield (
            f"{count:,} of {plural(len(test), 'held-out image')} show the same picture as an image to learn from, in "
            "another size or file perhaps: whatever knows the training images by heart is right on them."
        )


def class_sizes(labels: Int[Tensor, " test"], classes: Sequence[str]) -> Iterator[str]:
    """What is to be said of the sizes of the classes that accuracies are measured on."""
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
            f"Classes are of unequal size: who always answers {classes[largest]} is right on "
            f"{100 * int(counts.max()) / int(counts.sum()):.1f} %; the balanced accuracy is the mean over the classes."
        )


def collapsed(evaluation: Evaluation) -> Iterator[str]:
    """Sentences on learned features that lie in one place or on one line, by the numbers of their geometry."""
    for own in evaluation.of("geometry", metric="effective rank"):
        largest = min(own.n, own.dim or 0)
        if not is_learned(own.features) or largest < FEWEST_IMAGES:
            continue
        features = f"The {label(own.features)} features"
        (uniformity,) = evaluation.of("geometry", features=own.features, metric="uniformity")
        if own.value == 0:
            yield f"{features} are all zero: nothing was learned that images could be told by."
        elif uniformity.value > LEAST_SPREAD:
            yield (
                f"{features} have collapsed: all images have nearly the same (uniformity "
                f"{uniformity.value:.2f}, 0 where all are one). Either the images are all alike, or training collapsed."
            )
        elif own.value < LEAST_RANK:
            yield (
                f"{features} have collapsed to a line: their effective rank is {own.value:.1f} of at most {largest:,}."
            )
