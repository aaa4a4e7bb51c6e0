"""How alike pairs of images are: of the same class and of different ones, or any two where there are no labels."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from manyviews.evaluators.distance import similarity_of_pairs
from manyviews.evaluators.splits import by_class
from manyviews.system import keyed_random

PAIRS = 8_000


def similarities(
    features: Float[Tensor, "images dim"], labels: Int64[Tensor, " images"] | None, seed: int, pairs: int = PAIRS
) -> dict[str, Float[Tensor, " pairs"]]:
    """The cosines of drawn pairs by what they are: "same class", "different classes"; without labels "two images".

    A kind of pair of which there is none is left out; no image is paired with itself. Pairs of the same class are drawn
    by an image, then by another one of its class; the same pair may come twice. A pure function of the arguments.
    """
    ids = torch.arange(len(features)) if labels is None else (labels >= 0).nonzero().squeeze(1)
    if labels is None or len(ids) < 2:
        found = {"two images": torch.stack(_others(torch.zeros(len(features), dtype=torch.int64), pairs, seed), 1)}
    else:
        own = labels[ids]
        first, second = _others(own, pairs, seed)
        left, right = _others(torch.zeros_like(own), pairs, seed + 1)
        differ = own[left] != own[right]
        found = {
            "same class": torch.stack([ids[first], ids[second]], 1),
            "different classes": torch.stack([ids[left[differ]], ids[right[differ]]], 1),
        }
    return {
        name: similarity_of_pairs(features, chosen, "cosine").float() for name, chosen in found.items() if len(chosen)
    }


def _others(groups: Int64[Tensor, " images"], pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Drawn pairs of two different places of the same group."""
    order, ranks_of_order = by_class(torch.arange(len(groups)), groups)
    counts = groups.bincount()
    sizes, starts = counts[groups], (counts.cumsum(0) - counts)[groups]
    ranks = torch.empty_like(order)
    ranks[order] = ranks_of_order
    able = (sizes > 1).nonzero().squeeze(1)
    if not len(able):
        return able, able
    draws = torch.arange(pairs)
    first = able[_whole(keyed_random.uniform(draws, seed, 4), torch.tensor(len(able)))]
    # One place less, and beyond the own one a place further: every other image of the group has the same chance.
    step = _whole(keyed_random.uniform(draws, seed, 5), sizes[first] - 1)
    step = step + (step >= ranks[first])
    return first, order[starts[first] + step]


def _whole(numbers: Tensor, count: Tensor) -> Tensor:
    return torch.minimum((numbers.double() * count).long(), count - 1)
