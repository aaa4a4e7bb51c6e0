"""Rank correlations against loops over all pairs and scipy, with and without ties."""

import math

import pytest
import torch
from scipy.stats import kendalltau, rankdata, spearmanr
from torch import Tensor

from manyviews.evaluators.rank_correlation import average_ranks, kendall_tau, spearman_rho


def orders(*, ties: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    first = torch.randn(7, 30, generator=generator)
    second = 0.5 * first + torch.randn(7, 30, generator=generator)
    return ((2 * first).round(), (second > 0.3).double()) if ties else (first, second)


def tau_by_pairs(first: list[float], second: list[float]) -> float:
    agreement = pairs = tied = tied_by_second = 0
    for i in range(len(first)):
        for j in range(i):
            one, other = first[i] - first[j], second[i] - second[j]
            agreement += (one * other > 0) - (one * other < 0)
            pairs, tied, tied_by_second = pairs + 1, tied + (one == 0), tied_by_second + (other == 0)
    return agreement / math.sqrt((pairs - tied) * (pairs - tied_by_second))


@pytest.mark.parametrize("ties", [False, True])
def test_tau_is_that_of_a_loop_over_all_pairs_of_items_and_of_scipy(ties: bool) -> None:
    first, second = orders(ties=ties)
    actual = kendall_tau(first, second).tolist()
    rows = list(zip(first.tolist(), second.tolist(), strict=True))
    assert actual == pytest.approx([tau_by_pairs(*row) for row in rows], rel=1e-12)
    assert actual == pytest.approx([kendalltau(*row).statistic for row in rows], rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_rho_and_its_ranks_are_those_of_scipy(ties: bool) -> None:
    first, second = orders(ties=ties)
    expected = [spearmanr(*row).statistic for row in zip(first.tolist(), second.tolist(), strict=True)]
    assert spearman_rho(first, second).tolist() == pytest.approx(expected, rel=1e-12)
    assert average_ranks(second).tolist() == rankdata(second.numpy(), axis=1).tolist()


def test_correlations_know_the_order_alone_and_its_reverse() -> None:
    first, second = orders(ties=False)
    for measure in (kendall_tau, spearman_rho):
        torch.testing.assert_close(measure(first.exp(), second * 7 - 3), measure(first, second), rtol=1e-12, atol=0)
        torch.testing.assert_close(measure(first, -second), -measure(first, second), rtol=1e-12, atol=0)
        assert measure(first, first).tolist() == pytest.approx([1] * len(first))


def test_equal_numbers_throughout_have_no_correlation() -> None:
    for measure in (kendall_tau, spearman_rho):
        assert measure(torch.ones(1, 4), torch.arange(4)[None]).isnan().all()
