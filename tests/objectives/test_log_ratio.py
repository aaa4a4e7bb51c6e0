"""The log-ratio loss against the paper's triple loop in float64, and at its limits."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from manyviews.objectives import Population
from manyviews.objectives.labels import mean_squared_distance
from manyviews.objectives.log_ratio import LogRatio, Squared

IMAGES = 12
SQUARED: tuple[Squared, ...] = ("both", "embeddings", "neither")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(kind: str = "distinct") -> Tensor:
    """Labels in three dimensions; or in one, where images have equal ones."""
    return numbers(IMAGES, 3, seed=1) if kind == "distinct" else torch.arange(IMAGES).remainder(4).double()[:, None]


def loss(z: Tensor, ids: Tensor, values: Tensor, **given: Any) -> Tensor:
    settings = LogRatio(**given)
    objective = settings.build(dim=z.shape[2], population=Population(torch.arange(IMAGES), values), seed=0)
    total: Tensor = objective(z, ids, None, 0).total
    return total


def oracle(z: Tensor, ids: Tensor, values: Tensor, squared: Squared = "both", epsilon: float = 1e-6) -> Tensor:
    rows, y = z.flatten(0, 1), values[ids].repeat(len(z), 1)
    least = epsilon * 2 * (rows - rows.mean(0)).square().sum(1).mean().detach()
    least_label = epsilon * 2 * (values - values.mean(0)).square().sum(1).mean()

    def logarithm(a: Tensor, b: Tensor, smallest: Tensor, square: bool) -> Tensor:
        found = ((a - b).square().sum() + smallest).log()
        return found if square else found / 2

    losses = []
    for a in range(len(rows)):
        others = [i for i in range(len(rows)) if not torch.equal(y[i], y[a])]
        f = {i: logarithm(rows[a], rows[i], least, squared != "neither") for i in others}
        g = {i: logarithm(y[a], y[i], least_label, squared == "both") for i in others}
        losses += [((f[i] - f[j]) - (g[i] - g[j])).square() for i, j in itertools.combinations(others, 2)]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", ["distinct", "equal"])
@pytest.mark.parametrize("squared", SQUARED)
def test_loss_and_gradient_equal_the_triple_loop(views: int, kind: str, squared: Squared) -> None:
    z, ids = numbers(views, 7, 5).requires_grad_(), torch.tensor([3, 11, 0, 3, 7, 8, 9])
    found, expected = loss(z, ids, labels(kind), squared=squared), oracle(z, ids, labels(kind), squared)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-9, atol=1e-12)


def test_epsilon_is_a_share_of_the_mean_squared_distance() -> None:
    z, ids = numbers(1, 8, 4), torch.arange(8)
    for epsilon in (1e-6, 0.3):
        found, expected = loss(z, ids, labels(), epsilon=epsilon), oracle(z, ids, labels(), epsilon=epsilon)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    rows = numbers(9, 4)
    torch.testing.assert_close(mean_squared_distance(rows), torch.cdist(rows, rows).square().mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_neither_the_length_of_embeddings_nor_the_unit_of_labels_matters(scale: float) -> None:
    z, ids = numbers(2, 6, 4), torch.arange(6)
    plain = loss(z, ids, labels())
    torch.testing.assert_close(loss(scale * z + 3, ids, labels()), plain, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss(z, ids, scale * labels() - 2), plain, rtol=1e-9, atol=0)


def test_labels_as_embeddings_have_no_loss_and_explain_everything() -> None:
    values, ids = labels(), torch.arange(IMAGES)
    population = Population(ids, values)
    found = LogRatio().build(dim=3, population=population, seed=0)(2 * values.unsqueeze(0), ids, None, 0)
    assert found.total.item() == pytest.approx(0, abs=1e-12)
    assert found.terms["explained"].item() == pytest.approx(1)
    assert found.terms["negatives"] == IMAGES - 1
    corners = torch.eye(IMAGES, dtype=torch.float64).unsqueeze(0)
    equal = LogRatio().build(dim=IMAGES, population=population, seed=0)(corners, ids, None, 0)
    assert equal.terms["explained"].item() == pytest.approx(0)


def test_squares_of_both_sides_count_four_times_the_plain_distances() -> None:
    z, ids, values = numbers(1, 8, 4), torch.arange(8), labels()
    torch.testing.assert_close(loss(z, ids, values), 4 * loss(z, ids, values, squared="neither"))
    # The squares of these embeddings' distances are the plain distances of their labels.
    line = torch.arange(8.0, dtype=torch.float64)
    steps = torch.tril(torch.ones(8, 8, dtype=torch.float64)).unsqueeze(0)
    padded = torch.cat([line, torch.arange(20, 24)])[:, None]
    assert loss(steps, ids, padded, squared="embeddings").item() == pytest.approx(0, abs=1e-6)
    assert loss(steps, ids, padded, squared="both").item() > 0.1


def test_embeddings_of_equal_labels_are_not_compared() -> None:
    z, ids = numbers(1, 5, 4), torch.tensor([0, 1, 4, 2, 8])
    values = labels("equal")
    # Images 0, 4 and 8 have one label: each is compared with the two others, which are compared with four each.
    population = Population(torch.arange(IMAGES), values)
    terms = LogRatio().build(dim=4, population=population, seed=0)(z, ids, None, 0).terms
    assert terms["negatives"].item() == pytest.approx((3 * 2 + 2 * 4) / 5)


def test_a_batch_without_triplets_has_no_loss_and_no_gradient() -> None:
    for ids in (torch.tensor([0]), torch.tensor([0, 4, 8]), torch.tensor([0, 1])):
        z = numbers(1, len(ids), 4).requires_grad_()
        found = loss(z, ids, labels("equal"))
        assert found == 0
        assert not torch.autograd.grad(found, z)[0].any()


def test_a_large_common_part_costs_little_precision() -> None:
    z, ids = numbers(1, 8, 4), torch.arange(8)
    torch.testing.assert_close(
        loss((z + 1000).float(), ids, labels()).double(), loss(z, ids, labels()), rtol=1e-2, atol=0
    )


def test_without_values_there_is_a_way_out() -> None:
    with pytest.raises(ValueError, match="set values=pixels"):
        LogRatio().build(dim=4, population=Population(torch.arange(8)), seed=0)


def test_a_checkpoint_holds_the_digest_of_the_labels_and_others_are_refused() -> None:
    first, same, other = (
        LogRatio().build(dim=4, population=Population(torch.arange(IMAGES), values), seed=0)
        for values in (labels(), labels(), labels() + 1e-9)
    )
    state = first.state_dict()
    assert [tensor.shape for tensor in state.values()] == [(32,)]
    same.double().load_state_dict(state)
    with pytest.raises(ValueError, match="differ from those at the start of the run"):
        other.load_state_dict(state)
