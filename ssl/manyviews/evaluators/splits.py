"""Held-out training images for the choice of hyper-parameters; accuracies over classes."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

UNEVEN = 1.5
"""Ratio of the largest to the smallest class from which an accuracy is mostly that of the large classes."""


class Prediction(NamedTuple):
    """Predicted classes of the test images, and the hyper-parameters that were chosen."""

    predictions: Int[Tensor, " test"]
    chosen: Mapping[str, float]
    validation: float | None
    """The accuracy of the choice on the held-out images; None if none could be held out."""


def hold_out(
    labels: Int[Tensor, " images"], *, share: float, seed: int, most: int | None = None, one_each: bool = False
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held"]]:
    """Splits labelled images into kept and held-out ones, the same share of every class.

    A pure function of labels and seed. Images labelled −1 are in neither part; a class with a single image is kept;
    at most `most` images are held out. With `one_each`, classes so small that the share is not one image of any give
    one image each if they have two or more; if no class has two, nothing is held out.

    Returns:
        The indices kept and the indices held out, both ascending.

    Raises:
        ValueError: if a part would be empty; with `one_each`, if no image is labelled or the share leaves none.

    Examples:
        >>> kept, held = hold_out(torch.tensor([0, 0, 1, 1, -1]), share=0.5, seed=0)
        >>> len(kept), len(held)
        (2, 2)
    """
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    labelled = (labels >= 0).nonzero().squeeze(1)
    counts = labels[labelled].bincount()
    if one_each and not len(counts):
        raise ValueError("no training image has a label")
    if most is not None and len(labelled):
        share = min(share, most / len(labelled))
    by_share = not one_each or held_out_of_each(counts, share) == "share"
    if by_share:
        shuffled = labelled[torch.randperm(len(labelled), generator=generator)]
        order, ranks = by_class(shuffled, labels)
        wanted = torch.where(counts > 1, (counts.double() * share + 0.5).long(), 0)
        held = order[ranks < wanted[labels[order]]]
    else:
        order, ranks = by_class(torch.randperm(len(labels), generator=generator), labels)
        held = order[(ranks == 0) & (counts[labels[order]] > 1)]
        if most is not None and len(held) > most:
            held = held[torch.randperm(len(held), generator=generator)[:most]]
    held, kept = held.sort().values, labels >= 0
    kept[held] = False
    kept = kept.nonzero().squeeze(1)
    if by_share and not (len(kept) and len(held)):
        raise ValueError(
            f"{len(labelled)} labelled images leave {len(kept)} kept and {len(held)} held out at a share of "
            f"{share:g}; give more labelled images, or another share"
        )
    return kept, held


def held_out_of_each(counts: Int[Tensor, " classes"], share: float) -> Literal["share", "one", "none"]:
    """Returns what `hold_out(one_each=True)` holds out of classes of these sizes."""
    several = counts[counts > 1]
    if not len(several):
        return "none"
    return "share" if int(int(several.max()) * share + 0.5) else "one"


def num_classes(*labels: Int[Tensor, " _"]) -> int:
    """Returns one more than the largest label of any split."""
    return 1 + max((int(part.max()) for part in labels if len(part)), default=-1)


def by_class(
    order: Int[Tensor, " images"], labels: Int[Tensor, " all"]
) -> tuple[Int[Tensor, " labelled"], Int[Tensor, " labelled"]]:
    """Sorts labelled images by class, stably; also returns the rank of each in its class."""
    order = order[labels[order] >= 0]
    order = order[labels[order].argsort(stable=True)]
    counts = labels[order].bincount()
    return order, torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def uneven(labels: Int[Tensor, " images"]) -> bool:
    """Returns whether the largest class has more than `UNEVEN` times the smallest's images."""
    counts = labels[labels >= 0].bincount()
    counts = counts[counts > 0]
    return len(counts) > 1 and int(counts.max()) > UNEVEN * int(counts.min())


def balanced_accuracy(predictions: Int[Tensor, " images"], labels: Int[Tensor, " images"]) -> float:
    """Computes the mean over classes of the accuracy on each class.

    Examples:
        >>> balanced_accuracy(torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1]))
        0.5
    """
    counts = labels.bincount()
    right = labels[predictions == labels].bincount(minlength=len(counts))
    return (right[counts > 0] / counts[counts > 0]).mean().item()
