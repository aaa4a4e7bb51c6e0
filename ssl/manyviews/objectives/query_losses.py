"""Ranking losses: one number for each query, from scores and relevances of its items.

Every function takes scores and relevances, [queries, items], and returns a loss for each query. If all items of a query
are equally relevant, there is nothing to rank: the loss is finite then, but meaningless.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from manyviews.engine.rows import tile_numbers
from manyviews.objectives.losses import softplus, with_gradient

Pairwise = Literal["rank_net", "hinge"]

Items = Float[Tensor, "queries items"]
Queries = Float[Tensor, " queries"]
NUMBERS = 1 << 20
"""Pairs of items in memory at a time on a CPU, over the queries of a tile."""


def squared_error(scores: Items, relevances: Items) -> Queries:
    """Mean over items of (score − relevance)²: regression (Cossock and Zhang 2006).

    Examples:
        >>> squared_error(torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.1250])
    """
    return (scores - relevances).square().mean(1)


def cross_entropy(scores: Items, relevances: Items) -> Queries:
    """Mean over items of the cross-entropy of sigmoid(score) with the relevance as probability."""
    return F.binary_cross_entropy_with_logits(scores, relevances, reduction="none").mean(1)


def rank_net(scores: Items, relevances: Items, most: int | None = None) -> Queries:
    """Mean over pairs, i more relevant than j, of log(1 + exp(sⱼ − sᵢ)) (Burges et al. 2005).

    The paper sums over pairs; the mean keeps the gradient's size whatever the number of items. `most` is an upper bound
    of a query's items above its least relevant ones; they are counted without it, and a GPU is waited for.

    Examples:
        >>> rank_net(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # log 2
        tensor([0.6931])
    """
    return _over_ordered_pairs(scores, relevances, "rank_net", most)


def hinge(scores: Items, relevances: Items, most: int | None = None) -> Queries:
    """Mean over pairs of items, i more relevant than j, of max(0, 1 − (sᵢ − sⱼ)).

    That is the loss of the ranking support vector machine (Herbrich et al. 2000; Joachims 2002), for any relevances.
    `most`: see `rank_net`.

    Examples:
        >>> hinge(torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.])
    """
    return _over_ordered_pairs(scores, relevances, "hinge", most)


def binary_hinge(scores: Items, relevances: Items) -> Queries:
    """`hinge` for relevances of 0 and 1, by sorting: n log n for n items.

    A pair has a loss where sⱼ > sᵢ − 1. With the number of such j for each i, and of such i for each j, the sum over
    pairs is a weighted sum of scores.
    """
    relevant = relevances > 0
    with torch.no_grad():
        # Both counts compare the same rounded numbers, or they would disagree on pairs at the bound.
        bounds = (scores - 1).masked_fill(~relevant, torch.inf)
        others = scores.masked_fill(relevant, -torch.inf)
        above = scores.shape[1] - torch.searchsorted(others.sort(1).values, bounds, right=True)
        below = torch.searchsorted(bounds.sort(1).values, others)
        positives = relevant.sum(1)
        pairs = positives * (scores.shape[1] - positives)
    sums = torch.where(relevant, above * (1 - scores), below * scores).sum(1)
    return sums / pairs.clamp(min=1)


def list_net(scores: Items, relevances: Items) -> Queries:
    """Cross-entropy of the softmax of scores and that of relevances (Cao et al. 2007, 4.3).

    They are the probabilities that an item comes first, if orders are drawn by the scores and by the relevances.

    Examples:
        >>> list_net(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # log 2
        tensor([0.6931])
    """
    return -(relevances.softmax(1) * scores.log_softmax(1)).sum(1)


def list_mle(scores: Items, relevances: Items) -> Queries:
    """Negative log-likelihood of the order of relevances under the scores (Xia et al. 2008).

    Each item has the term log Σ exp(sⱼ) − sᵢ over all j that are no more relevant than i, itself and ties among them:
    Breslow's rule for ties, which is the paper's equation where there are none. The least relevant items have no term,
    as the last one has none there. The paper sums the terms; their mean keeps the gradient's size whatever the number
    of items. With one relevant item it is the softmax's cross-entropy.

    Examples:
        >>> list_mle(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # log 2
        tensor([0.6931])
    """
    order = relevances.argsort(dim=1, descending=True, stable=True)
    scores, relevances = scores.gather(1, order), relevances.gather(1, order)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    begins = torch.ones_like(relevances, dtype=torch.bool)
    begins[:, 1:] = relevances[:, 1:] != relevances[:, :-1]
    first_of_ties = torch.where(begins, ranks, 0).cummax(1).values
    tails = scores.flip(1).logcumsumexp(1).flip(1).gather(1, first_of_ties)
    counted = relevances > relevances[:, -1:]
    return (tails - scores).where(counted, 0).sum(1) / counted.sum(1).clamp(min=1)


def _over_ordered_pairs(scores: Items, relevances: Items, form: Pairwise, most: int | None) -> Queries:
    """Mean loss of the score differences of all pairs, some items at a time against the rest.

    The gradient is computed on the way: autograd would keep all pairs.
    """
    order = relevances.argsort(dim=1, descending=True, stable=True)
    scores, relevances = scores.gather(1, order), relevances.gather(1, order)
    with torch.no_grad():
        queries, items = scores.shape
        gradient, sums, counts = torch.zeros_like(scores), scores.new_zeros(queries), scores.new_zeros(queries)
        if most is None:
            # With few relevant items nearly all pairs are ties.
            most = int((relevances > relevances[:, -1:]).sum(1).max()) if queries else 0
        height = max(1, tile_numbers(scores.device, NUMBERS) // max(queries * items, 1))
        most = min(most, items)
        for first in range(0, most, height):
            part, rest = slice(first, min(first + height, most)), slice(first + 1, items)
            ordered = relevances[:, part, None] > relevances[:, None, rest]
            shortfall = scores[:, None, rest] - scores[:, part, None]
            if form == "hinge":
                losses = (1 + shortfall).clamp(min=0)
                slopes = (losses > 0).to(scores.dtype)
            else:
                losses, slopes = softplus(shortfall), shortfall.sigmoid()
            slopes = slopes.where(ordered, 0)
            sums += losses.where(ordered, 0).sum((1, 2))
            counts += ordered.sum((1, 2))
            gradient[:, part] -= slopes.sum(2)
            gradient[:, rest] += slopes.sum(1)
        counts = counts.clamp(min=1)
    return with_gradient(scores, sums / counts, gradient / counts[:, None])
