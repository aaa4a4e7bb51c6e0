"""Ranking losses against loops over queries, items and pairs in float64, and at their limits."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from manyviews.objectives import Population, query_losses
from manyviews.objectives.in_batch import nt_xent
from manyviews.objectives.query_losses import binary_hinge, hinge, list_mle, list_net, rank_net
from manyviews.objectives.ranking import Ranking, RankingLoss

IMAGES = 12
PAIRWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "rank_net": lambda difference: torch.log(1 + torch.exp(-difference)),
    "hinge": lambda difference: (1 - difference).clamp(min=0),
}
KINDS = ("binary", "graded")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    """In two dimensions; two images have equal ones."""
    values = numbers(IMAGES, 2, seed=1)
    values[5] = values[4]
    return values


def query_oracle(name: RankingLoss, s: Tensor, r: Tensor, label_temperature: float = 1.0) -> Tensor:
    """The loss of one query; a relevance is a number, equal where it is equal."""
    items = range(len(s))
    if name == "squared_error":
        return torch.stack([(s[i] - r[i]) ** 2 for i in items]).mean()
    if name == "cross_entropy":
        p = torch.sigmoid(s)
        return torch.stack([-r[i] * p[i].log() - (1 - r[i]) * (1 - p[i]).log() for i in items]).mean()
    if name in PAIRWISE:
        losses = [PAIRWISE[name](s[i] - s[j]) for i in items for j in items if r[i] > r[j]]
        return torch.stack(losses).mean()
    if name == "list_net":
        goals, found = (r / label_temperature).exp(), s.exp()
        return -sum((goals[i] / goals.sum() * (found[i] / found.sum()).log() for i in items), torch.zeros(()).double())
    terms = [
        torch.log(sum((s[j].exp() for j in items if r[j] <= r[i]), 0 * s[i])) - s[i] for i in items if r[i] > r.min()
    ]
    return torch.stack(terms).mean()


def oracle(name: RankingLoss, z: Tensor, ids: Tensor, values: Tensor | None, threshold: Tensor | None) -> Tensor:
    rows, all_ids = z.flatten(0, 1), ids.repeat(len(z))
    rows = rows / rows.norm(dim=1, keepdim=True)
    losses = []
    for a in range(len(rows)):
        items = [i for i in range(len(rows)) if i != a]
        if values is None:
            relevances = torch.tensor([float(all_ids[i] == all_ids[a]) for i in items]).double()
        else:
            distances = [(values[all_ids[i]] - values[all_ids[a]]).norm() for i in items]
            relevances = torch.stack([1 / (1 + distance) for distance in distances])
        scores = torch.stack([rows[a] @ rows[i] for i in items])
        if threshold is not None:
            scores = scores - threshold
        if name != "squared_error":
            scores = scores / 0.3
        if len(items) and relevances.max() > relevances.min():
            losses.append(query_oracle(name, scores, relevances, 0.2))
    return torch.stack(losses).mean()


def build(name: RankingLoss, values: Tensor | None = None, **given: Any) -> torch.nn.Module:
    settings = Ranking(**({"loss": name, "temperature": 0.3, "label_temperature": 0.2} | given))
    return settings.build(dim=5, population=Population(torch.arange(IMAGES), values), seed=0).double()


@pytest.mark.parametrize("name", get_args(RankingLoss))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("views", [1, 2])
def test_loss_and_gradients_equal_the_loops(name: RankingLoss, kind: str, views: int) -> None:
    z, ids = numbers(views, 7, 5).requires_grad_(), torch.tensor([4, 5, 11, 4, 0, 7, 11])
    values = labels() if kind == "graded" else None
    module = build(name, values)
    learned = [z, *module.parameters()]
    assert len(learned) == 1 + (name == "cross_entropy")
    found, expected = module(z, ids, None, 0).total, oracle(name, z, ids, values, getattr(module, "threshold", None))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(*(torch.autograd.grad(loss, learned) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", get_args(RankingLoss))
@pytest.mark.parametrize("numbers_at_once", [1, 60, 1 << 20])
def test_each_query_equals_its_loop_with_ties_in_scores_and_relevances(
    name: RankingLoss, numbers_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_losses, "NUMBERS", numbers_at_once)
    scores = (2 * numbers(5, 9)).round() / 2 + 0.01 * numbers(5, 9, seed=1)
    scores[:, 3] = scores[:, 4]
    scores.requires_grad_()
    relevances = torch.randint(4, (5, 9), generator=torch.Generator().manual_seed(1)).double() / 3
    found = getattr(query_losses, name)(scores, relevances)
    expected = torch.stack([query_oracle(name, *query) for query in zip(scores, relevances, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((loss * torch.arange(5)).sum(), scores)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hinge_by_sorting_is_the_hinge_over_pairs(dtype: torch.dtype) -> None:
    # Steps of 0.1 put many pairs on the bound, where their loss is 0 and rounding decides whether they count.
    scores = (10 * numbers(20, 30)).round().div(10).to(dtype)
    relevances = (numbers(20, 30, seed=1) > 0.5).to(dtype)
    relevances[0], relevances[1] = 0, 1
    found, expected = binary_hinge(scores, relevances), hinge(scores, relevances)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not found[:2].any()
    shifted = (scores.detach() + 0.004 * numbers(20, 30, seed=2).to(dtype)).requires_grad_()
    losses = [function(shifted, relevances).sum() for function in (binary_hinge, hinge)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, shifted)[0] for loss in losses), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_with_one_relevant_item_both_losses_of_lists_are_nt_xent(temperature: float) -> None:
    z, ids = numbers(2, 7, 5).requires_grad_(), torch.arange(7)
    expected = nt_xent(z, ids, temperature).total
    for name in ("list_mle", "list_net"):
        found = build(name, temperature=temperature, label_temperature=0.02)(z, ids, None, 0).total
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_list_mle_without_ties_is_the_likelihood_of_the_order() -> None:
    scores, relevances = numbers(4, 6), numbers(4, 6, seed=1)
    for s, r, found in zip(scores, relevances, list_mle(scores, relevances), strict=True):
        left, logarithm = s[r.argsort(descending=True)], 0.0
        while len(left) > 1:
            logarithm += left.log_softmax(0)[0].item()
            left = left[1:]
        assert found.item() == pytest.approx(-logarithm / 5, rel=1e-12)


def test_list_net_is_least_where_the_scores_are_the_relevances() -> None:
    relevances = numbers(3, 6)
    least = list_net(relevances, relevances)
    torch.testing.assert_close(least, torch.distributions.Categorical(logits=relevances).entropy())
    torch.testing.assert_close(list_net(relevances + 7, relevances), least)
    assert (list_net(relevances + 0.1 * numbers(3, 6, seed=1), relevances) > least).all()


def test_equal_scores_cost_what_a_guess_does() -> None:
    scores, relevances = torch.zeros(1, 8), F.one_hot(torch.tensor([3]), 8).float()
    assert rank_net(scores, relevances).item() == pytest.approx(math.log(2))
    assert hinge(scores, relevances).item() == binary_hinge(scores, relevances).item() == 1
    assert list_mle(scores, relevances).item() == pytest.approx(math.log(8))


def test_the_cross_entropy_is_torchs_and_begins_where_few_are_relevant() -> None:
    z, ids = numbers(2, 7, 5), torch.arange(7)
    module = build("cross_entropy")
    rows = F.normalize(z.flatten(0, 1), dim=1)
    others = ~torch.eye(14, dtype=torch.bool)
    same = ids.repeat(2)[:, None] == ids.repeat(2)
    expected = F.binary_cross_entropy_with_logits(((rows @ rows.T - 1) / 0.3)[others], same.double()[others])
    found = module(z, ids, None, 0)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=0)
    assert found.terms["threshold"] == 1


@pytest.mark.parametrize("name", get_args(RankingLoss))
def test_batches_with_nothing_to_rank_have_no_loss_and_no_gradient(name: RankingLoss) -> None:
    cases = [(torch.arange(6), None), (torch.arange(1), None), (torch.zeros(6, dtype=torch.int64), None)]
    cases += [(torch.tensor([4, 5, 4]), labels()), (torch.tensor([3]), labels())]
    for ids, values in cases:
        z = numbers(1, len(ids), 5).requires_grad_()
        found = build(name, values)(z, ids, None, 0)
        assert found.total == 0
        assert not torch.autograd.grad(found.total, z)[0].any()
        assert all(term.isfinite() for term in found.terms.values())


def test_terms_say_what_the_queries_meet() -> None:
    z, ids = numbers(1, 7, 5), torch.tensor([0, 0, 0, 1, 1, 2, 3])
    rows = F.normalize(z[0], dim=1)
    same = (ids[:, None] == ids).double().fill_diagonal_(0)
    terms = build("list_net")(z, ids, None, 0).terms
    torch.testing.assert_close(terms["positive_similarity"], (rows @ rows.T * same).sum() / same.sum())
    assert terms["negatives"].item() == pytest.approx((3 * 4 + 2 * 5) / 5)


def test_a_checkpoint_holds_the_digest_of_the_labels_and_the_threshold() -> None:
    assert not build("list_net").state_dict()
    assert build("cross_entropy").state_dict().keys() == {"threshold"}
    state = build("list_net", labels()).state_dict()
    build("list_net", labels()).load_state_dict(state)
    with pytest.raises(ValueError, match="differ from those at the start of the run"):
        build("list_net", labels() + 1e-9).load_state_dict(state)
