"""Rank correlations of two orders of the same items: Kendall's τ-b and Spearman's ρ."""

import torch
from jaxtyping import Float, Float64, Real
from scipy.stats import kendalltau
from torch import Tensor

from manyviews.evaluators.gains import mean_over_ties


def kendall_tau(first: Real[Tensor, "rows items"], second: Real[Tensor, "rows items"]) -> Float64[Tensor, " rows"]:
    """Computes Kendall's τ-b of two numbers of each item, in every row (Kendall 1945).

    τ-b = (C − D) / √((n₀ − n₁)(n₀ − n₂)) with C pairs of items in the same order by both numbers, D in opposite order,
    n₀ pairs in all, and n₁ and n₂ pairs that are tied by either. It is computed by scipy, by sorting and merging, in
    O(n log n), and returned on the CPU. NaN for a row with equal numbers throughout.

    Examples:
        >>> kendall_tau(torch.tensor([[1, 2, 3]]), torch.tensor([[0.1, 0.3, 0.2]])).item()
        0.33333333333333337
    """
    pairs = zip(first.double().cpu().numpy(), second.double().cpu().numpy(), strict=True)
    values = [float(kendalltau(one, other).statistic) for one, other in pairs]
    return torch.tensor(values, dtype=torch.float64)


def spearman_rho(first: Real[Tensor, "rows items"], second: Real[Tensor, "rows items"]) -> Float64[Tensor, " rows"]:
    """Computes Spearman's ρ: the correlation of the ranks by two numbers (Spearman 1904).

    Equal numbers share their mean rank. NaN for a row with equal numbers throughout.

    Examples:
        >>> round(spearman_rho(torch.tensor([[1, 2, 3]]), torch.tensor([[0.1, 0.3, 0.2]])).item(), 3)
        0.5
    """
    one, other = (ranks - ranks.mean(1, keepdim=True) for ranks in (average_ranks(first), average_ranks(second)))
    return (one * other).sum(1) / (one.square().sum(1) * other.square().sum(1)).sqrt()


def average_ranks(numbers: Real[Tensor, "rows items"]) -> Float[Tensor, "rows items"]:
    """Returns the rank of each number in its row, from 1; equal ones share their mean rank.

    Examples:
        >>> average_ranks(torch.tensor([[7, 3, 7]])).tolist()
        [[2.5, 1.0, 2.5]]
    """
    ordered, order = numbers.sort(dim=1)
    places = torch.arange(1, numbers.shape[1] + 1, dtype=torch.float64, device=numbers.device).expand_as(ordered)
    return torch.empty_like(places.contiguous()).scatter_(1, order, mean_over_ties(places, ordered))
