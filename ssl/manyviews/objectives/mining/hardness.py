"""Difficulty of the triples of a batch: shares of easy, semi-hard and hard ones."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyviews.objectives.mining.batch import Batch
from manyviews.objectives.mining.samplers import DistanceWeighted, Sampling, SemiHard
from manyviews.objectives.mining.sampling import Triples


@torch.no_grad()
def hardness(
    triples: Triples, batch: Batch, rows: slice, products: Float[Tensor, "rows all"], idle: Bool[Tensor, "rows second"]
) -> Float[Tensor, "3"]:
    """Counts all, hard and easy triples of some anchors; the others are semi-hard.

    As Schroff et al. 2015, section 3.2, define them: a semi-hard negative is farther than the positive, but within the
    margin, so that the triple still has a loss. A nearer one is hard, and so is, as in pytorch-metric-learning, one at
    the same distance; a farther one without a loss is easy.

    `products` are those of the anchors `rows` with all candidates. `idle` are the negatives without a loss: one for
    each positive, or, where all are compared, one for each candidate.
    """
    nearness = batch.nearness(products)
    own = nearness.gather(1, triples.positives)
    if triples.negatives is not None:
        hard = nearness.gather(1, triples.negatives) >= own
        counts = [triples.chosen.sum(), (hard & triples.chosen).sum(), (~hard & idle & triples.chosen).sum()]
        return torch.stack(counts).to(products.dtype)
    mates, positives = batch.mates(rows), triples.chosen.sum(1)
    # For each negative, how many positives are no nearer than it.
    limits = own.masked_fill(~triples.chosen, math.inf).sort(1).values
    harder = torch.searchsorted(limits, nearness, right=True).scatter_(1, mates, 0)
    easy = (positives[:, None] - harder).where(idle, 0).scatter_(1, mates, 0)
    count = (positives * batch.negatives(rows)).sum()
    return torch.stack([count, harder.sum(), easy.sum()]).to(products.dtype)


def shares(sampling: Sampling, figures: Float[Tensor, "6"]) -> dict[str, Tensor]:
    """Terms that mining adds to a loss, from sums of `Triples.figures` and of `hardness`.

    `easy`, `semi_hard` and `hard` are shares of the compared triples, the others of the positive pairs.
    """
    pairs, without, fallback, count, hard, easy = figures
    pairs, triples = pairs.clamp(min=1), count.clamp(min=1)
    terms = {"easy": easy / triples, "semi_hard": (count - hard - easy) / triples, "hard": hard / triples}
    terms["without_negative"] = without / pairs
    if isinstance(sampling, DistanceWeighted):
        terms["without_candidate"] = fallback / pairs
    if isinstance(sampling, SemiHard):
        terms["fallback"] = fallback / pairs
    return terms
