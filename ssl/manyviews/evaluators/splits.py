"""Which training images stand aside so that choices can be made without a look at the test images."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

UNEVEN = 1.5
"""How many times the smallest class the largest one is where an accuracy is mostly that of large classes."""


class Prediction(NamedTuple):
    """The predicted classes of the test images, and what was chosen for them on held-out training images."""

    predictions: Int[Tensor, " test"]
    chosen: Mapping[str, float]
    """The hyper-parameters, by their names."""
    validation: float | None
    """The accuracy of the choice on the held-out images; None where none could be held out."""


def hold_out(
    labels: Int[Tensor, " images"], *, share: float, seed: int, most: int | None = None
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held"]]:
    """Splits labelled images into those kept and those held out, the same share of every class.

    A pure function of the labels and the seed: it draws from a generator of its own. Images labelled −1 are in
    neither part; a class with a single image is kept; at most `most` images are held out.

    Returns:
        The indices kept and the indices held out, both ascending.

    Raises:
        ValueError: if a part would be empty.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    labelled = (labels >= 0).nonzero().squeeze(1)
    shuffled = labelled[torch.randperm(len(labelled), generator=generator)]
    if most is not None and len(labelled):
        share = min(share, most / len(labelled))
    order, ranks = by_class(shuffled, labels)
    counts = labels[order].bincount()
    wanted = torch.where(counts > 1, (counts.double() * share + 0.5).long(), 0)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order[ranks < wanted[labels[order]]]] = True
    kept, apart = ((labels >= 0) & ~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)
    if not len(kept) or not len(apart):
        raise ValueError(
            f"{len(labelled)} labelled images leave {len(kept)} kept and {len(apart)} held out at a share of "
            f"{share:g}; give more labelled images, or another share"
        )
    return kept, apart


def hold_out_some(
    labels: Int[Tensor, " images"], *, share: float, seed: int, most: int | None = None
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held"]]:
    """As `hold_out`, and where the share is not one image of any class, one image of each class that has two or more.

    Where no class has two, all labelled images are kept and none is held out: there is nothing to choose by.

    Raises:
        ValueError: if no image is labelled, or the share would leave none.
    """
    counts = labels[labels >= 0].bincount()
    if not len(counts):
        raise ValueError("no training image has a label")
    if kind_of_choice(counts, share=share, most=most) == "share":
        return hold_out(labels, share=share, seed=seed, most=most)
    generator = torch.Generator().manual_seed(seed)
    order, ranks = by_class(torch.randperm(len(labels), generator=generator), labels)
    held = order[(ranks == 0) & (counts[labels[order]] > 1)]
    if most is not None and len(held) > most:
        held = held[torch.randperm(len(held), generator=generator)[:most]]
    held = held.sort().values
    kept = labels >= 0
    kept[held] = False
    return kept.nonzero().squeeze(1), held


def kind_of_choice(
    counts: Int[Tensor, " classes"], *, share: float, most: int | None = None
) -> Literal["share", "one", "none"]:
    """What is held out of classes with so many images: the share, one image of each, or none."""
    total = int(counts.sum())
    if most is not None and total:
        share = min(share, most / total)
    several = counts[counts > 1]
    if not len(several):
        return "none"
    return "share" if int(int(several.max()) * share + 0.5) else "one"


def num_classes(*labels: Int[Tensor, " _"]) -> int:
    """One more than the largest label anywhere, so that a class which only one split has is still a class."""
    return 1 + max((int(part.max()) for part in labels if len(part)), default=-1)


def by_class(
    order: Int[Tensor, " images"], labels: Int[Tensor, " all"]
) -> tuple[Int[Tensor, " labelled"], Int[Tensor, " labelled"]]:
    """The labelled images of an order, class by class, and the place of each in the order of its class."""
    order = order[labels[order] >= 0]
    order = order[labels[order].argsort(stable=True)]
    counts = labels[order].bincount()
    return order, torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def uneven(labels: Int[Tensor, " images"]) -> bool:
    """Whether classes are of so unequal size that an accuracy is mostly that of the large ones; −1: no class."""
    counts = labels[labels >= 0].bincount()
    counts = counts[counts > 0]
    return len(counts) > 1 and int(counts.max()) > UNEVEN * int(counts.min())


def balanced_accuracy(predictions: Int[Tensor, " images"], labels: Int[Tensor, " images"]) -> float:
    """The mean, over the classes that images have, of the share of a class's images that is predicted right."""
    counts = labels.bincount()
    right = labels[predictions == labels].bincount(minlength=len(counts))
    return (right[counts > 0] / counts[counts > 0]).mean().item()
