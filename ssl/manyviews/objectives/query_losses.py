"""Ranking losses: one number for each query, from scores and relevances of its items.

Every function takes scores and relevances, [queries, items], and returns a loss for each query; where queries have
lists of unlike lengths, also a mask of the items that are `there`. If all items of a query are equally relevant, there
is nothing to rank: the loss is finite then, but meaningless.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from manyviews.engine.rows import tile_numbers
from manyviews.objectives.losses import softplus, with_gradient

Items = Float[Tensor, "queries items"]
There = Bool[Tensor, "queries items"]
Queries = Float[Tensor, " queries"]
OfPairs = tuple[Tensor, Tensor, Tensor]
"""Losses of pairs of scores; how fast they fall as the score of the more relevant item grows; how fast they grow with
that of the less relevant one."""
NUMBERS = 1 << 20
"""Pairs of items in memory at a time on a CPU, over the queries of a tile."""
FAR = -1e30
"""Score of what is not there: its exponential is 0, and differences of scores stay finite."""


def squared_error(scores: Items, relevances: Items, there: There | None = None) -> Queries:
    """Mean over items of (score − relevance)²: regression (Cossock and Zhang 2006).

    Examples:
        >>> squared_error(torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.1250])
    """
    return _mean((scores - relevances).square(), there)


def cross_entropy(scores: Items, relevances: Items, there: There | None = None) -> Queries:
    """Mean over items of the cross-entropy of sigmoid(score) with the relevance as probability."""
    return _mean(F.binary_cross_entropy_with_logits(scores, relevances, reduction="none"), there)


def rank_net(scores: Items, relevances: Items, there: There | None = None, most: int | None = None) -> Queries:
    """Mean over pairs, i more relevant than j, of log(1 + exp(sⱼ − sᵢ)) (Burges et al. 2005).

    The paper sums over pairs; the mean keeps the gradient's size whatever the number of items. `most` is an upper bound
    of a query's items above its least relevant ones; they are counted without it, and a GPU is waited for.

    Examples:
        >>> rank_net(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # log 2
        tensor([0.6931])
    """
    return ordered_pairs(scores, relevances, logistic, there, most).mean()


def hinge(scores: Items, relevances: Items, there: There | None = None, most: int | None = None) -> Queries:
    """Mean over pairs of items, i more relevant than j, of max(0, 1 − (sᵢ − sⱼ)).

    That is the loss of the ranking support vector machine (Herbrich et al. 2000; Joachims 2002), for any relevances.
    `most`: see `rank_net`.

    Examples:
        >>> hinge(torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.])
    """
    return ordered_pairs(scores, relevances, partial(excess, margin=1.0), there, most).mean()


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


def list_net(scores: Items, relevances: Items, there: There | None = None) -> Queries:
    """Cross-entropy of the softmax of scores and that of relevances (Cao et al. 2007, 4.3).

    They are the probabilities that an item comes first, if orders are drawn by the scores and by the relevances.

    Examples:
        >>> list_net(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # log 2
        tensor([0.6931])
    """
    if there is not None:
        scores, relevances = (values.masked_fill(~there, FAR) for values in (scores, relevances))
    return -(relevances.softmax(1) * scores.log_softmax(1)).sum(1)


def list_mle(scores: Items, relevances: Items, there: There | None = None) -> Queries:
    """Negative log-likelihood of the order of relevances under the scores (Xia et al. 2008).

    Each item has the term log Σ exp(sⱼ) − sᵢ over all j that are no more relevant than i, itself and ties among them:
    Breslow's rule for ties, which is the paper's equation where there are none. The least relevant items have no term,
    as the last one has none there. The paper sums the terms; their mean keeps the gradient's size whatever the number
    of items. With one relevant item it is the softmax's cross-entropy.

    Examples:
        >>> list_mle(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # log 2
        tensor([0.6931])
    """
    scores, relevances, above = _in_order(scores, relevances, there)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    begins = torch.ones_like(relevances, dtype=torch.bool)
    begins[:, 1:] = relevances[:, 1:] != relevances[:, :-1]
    first_of_ties = torch.where(begins, ranks, 0).cummax(1).values
    tails = scores.flip(1).logcumsumexp(1).flip(1).gather(1, first_of_ties)
    return (tails - scores).where(above, 0).sum(1) / above.sum(1).clamp(min=1)


def n_pairs(scores: Items, relevances: Items, there: There | None = None) -> Queries:
    """Sum over items i of log(1 + Σ exp(sⱼ − sᵢ)) over all j that are less relevant than i (Sohn 2016, eq. 6).

    An item without a less relevant one has no loss.

    Examples:
        >>> n_pairs(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 1.0]]))  # log 3
        tensor([1.0986])
    """
    scores, relevances, above = _in_order(scores, relevances, there)
    # Of each item the first one that is less relevant: the next at which the relevance changes.
    items = scores.shape[1]
    ends = torch.full_like(relevances, items, dtype=torch.long)
    ranks = torch.arange(1, items, device=scores.device)
    ends[:, :-1] = torch.where(relevances[:, 1:] != relevances[:, :-1], ranks, items)
    ends = ends.flip(1).cummin(1).values.flip(1)
    tails = F.pad(scores.flip(1).logcumsumexp(1).flip(1), (0, 1), value=FAR).gather(1, ends)
    return softplus(tails - scores).where(above, 0).sum(1)


class OrderedPairs(NamedTuple):
    """Losses of all pairs of items of a query, one more relevant than the other."""

    scores: Items
    """In falling order of relevance."""
    sums: Queries
    """Σ of the losses, without gradient."""
    slopes: Items
    """Derivatives of the sums."""
    counts: Float[Tensor, "queries kinds"]
    """Numbers of all pairs and, if asked for, of those with a loss and of those whose scores are not in order."""

    def sum(self) -> Queries:
        """Sum over the pairs, differentiable in the scores."""
        return with_gradient(self.scores, self.sums, self.slopes)

    def mean(self) -> Queries:
        """Mean over the pairs; 0 without any."""
        pairs = self.counts[:, 0].clamp(min=1)
        return with_gradient(self.scores, self.sums / pairs, self.slopes / pairs[:, None])


def ordered_pairs(
    scores: Items,
    relevances: Items,
    loss: Callable[[Tensor, Tensor], OfPairs],
    there: There | None = None,
    most: int | None = None,
    *,
    detailed: bool = False,
) -> OrderedPairs:
    """Losses of all pairs of items, one more relevant than the other; some items at a time against the rest.

    `loss` gets the scores of more and of less relevant items, and returns derivatives too: autograd would keep all
    pairs. `most`: see `rank_net`. If `detailed`, pairs with a loss and those out of order are counted too.
    """
    scores, relevances, above = _in_order(scores, relevances, there)
    # What is not there is less relevant than all, and nothing is more relevant than it.
    others = relevances if there is None else relevances.masked_fill(relevances == -torch.inf, torch.inf)
    with torch.no_grad():
        queries, items = scores.shape
        slopes, sums = torch.zeros_like(scores), scores.new_zeros(queries)
        counts = scores.new_zeros(queries, 3 if detailed else 1)
        if most is None:
            # With few relevant items nearly all pairs are ties.
            most = int(above.sum(1).max()) if queries else 0
        height = max(1, tile_numbers(scores.device, NUMBERS) // max(queries * items, 1))
        most = min(most, items)
        for first in range(0, most, height):
            part, rest = slice(first, min(first + height, most)), slice(first + 1, items)
            ordered = relevances[:, part, None] > others[:, None, rest]
            more, less = scores[:, part, None], scores[:, None, rest]
            losses, falls, rises = (values.where(ordered, 0) for values in loss(more, less))
            sums += losses.sum((1, 2))
            kinds = (ordered, losses > 0, ordered & (less >= more)) if detailed else (ordered,)
            counts += torch.stack([kind.sum((1, 2)) for kind in kinds], 1)
            slopes[:, part] -= falls.sum(2)
            slopes[:, rest] += rises.sum(1)
    return OrderedPairs(scores, sums, slopes, counts)


def excess(more: Tensor, less: Tensor, margin: float) -> OfPairs:
    """[less − more + margin]₊ for the scores of more and of less relevant items."""
    losses = (less - more + margin).relu()
    slopes = losses.sign()
    return losses, slopes, slopes


def logistic(more: Tensor, less: Tensor) -> OfPairs:
    """log(1 + e^(less − more)) for the scores of more and of less relevant items."""
    differences = less - more
    slopes = differences.sigmoid()
    return softplus(differences), slopes, slopes


def unlike(relevances: Items, there: There | None = None) -> tuple[There, There]:
    """Masks of the items that are more relevant than another one of the query, and of those that are less.

    Examples:
        >>> above, below = unlike(torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))
        >>> above.tolist(), below.tolist()
        ([[True, True, False], [False, False, False]], [[False, True, True], [False, False, False]])
    """
    low = high = relevances
    if there is not None:
        low, high = relevances.masked_fill(~there, torch.inf), relevances.masked_fill(~there, -torch.inf)
    return high > low.amin(1, keepdim=True), low < high.amax(1, keepdim=True)


def _mean(losses: Items, there: There | None) -> Queries:
    """Mean over the items."""
    return losses.mean(1) if there is None else losses.where(there, 0).sum(1) / there.sum(1).clamp(min=1)


def _in_order(scores: Items, relevances: Items, there: There | None) -> tuple[Items, Items, There]:
    """Scores, relevances and mask of `unlike`, in falling order of relevance; what is not there comes last."""
    above, _ = unlike(relevances, there)
    if there is not None:
        scores, relevances = scores.masked_fill(~there, FAR), relevances.masked_fill(~there, -torch.inf)
    order = relevances.argsort(dim=1, descending=True, stable=True)
    return scores.gather(1, order), relevances.gather(1, order), above.gather(1, order)
