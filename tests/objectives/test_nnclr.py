"""Nearest-neighbour contrast against the paper's sums in float64, and what the support set holds when."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from manyviews.objectives import NearestNeighbours, Population

DISTINCT, REPEATED = list(range(7)), [4, 4, 9, 4, 1, 0, 9]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(size: int = 12, temperature: float = 0.1, dim: int = 5):
    settings = NearestNeighbours(size=size, temperature=temperature)
    return settings.build(dim=dim, population=Population(torch.arange(7)), seed=0).double()


def oracle(predictions: Tensor, projections: Tensor, ids: Tensor, support: Tensor, temperature: float) -> Tensor:
    views, batch, _ = predictions.shape
    predictions, projections = F.normalize(predictions, dim=2), F.normalize(projections, dim=2)
    support = F.normalize(support, dim=1)
    losses = []
    for i in range(views):
        for j in range(views):
            for b in range(batch):
                if i == j:
                    continue
                neighbour = support[(support @ projections[i, b]).argmax()] if len(support) else projections[i, b]
                logits = predictions[j] @ neighbour / temperature
                candidates = [logits[k] for k in range(batch) if k == b or ids[k] != ids[b]]
                losses.append(torch.stack(candidates).logsumexp(0) - logits[b])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("ids", [DISTINCT, REPEATED], ids=["distinct", "repeated"])
def test_loss_and_gradient_equal_the_double_loop_as_the_support_set_fills_and_wraps(
    views: int, temperature: float, ids: list[int]
) -> None:
    objective, numbers, entered = build(temperature=temperature), torch.tensor(ids), random(0, 5)
    for step in range(4):
        predictions = random(views, 7, 5, seed=step).requires_grad_()
        projections = random(views, 7, 5, seed=100 + step)
        found = objective(predictions, numbers, projections, step).total
        expected = oracle(predictions, projections, numbers, entered, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(loss, predictions) for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        objective.update(predictions.detach(), numbers, projections)
        entered = torch.cat([entered, projections[0]])[-12:]


def test_the_support_set_takes_view_0_once_per_step() -> None:
    objective, projections = build(), random(2, 7, 5)
    objective(random(2, 7, 5), torch.arange(7), projections, 0)
    assert objective.ring.filled == 0
    objective.update(random(2, 7, 5), torch.arange(7), projections)
    assert objective.ring.filled == 7
    assert objective.ring.ids.tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1, -1, -1, -1]
    torch.testing.assert_close(objective.ring.rows[:7], F.normalize(projections[0], dim=1))


def test_random_rows_are_never_neighbours() -> None:
    objective = build()
    projections = objective.ring.rows[7:].clone()
    ids = torch.arange(len(projections))
    found, neighbour_ids = objective.neighbours(projections, ids)
    assert torch.equal(found, projections)
    assert torch.equal(neighbour_ids, ids)
    entered = random(2, 7, 5)
    objective.update(entered, torch.arange(10, 17), None)
    found, neighbour_ids = objective.neighbours(projections, ids)
    nearest = (projections @ F.normalize(entered[0], dim=1).T).argmax(1)
    assert torch.equal(neighbour_ids, 10 + nearest)
    torch.testing.assert_close(found, F.normalize(entered[0], dim=1)[nearest])


def test_of_equally_near_rows_the_first_is_taken() -> None:
    objective, row = build(), random(1, 1, 5)
    objective.update(row.expand(2, 4, 5), torch.tensor([7, 3, 9, 3]), None)
    assert objective.neighbours(row[0], torch.tensor([0]))[1].tolist() == [7]


def test_an_image_may_be_its_own_neighbour_and_the_terms_say_how_often() -> None:
    objective, projections, ids = build(), random(2, 7, 5), torch.arange(7)
    assert objective(projections, ids, projections, 0).terms["own_neighbours"] == 1
    objective.update(projections, ids, projections)
    terms = objective(projections, ids, projections[:1].expand(2, 7, 5), 1).terms
    assert terms["own_neighbours"] == 1
    assert terms["filled"] == 7
    terms = objective(projections, ids + 100, projections, 1).terms
    assert terms["own_neighbours"] == 0
    assert terms["negatives"] == 6


def test_negatives_are_counted_without_repeated_images() -> None:
    terms = build()(random(2, 7, 5), torch.tensor(REPEATED), random(2, 7, 5), 0).terms
    torch.testing.assert_close(terms["negatives"].item(), (3 * 4 + 2 * 5 + 2 * 6) / 7)


def test_without_a_predictor_the_embeddings_are_the_projections_and_neighbours_have_no_gradient() -> None:
    objective, ids = build(), torch.arange(7)
    embeddings = random(2, 7, 5).requires_grad_()
    for step in range(2):
        found = objective(embeddings, ids, None, step).total
        expected = objective(embeddings, ids, embeddings.detach(), step).total
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        gradients = [torch.autograd.grad(loss, embeddings) for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
        objective.update(random(2, 7, 5, seed=9), ids, None)


def test_the_support_set_survives_in_the_state_and_is_what_is_spread_over_processes() -> None:
    first, second = build(), build()
    first.update(random(2, 7, 5), torch.arange(7), None)
    second.load_state_dict(first.state_dict())
    projections = random(2, 7, 5, seed=3)
    losses = [objective(projections, torch.arange(7), None, 1).total for objective in (first, second)]
    assert torch.equal(*losses)
    assert first.shards() == {"ring.rows": 12, "ring.ids": 12}
    assert first.shards().keys() <= first.state_dict().keys()
    assert not list(first.parameters())


def test_one_view_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is 1; set views\.num_views=2"):
        build()(random(1, 7, 5), torch.arange(7), None, 0)


def test_a_support_set_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="size"):
        NearestNeighbours(size=0)


@pytest.mark.parametrize("views", [2, 3])
def test_information_is_log_n_less_the_loss(views: int) -> None:
    objective, ids = build(), torch.tensor(REPEATED)
    for step in range(3):
        z = random(views, 7, 5, seed=step)
        found = objective(z, ids, None, step)
        ceiling = (3 * math.log(5) + 2 * math.log(6) + 2 * math.log(7)) / 7
        assert found.terms["ceiling"].item() == pytest.approx(ceiling)
        assert found.terms["information"].item() == pytest.approx(ceiling - found.total.item())
        objective.update(z, ids, None)
