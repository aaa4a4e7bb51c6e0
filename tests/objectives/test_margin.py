"""The margin-based loss against loops over all pairs in float64, against another library, and at its limits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triples import (
    REPEATED,
    Triple,
    compare,
    compare_kinds,
    embeddings,
    every_sampler,
    prepared,
    rival,
    sampled,
    table_of,
)

from manyviews.engine import tiles
from manyviews.objectives import Population
from manyviews.objectives.margin import Margin, margin_loss
from manyviews.objectives.mining import All, Hardest, Sampling


def boundaries() -> Tensor:
    """One for each id, each another one."""
    return torch.linspace(0.9, 1.5, 10, dtype=torch.float64).requires_grad_()


def loss(z: Tensor, ids: Tensor, beta: Tensor, **options: Any) -> Tensor:
    return margin_loss(z, ids, beta[ids], Margin(**options), seed=3, step=7).total


def oracle(
    table: Tensor, triples: list[Triple], ids: list[int], beta: Tensor, *, margin: float, nu: float, every: bool
) -> Tensor:
    positives, negatives = [(a, p) for a, p, _ in triples], [(a, n) for a, _, n in triples]
    if every:
        positives, negatives = sorted(set(positives)), sorted(set(negatives))
    losses = [(margin + table[a, p] - beta[ids[a]]).clamp(min=0) for a, p in positives]
    losses += [(margin - table[a, n] + beta[ids[a]]).clamp(min=0) for a, n in negatives]
    total = torch.stack(losses).sum() + nu * torch.stack([beta[ids[a]] for a, _ in positives]).sum()
    return total / sum(float(found.detach()) > 0 for found in losses)


@pytest.mark.parametrize("numbers", [60, 1 << 18], ids=["small tiles", "one tile"])
@pytest.mark.parametrize(("margin", "nu"), [(0.2, 0.0), (0.2, 0.3), (0.0, 0.0)])
@every_sampler
def test_loss_and_gradients_equal_the_sum_over_pairs(
    kind: Sampling, margin: float, nu: float, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "NUMBERS", numbers)
    z, beta = embeddings(), boundaries()
    triples = sampled(kind, prepared(z, REPEATED))
    every = kind.name == "all"
    expected = oracle(table_of(z), triples, REPEATED.repeat(2).tolist(), beta, margin=margin, nu=nu, every=every)
    compare(loss(z, REPEATED, beta, sampling=kind, margin=margin, nu=nu), expected, z, beta)


def test_where_no_pair_is_active_all_is_zero_nu_or_not() -> None:
    z = torch.tensor([[[1.0, 0], [1, 0.1], [-1, 0], [-1, 0.1]]], requires_grad=True)
    beta = torch.full((2,), 1.0, requires_grad=True)
    found = loss(z, torch.tensor([0, 0, 1, 1]), beta, sampling=All(), nu=0.5)
    gradients = torch.autograd.grad(found, [z, beta])
    assert found == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("per", "length"), [("all", 1), ("class", 10)])
def test_boundaries_are_parameters_for_all_anchors_or_for_each_id(per: Any, length: int) -> None:
    z = embeddings()
    settings = Margin(beta=1.1, beta_per=per, nu=0.1)
    objective = settings.build(dim=5, population=Population(torch.arange(10)), seed=3).double()
    ((name, beta),) = objective.named_parameters()
    assert name == "beta"
    assert objective.shards() == {}
    assert beta.tolist() == pytest.approx([1.1] * length)
    result = objective(z, REPEATED, None, 7)
    # 1.1 has been rounded to float32 on its way.
    expected = loss(z, REPEATED, beta.expand(10), nu=0.1)
    compare(result.total, expected, z, beta)
    assert result.terms["beta"].item() == pytest.approx(1.1)
    (gradient,) = torch.autograd.grad(objective(z, REPEATED, None, 7).total, beta)
    assert set(gradient.nonzero()[:, 0].tolist()) <= (set(REPEATED.tolist()) if per == "class" else {0})
    assert objective(z, REPEATED, None, 8).total != result.total


def test_each_class_has_its_boundary() -> None:
    z, ids = embeddings(1, 6), torch.tensor([0, 0, 1, 1, 2, 2])
    objective = Margin(beta_per="class").build(dim=5, population=Population(torch.arange(50) % 4), seed=0).double()
    (beta,) = objective.parameters()
    assert beta.shape == (4,)
    assert torch.autograd.grad(objective(z, ids, None, 0).total, beta)[0][3] == 0


def test_nu_is_the_excess_of_active_positive_pairs_at_which_a_boundary_rests() -> None:
    z, ids = embeddings(1, 60, 8).detach(), torch.arange(60) // 4
    table, nu = table_of(z), 0.2
    triples = sampled(All(), prepared(z, ids))
    near = torch.stack([table[a, p] for a, p in sorted({(a, p) for a, p, _ in triples})])
    far = torch.stack([table[a, n] for a, n in sorted({(a, n) for a, _, n in triples})])
    for boundary in (0.5, 0.8, 1.2):
        beta = torch.full((15,), boundary, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(z, ids, beta, sampling=All(), nu=nu), beta)
        positives, negatives = int((near > boundary - 0.2).sum()), int((far < boundary + 0.2).sum())
        expected = (negatives - positives + nu * len(near)) / (positives + negatives)
        assert gradient.sum().item() == pytest.approx(expected)


def test_the_best_boundary_is_a_quantile_of_the_augmented_distances() -> None:
    z, ids, margin = embeddings(1, 60, 8).detach(), torch.arange(60) // 4, 0.2
    table = table_of(z)
    pairs = {(a, b): ids[a] == ids[b] for a in range(60) for b in range(60) if a != b}
    moved = sorted(float(table[pair]) + (margin if same else -margin) for pair, same in pairs.items())
    positives = sum(map(bool, pairs.values()))
    best = (moved[positives - 1] + moved[positives]) / 2

    def total(boundary: float) -> tuple[float, float]:
        beta = torch.full((15,), boundary, dtype=torch.float64, requires_grad=True)
        found = margin_loss(z, ids, beta[ids], Margin(sampling=All()), seed=0, step=0)
        (gradient,) = torch.autograd.grad(found.total, beta)
        return float(found.total.detach() * found.terms["active"]), float(gradient.sum())

    least, slope = total(best)
    assert slope == pytest.approx(0, abs=1e-12)
    assert all(total(best + step)[0] > least for step in (-0.2, -0.05, 0.05, 0.2))


@pytest.mark.parametrize("learned", [False, True])
def test_it_equals_pytorch_metric_learning_on_batch_hard_pairs(learned: bool) -> None:
    losses = rival("pytorch_metric_learning.losses")
    miners = rival("pytorch_metric_learning.miners")
    z, ids = embeddings().detach().float().requires_grad_(), REPEATED.repeat(2)
    rows = z.flatten(0, 1)
    theirs = losses.MarginLoss(margin=0.2, beta=1.2, learn_beta=learned, num_classes=10 if learned else None)
    # It counts a pair as often as a triplet holds it, so that only one negative for each positive gives the same.
    expected = theirs(rows, ids, miners.BatchHardMiner()(rows, ids))
    beta = torch.full((10,), 1.2, requires_grad=True)
    found = loss(z, REPEATED, beta, sampling=Hardest())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(value, [z, *rest])
        for value, rest in ((found, [beta] if learned else []), (expected, [theirs.beta] if learned else []))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@every_sampler
def test_a_farther_negative_is_easy_where_it_costs_nothing_and_semi_hard_elsewhere(kind: Sampling) -> None:
    z, beta = embeddings(), boundaries().detach()
    terms = margin_loss(z, REPEATED, beta, Margin(sampling=kind), seed=3, step=7).terms
    triples, table = sampled(kind, prepared(z, REPEATED)), table_of(z.detach())
    kinds = []
    for a, p, n in triples:
        costs = table[a, n] < float(beta[a % 10]) + 0.2
        kinds.append("hard" if table[a, n] <= table[a, p] else "semi_hard" if costs else "easy")
    compare_kinds(terms, kinds)
