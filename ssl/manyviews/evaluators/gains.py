"""Gains of a ranking: cumulative (CG), discounted (DCG), ideal (IDCG), normalised (NDCG).

The figures of Järvelin and Kekäläinen 2002; `gains_at` computes all of them at once. The item at rank r, from 1, is
divided by log2(r + 1), as in Burges et al. 2005 and in libraries; the original left its first ranks undivided. All is
computed in float64.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

Gain = Literal["linear", "exponential"]
Ties = Literal["average", "first"]


def cg(
    relevances: Real[Tensor, "queries items"],
    scores: Float[Tensor, "queries items"],
    k: int | None = None,
    *,
    gain: Gain = "linear",
    ties: Ties = "average",
) -> Float[Tensor, " queries"]:
    """Computes the gain of the k items of highest score; arguments and errors as of `ndcg`."""
    return _ranked(relevances, scores, k, gain, ties).sum(1)


def dcg(
    relevances: Real[Tensor, "queries items"],
    scores: Float[Tensor, "queries items"],
    k: int | None = None,
    *,
    gain: Gain = "linear",
    ties: Ties = "average",
) -> Float[Tensor, " queries"]:
    """Computes the DCG of the k items of highest score; arguments and errors as of `ndcg`.

    Examples:
        >>> dcg(torch.tensor([[3.0, 2.0, 0.0]]), torch.tensor([[0.9, 0.1, 0.5]])).item()
        4.0
    """
    return discounted(_ranked(relevances, scores, k, gain, ties))


def ideal_dcg(
    relevances: Real[Tensor, "queries items"], k: int | None = None, *, gain: Gain = "linear"
) -> Float[Tensor, " queries"]:
    """Computes the DCG of the best order; arguments and errors as of `ndcg`."""
    return dcg(relevances, relevances.double(), k, gain=gain, ties="first")


def ndcg(
    relevances: Real[Tensor, "queries items"],
    scores: Float[Tensor, "queries items"],
    k: int | None = None,
    *,
    gain: Gain = "linear",
    ties: Ties = "average",
) -> Float[Tensor, " queries"]:
    """Computes the DCG divided by that of the best order; NaN if nothing is relevant.

    Args:
        relevances: 0 or more.
        scores: the highest is ranked first.
        k: number of items of each order that count; None, or more than there are: all.
        gain: of an item of relevance r: r, or 2^r − 1 (Burges et al. 2005), the same for 0 and 1.
        ties: "average" takes the expected value over the orders of equal scores (McSherry and Najork 2008), "first"
            their order in the list.

    Raises:
        ValueError: if a relevance is negative or too large for its gain, a score is NaN, or k is below 1.

    Examples:
        >>> ndcg(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.1, 0.9]])).item()
        1.0
    """
    best = ideal_dcg(relevances, k, gain=gain)
    return torch.where(best > 0, dcg(relevances, scores, k, gain=gain, ties=ties) / best, torch.nan)


def gains_at(
    relevances: Real[Tensor, "queries items"],
    scores: Float[Tensor, "queries items"],
    ks: Iterable[int],
    *,
    gain: Gain = "linear",
) -> dict[str, Float[Tensor, " queries"]]:
    """Computes `ndcg`, `cg`, `dcg` and `ideal_dcg` at each k, by "NDCG@10" and so on.

    Both orders are sorted once for all of them; tied items share their mean gain.

    Examples:
        >>> figures = gains_at(torch.tensor([[3.0, 2.0, 0.0]]), torch.tensor([[0.9, 0.1, 0.5]]), [3])
        >>> figures["CG@3"].item(), figures["DCG@3"].item()
        (5.0, 4.0)
    """
    ranked = _ranked(relevances, scores, None, gain, "average")
    best = _ranked(relevances, relevances.double(), None, gain, "first")
    figures: dict[str, Tensor] = {}
    for k in ks:
        gained, ideal = discounted(ranked[:, :k]), discounted(best[:, :k])
        figures[f"NDCG@{k}"] = torch.where(ideal > 0, gained / ideal, torch.nan)
        figures |= {f"CG@{k}": ranked[:, :k].sum(1), f"DCG@{k}": gained, f"IDCG@{k}": ideal}
    return figures


def discounted(gains: Float[Tensor, "queries k"]) -> Float[Tensor, " queries"]:
    """Sums the gains at ranks 1 to k, each divided by log2(rank + 1)."""
    ranks = torch.arange(1, gains.shape[1] + 1, device=gains.device, dtype=gains.dtype)
    return (gains / torch.log2(ranks + 1)).sum(1)


def ideal_hits(relevant: Int[Tensor, " queries"], k: int) -> Float[Tensor, "queries k"]:
    """Returns the first k relevances of the best order, from the number of relevant items."""
    ranks = torch.arange(k, device=relevant.device)
    return (ranks < relevant.unsqueeze(1)).double()


def mean_over_ties(
    numbers: Float[Tensor, "rows items"], ordered: Real[Tensor, "rows items"]
) -> Float[Tensor, "rows items"]:
    """Replaces each number by the mean of those whose values in the sorted rows are equal.

    Examples:
        >>> mean_over_ties(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5, 5, 7]])).tolist()
        [[1.5, 1.5, 3.0]]
    """
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    groups = begins.cumsum(1) - 1
    sums = torch.zeros_like(numbers).scatter_add_(1, groups, numbers)
    sizes = torch.zeros_like(numbers).scatter_add_(1, groups, torch.ones_like(numbers))
    return (sums / sizes.clamp(min=1)).gather(1, groups)


def _ranked(relevances: Tensor, scores: Tensor, k: int | None, gain: Gain, ties: Ties) -> Tensor:
    """The gains at the first k ranks of the order of scores; tied ranks share their mean gain.

    Any weighted sum over ranks is then its expected value over the orders of tied items.
    """
    if k is not None and k < 1:
        raise ValueError(f"k={k} items have no gain; use k=1 or more")
    gains = _gains(relevances, gain)
    if bool(scores.isnan().any()):
        raise ValueError("a score is NaN, which has no rank; look for the query or item whose features are not finite")
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked = gains.gather(1, order)
    if ties == "first" or not scores.shape[1]:
        return ranked[:, :k]
    return mean_over_ties(ranked, scores.gather(1, order))[:, :k]


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
