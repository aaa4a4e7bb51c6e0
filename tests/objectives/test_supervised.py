"""Supervised contrast against the paper's sums in float64, against another library, and at its limits."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triples import rival

from manyviews.objectives import Population, Supervised
from manyviews.objectives.in_batch import nt_xent
from manyviews.objectives.supervised import class_sums, supervised_contrast

LABELS = {"distinct": range(7), "repeated": [4, 4, 9, 4, 1, 0, 9], "one class": [3] * 7}


def embeddings(views: int = 2, batch: int = 7, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(views)
    return torch.randn(views, batch, dim, dtype=torch.float64, generator=generator).requires_grad_()


def oracle(views: Tensor, ids: Tensor, temperature: float) -> Tensor:
    rows = [(ids[b], views[v, b] / views[v, b].norm()) for v in range(len(views)) for b in range(len(ids))]
    losses = []
    for i, (label, anchor) in enumerate(rows):
        others = [(other, torch.exp(anchor @ z / temperature)) for j, (other, z) in enumerate(rows) if j != i]
        denominator = sum(value for _, value in others)
        positives = [-torch.log(value / denominator) for other, value in others if other == label]
        if positives:
            losses.append(torch.stack(positives).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("views", "kind"),
    # One view of distinct images has no positive at all.
    [(views, kind) for views in (1, 2, 3) for kind in LABELS if (views, kind) != (1, "distinct")],
)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_loss_and_gradient_equal_the_double_loop(views: int, temperature: float, kind: str) -> None:
    z, ids = embeddings(views), torch.tensor(list(LABELS[kind]))
    found, expected = supervised_contrast(z, ids, temperature).total, oracle(z, ids, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_one_positive_for_each_anchor_makes_it_nt_xent(temperature: float) -> None:
    z, ids = embeddings(), torch.arange(7)
    found, expected = supervised_contrast(z, ids, temperature).total, nt_xent(z, ids, temperature).total
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-9, atol=1e-12)


def test_anchors_without_a_positive_are_left_out_of_the_mean_but_stay_candidates() -> None:
    z, ids = embeddings(views=1), torch.tensor([0, 0, 1, 2, 3, 4, 5])
    rows = F.normalize(z[0], dim=1)
    logits = (rows @ rows.T / 0.3).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits[:2], torch.tensor([1, 0]))
    torch.testing.assert_close(supervised_contrast(z, ids, 0.3).total, expected)


def test_a_batch_without_any_positive_has_no_loss_and_no_gradient() -> None:
    z = embeddings(views=1)
    for batch in (7, 1):
        loss = supervised_contrast(z[:, :batch], torch.arange(batch), 0.1)
        assert loss.total == 0
        assert loss.terms["positive_similarity"] == 0
        assert not torch.autograd.grad(loss.total, z)[0].any()


def test_terms_say_what_the_anchors_meet() -> None:
    z, ids = embeddings(), torch.tensor([1, 1, 1, 4, 5, 6, 7])
    terms = supervised_contrast(z, ids, 0.1).terms
    rows, labels = F.normalize(z.flatten(0, 1), dim=1), ids.repeat(2)
    same = (labels[:, None] == labels).double().fill_diagonal_(0)
    expected = ((rows @ rows.T * same).sum(1) / same.sum(1)).mean()
    torch.testing.assert_close(terms["positive_similarity"], expected.detach())
    torch.testing.assert_close(terms["negatives"].item(), (3 * 8 + 4 * 12) / 7)


def test_class_sums_count_and_add_all_embeddings_of_an_id() -> None:
    z, ids = embeddings(views=3), torch.tensor([9, -1, 9, 4, 9, -1, 0])
    sums, members = class_sums(z, ids)
    assert members.tolist() == [9, 6, 9, 3, 9, 6, 3]
    expected = torch.stack([z[:, ids == label].sum((0, 1)) for label in ids])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)


def test_equal_embeddings_cost_the_logarithm_of_the_candidates() -> None:
    z = torch.ones(2, 16, 4, dtype=torch.float64)
    torch.testing.assert_close(supervised_contrast(z, torch.arange(16) % 4, 0.1).total.item(), math.log(31))


def test_the_module_passes_its_settings_on() -> None:
    z, ids = embeddings(), torch.arange(7) % 3
    found = (
        Supervised(temperature=0.3).build(dim=5, population=Population(torch.arange(7)), seed=0)(z, ids, None, 0).total
    )
    assert torch.equal(found, supervised_contrast(z, ids, 0.3).total)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_it_equals_pytorch_metric_learning(views: int) -> None:
    loss = rival("pytorch_metric_learning.losses").SupConLoss(temperature=0.2)
    z, ids = embeddings(views, batch=20, dim=16).detach().float().requires_grad_(), torch.arange(20) % 6
    found, expected = supervised_contrast(z, ids, 0.2).total, loss(z.flatten(0, 1), ids.repeat(views))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("views", [1, 2])
def test_information_is_the_bound_over_all_candidates_and_its_ceiling_what_the_positives_leave(views: int) -> None:
    z, ids = embeddings(views), torch.tensor([1, 1, 1, 4, 4, 6, 7])
    found = supervised_contrast(z, ids, 0.1)
    # With one view the last two images have no positive, and do not count.
    counted = [(7 * views - 1, n * views - 1) for n in (3, 3, 3, 2, 2, 1, 1) if n * views > 1]
    ceiling = sum(math.log(n / p) for n, p in counted) / len(counted)
    assert found.terms["ceiling"].item() == pytest.approx(ceiling)
    assert found.terms["information"].item() == pytest.approx(math.log(7 * views - 1) - found.total.item())


def test_embeddings_that_know_their_class_and_no_more_reach_the_ceiling() -> None:
    ids = torch.arange(40) % 5
    terms = supervised_contrast(torch.eye(5, dtype=torch.float64)[ids].repeat(2, 1, 1), ids, 0.02).terms
    assert terms["information"].item() == pytest.approx(terms["ceiling"].item(), abs=1e-9)
    assert terms["ceiling"].item() == pytest.approx(math.log(79 / 15))
