"""Gains of a ranking: cumulative (CG), discounted (DCG), of the ideal order, and the ratio of the two (NDCG).

The figures of Järvelin and Kekäläinen 2002. The item at rank r, from 1, is divided by log2(r + 1), as libraries have it
and as Burges et al. 2005 wrote it; the original left its first ranks undivided. All is computed in float64.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

Gain = Literal["linear", "exponential"]
Ties = Literal["average", "first"]


def ndcg_at_k(
    hits: Real[Tensor, "queries k"], ideal: Real[Tensor, "queries best"], gain: Gain = "linear"
) -> Float[Tensor, " queries"]:
    """The DCG of the first k items as a share of that of the best order of all items; NaN where nothing is relevant.

    This needs the first k items only, and of all others no more than what the ideal order begins with: for graded
    relevances the k largest ones, for relevances of 0 and 1 their number (`ideal_hits`).

    Args:
        hits: relevances of the first k items of each query in the order of their ranks; k is their number.
        ideal: the largest relevances of all items of each query, in descending order. Columns beyond k do not count;
            fewer columns mean that all other items have relevance 0.
        gain: as of `ndcg`.

    Raises:
        ValueError: if a relevance is negative or so large that its gain is not finite.
    """
    best = _discounted(_gains(ideal[:, : hits.shape[1]], gain))
    return torch.where(best > 0, _discounted(_gains(hits, gain)) / best, torch.nan)


def ideal_hits(relevant: Int[Tensor, " queries"], k: int) -> Float[Tensor, "queries k"]:
    """The relevances that the best order begins with, where each query has so many items of relevance 1."""
    ranks = torch.arange(k, device=relevant.device)
    return (ranks < relevant.unsqueeze(1)).double()


def cg(
    relevances: Real[Tensor, "queries items"],
    scores: Float[Tensor, "queries items"],
    k: int | None = None,
    *,
    gain: Gain = "linear",
    ties: Ties = "average",
) -> Float[Tensor, " queries"]:
    """The cumulative gain of the k items of highest score; arguments and errors as of `ndcg`."""
    return _ranked(relevances, scores, gain, ties)[:, : _checked(k)].sum(1)


def dcg(
    relevances: Real[Tensor, "queries items"],
    scores: Float[Tensor, "queries items"],
    k: int | None = None,
    *,
    gain: Gain = "linear",
    ties: Ties = "average",
) -> Float[Tensor, " queries"]:
    """The discounted cumulative gain of the k items of highest score; arguments and errors as of `ndcg`."""
    return _discounted(_ranked(relevances, scores, gain, ties)[:, : _checked(k)])


def ideal_dcg(
    relevances: Real[Tensor, "queries items"], k: int | None = None, *, gain: Gain = "linear"
) -> Float[Tensor, " queries"]:
    """The DCG of the best order: by descending relevance; arguments and errors as of `ndcg`."""
    return _discounted(_gains(relevances.sort(dim=1, descending=True).values[:, : _checked(k)], gain))


def ndcg(
    relevances: Real[Tensor, "queries items"],
    scores: Float[Tensor, "queries items"],
    k: int | None = None,
    *,
    gain: Gain = "linear",
    ties: Ties = "average",
) -> Float[Tensor, " queries"]:
    """The DCG of the order of scores as a share of that of the best order; NaN where nothing is relevant.

    Args:
        relevances: how relevant each item is to each query, 0 or more.
        scores: by which the items are ranked, the highest first.
        k: how many items of each order count; none, or more than there are: all.
        gain: what an item of relevance r is worth: r, or 2^r − 1 (Burges et al. 2005), the same for 0 and 1.
        ties: of items of equal score: "average" takes the expected value over their orders (McSherry and Najork 2008),
            "first" their order in the list.

    Raises:
        ValueError: if a relevance is negative or too large for its gain, a score is NaN, or k is below 1.
    """
    best = ideal_dcg(relevances, k, gain=gain)
    return torch.where(best > 0, dcg(relevances, scores, k, gain=gain, ties=ties) / best, torch.nan)


def _ranked(relevances: Tensor, scores: Tensor, gain: Gain, ties: Ties) -> Tensor:
    """The gain at each rank of the order of scores; with ties averaged, each tied rank has their mean gain.

    Any sum over ranks, weighted or cut off at k, is then its expected value over the orders of tied items.
    """
    if bool(scores.isnan().any()):
        raise ValueError("a score is NaN, which has no rank; look for the query or item whose features are not finite")
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked = _gains(relevances, gain).gather(1, order)
    if ties == "first" or not scores.shape[1]:
        return ranked
    sorted_scores = scores.gather(1, order)
    begins = torch.ones_like(sorted_scores, dtype=torch.bool)
    begins[:, 1:] = sorted_scores[:, 1:] != sorted_scores[:, :-1]
    groups = begins.cumsum(1) - 1
    sums = torch.zeros_like(ranked).scatter_add_(1, groups, ranked)
    sizes = torch.zeros_like(ranked).scatter_add_(1, groups, torch.ones_like(ranked))
    return (sums / sizes.clamp(min=1)).gather(1, groups)


def _gains(relevances: Tensor, gain: Gain) -> Tensor:
    relevances = relevances.double()
    gains = relevances if gain == "linear" else torch.special.exp2(relevances) - 1
    if not bool(((relevances >= 0) & gains.isfinite()).all()):
        lowest, highest = relevances.min().item(), relevances.max().item()
        raise ValueError(
            f"relevances from {lowest:g} to {highest:g} do not all have a {gain} gain that is finite and not negative; "
            "shift or scale them: 0 is not relevant at all"
        )
    return gains


def _discounted(gains: Tensor) -> Tensor:
    ranks = torch.arange(1, gains.shape[1] + 1, device=gains.device, dtype=gains.dtype)
    return (gains / torch.log2(ranks + 1)).sum(1)


def _checked(k: int | None) -> int | None:
    if k is not None and k < 1:
        raise ValueError(f"k={k} items have no gain; use k=1 or more")
    return k
