"""Gains of rankings against scikit-learn, torchmetrics and the mean over all orders, and where they are not defined."""

import itertools
import math

import pytest
import torch
from sklearn.metrics import dcg_score, ndcg_score
from torch import Tensor

from manyviews.evaluators.gains import Gain, cg, dcg, discounted, ideal_dcg, ideal_hits, ndcg

CUTS = (1, 3, 8, 20, None)


def rankings(*, ties: bool, graded: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    relevances = torch.randint(4 if graded else 2, (9, 8), generator=generator).double()
    relevances[:, 0] = 1
    scores = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    return relevances, (scores * 2).round() if ties else scores


def expected_by_orders(relevances: Tensor, scores: Tensor, k: int, gain: Gain) -> float:
    """The mean DCG over all orders of the items that agree with the scores."""
    items, values = range(len(scores)), []
    for order in itertools.permutations(items):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            worth = [relevances[i].item() if gain == "linear" else 2 ** relevances[i].item() - 1 for i in order[:k]]
            values.append(sum(value / math.log2(rank + 2) for rank, value in enumerate(worth)))
    return sum(values) / len(values)


@pytest.mark.parametrize("k", CUTS)
def test_dcg_and_ndcg_equal_scikit_learn_with_ties_averaged(k: int | None) -> None:
    relevances, scores = rankings(ties=True)
    expected = dcg_score(relevances, scores, k=k)
    assert dcg(relevances, scores, k).mean().item() == pytest.approx(expected, rel=1e-12)
    assert ndcg(relevances, scores, k).mean().item() == pytest.approx(ndcg_score(relevances, scores, k=k), rel=1e-12)


@pytest.mark.parametrize("k", CUTS)
def test_dcg_and_ndcg_equal_scikit_learn_where_ties_are_ignored(k: int | None) -> None:
    # On scores without ties: scikit-learn's order of tied items is that of an unstable sort.
    relevances, scores = rankings(ties=False)
    for actual, oracle in ((dcg, dcg_score), (ndcg, ndcg_score)):
        expected = pytest.approx(oracle(relevances, scores, k=k, ignore_ties=True), rel=1e-12)
        assert actual(relevances, scores, k, ties="first").mean().item() == expected
        assert actual(relevances, scores, k, ties="average").mean().item() == expected


@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("ties", [False, True])
def test_ndcg_equals_torchmetrics(k: int | None, ties: bool) -> None:
    oracle = pytest.importorskip("torchmetrics.functional.retrieval").retrieval_normalized_dcg
    relevances, scores = rankings(ties=ties)
    expected = torch.stack([oracle(s, r.long(), top_k=k) for r, s in zip(relevances, scores, strict=True)])
    torch.testing.assert_close(ndcg(relevances, scores, k).float(), expected.float())


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_averaged_ties_are_the_mean_over_all_orders_that_agree_with_the_scores(k: int, gain: Gain) -> None:
    relevances = torch.tensor([[3, 0, 1, 2, 0, 1]], dtype=torch.float64)
    scores = torch.tensor([[0.5, 0.5, 2.0, 0.5, -1.0, -1.0]], dtype=torch.float64)
    actual = dcg(relevances, scores, k, gain=gain).item()
    assert actual == pytest.approx(expected_by_orders(relevances[0], scores[0], k, gain), rel=1e-12)


def test_ties_that_are_not_averaged_keep_the_order_of_the_list() -> None:
    relevances, scores = torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([[1.0, 1.0, 2.0]])
    assert [cg(relevances, scores, k, ties="first").item() for k in (1, 2, 3)] == [1, 1, 4]
    assert [cg(relevances, scores, k).item() for k in (1, 2, 3)] == [1, 2.5, 4]


def test_gains_equal_those_worked_out_by_hand() -> None:
    hits, order = torch.tensor([[3, 0, 2]]), torch.tensor([[3.0, 2.0, 1.0]])
    assert cg(hits, order).item() == 5
    assert cg(hits, order, gain="exponential").item() == 10
    assert dcg(hits, order).item() == 3 / math.log2(2) + 2 / math.log2(4)
    assert dcg(hits, order, gain="exponential").item() == 7 / math.log2(2) + 3 / math.log2(4)
    assert ideal_dcg(torch.tensor([[1, 3, 1, 2]]), 3).item() == pytest.approx(3 + 2 / math.log2(3) + 1 / 2)


def test_cumulative_gain_does_not_know_the_order_of_what_it_adds_up() -> None:
    relevances, scores = rankings(ties=False)
    assert torch.equal(cg(relevances, scores), relevances.sum(1))
    assert torch.equal(cg(relevances, scores, 1), relevances.gather(1, scores.argmax(1, keepdim=True))[:, 0])


def test_both_gains_are_equal_for_binary_relevance_only() -> None:
    for graded in (False, True):
        relevances, scores = rankings(ties=False, graded=graded)
        equal = torch.equal(dcg(relevances, scores), dcg(relevances, scores, gain="exponential"))
        assert equal is not graded


@pytest.mark.parametrize("k", [1, 3, 8])
def test_for_binary_relevance_the_number_of_relevant_items_is_enough(k: int) -> None:
    relevances, scores = rankings(ties=False, graded=False)
    hits = relevances.gather(1, scores.topk(k).indices)
    ratio = discounted(hits) / discounted(ideal_hits(relevances.sum(1).long(), k))
    torch.testing.assert_close(ratio, ndcg(relevances, scores, k), rtol=1e-12, atol=0)


def test_the_best_order_has_the_whole_gain_and_k_beyond_the_list_is_the_list() -> None:
    relevances, _ = rankings(ties=False)
    torch.testing.assert_close(ndcg(relevances, relevances), torch.ones(9, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(dcg(relevances, relevances, 5), ideal_dcg(relevances, 5))
    assert torch.equal(ideal_dcg(relevances, 800), ideal_dcg(relevances))


def test_queries_without_a_relevant_item_have_no_ratio() -> None:
    relevances, scores = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0, 1.0]] * 3)
    values = ndcg(relevances, scores)
    assert values.isnan().tolist() == [True, False, False]
    assert values[1:].tolist() == pytest.approx([1 / math.log2(3), 1])


def test_what_has_no_gain_or_no_rank_is_refused() -> None:
    relevances, scores = rankings(ties=False)
    with pytest.raises(ValueError, match=r"relevances from -1 to 3 .* shift or scale"):
        ndcg(relevances - 1 * (relevances == 0), scores)
    with pytest.raises(ValueError, match=r"from 0 to 3000 .* exponential gain"):
        dcg(relevances * 1000, scores, gain="exponential")
    with pytest.raises(ValueError, match="a score is NaN"):
        cg(relevances, scores * torch.nan)
    with pytest.raises(ValueError, match="k=0 items have no gain"):
        ndcg(relevances, scores, 0)
