"""Contrastive predictive coding against a loop over contexts, steps and candidates."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from manyviews.encoder.context import ContextSettings
from manyviews.objectives import CPC, Population
from manyviews.objectives.cpc import predictive_coding


def drawn(side: int, batch: int = 4, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(side)
    return torch.randn(2 * side**2, batch, dim, generator=generator, dtype=torch.float64).requires_grad_()


def some_matrices(steps: int, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(steps, dim, dim, generator=generator, dtype=torch.float64).requires_grad_()


def oracle(embeddings: Tensor, ids: list[int], matrices: Tensor, distances: range, temperature: float) -> Tensor:
    """Equations 3 and 4 by loops; the candidates are every patch but those of a copy of the same image."""
    side, dim = math.isqrt(len(embeddings) // 2), embeddings.shape[2]

    def patch(row: int, column: int, image: int) -> Tensor:
        return embeddings[row * side + column, image]

    def context(row: int, column: int, image: int) -> Tensor:
        return embeddings[side**2 + row * side + column, image]

    of_steps = []
    for matrix, step in zip(matrices / dim / temperature, distances, strict=True):
        losses = []
        for row in range(side - step):
            for column in range(side):
                for image, name in enumerate(ids):
                    own, place = context(row, column, image), (row + step, column)
                    candidates = [
                        torch.exp(patch(y, x, other) @ matrix @ own)
                        for y in range(side)
                        for x in range(side)
                        for other, its_name in enumerate(ids)
                        if (y, x) != place or its_name != name
                    ]
                    positive = torch.exp(patch(*place, image) @ matrix @ own)
                    losses.append(-torch.log(positive / (positive + torch.stack(candidates).sum())))
        of_steps.append(torch.stack(losses).mean())
    return torch.stack(of_steps).mean()


@pytest.mark.parametrize(("side", "distances"), [(2, range(1, 2)), (3, range(1, 3)), (4, range(2, 4))], ids=str)
@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [7, 2, 7, 5]], ids=["distinct", "repeated"])
def test_loss_and_gradients_equal_the_loop_over_the_equations(side: int, distances: range, ids: list[int]) -> None:
    z, matrices = drawn(side), some_matrices(len(distances))
    found = predictive_coding(z, torch.tensor(ids), matrices, distances, 0.3).total
    expected = oracle(z, ids, matrices, distances, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, [z, matrices]), torch.autograd.grad(expected, [z, matrices]), rtol=1e-9, atol=1e-12
    )


def test_the_terms_bound_the_information_of_a_context_and_a_patch() -> None:
    loss = predictive_coding(drawn(3), torch.tensor([3, 1, 3, 8]), some_matrices(2), range(1, 3), 0.3)
    # 36 patches: of the image that comes twice one less is a negative.
    candidates = torch.tensor([35.0, 36, 35, 36], dtype=torch.float64)
    assert loss.terms["negatives"] == candidates.mean() - 1
    torch.testing.assert_close(loss.terms["ceiling"], candidates.log().mean())
    torch.testing.assert_close(loss.terms["information"], candidates.log().mean() - loss.total.detach())


def test_contexts_that_are_what_follows_have_all_information_and_others_none() -> None:
    patches = torch.eye(36, dtype=torch.float64).view(9, 4, 36)
    ahead = torch.cat([patches, patches.roll(-3, 0)])
    same = torch.cat([patches, torch.ones_like(patches)])
    matrix, ids = torch.eye(36, dtype=torch.float64)[None], torch.arange(4)
    high, low = (predictive_coding(z, ids, matrix, range(1, 2), 1e-3).terms for z in (ahead, same))
    torch.testing.assert_close(high["information"], high["ceiling"], rtol=1e-9, atol=1e-9)
    assert abs(low["information"]) < 1e-12
    assert high["positive_similarity"] == 1


def test_each_step_has_a_matrix_and_by_default_the_five_rows_of_the_paper_are_predicted() -> None:
    def shape(side: int, **options: int) -> tuple[int, ...]:
        built = CPC(**options).build(dim=5, population=Population(torch.arange(4), patches=side), seed=0)
        assert built.shards() == {}
        return tuple(dict(built.named_parameters())["matrices"].shape)

    assert [shape(side)[0] for side in (2, 4, 6, 7)] == [1, 3, 5, 5]
    assert shape(4, steps=2) == (2, 5, 5)
    assert shape(7, steps=6, skip=2) == (4, 5, 5)


def test_the_farthest_patches_have_no_gradient_where_their_rows_are_not_predicted_and_no_negatives() -> None:
    z = drawn(4)
    (gradient,) = torch.autograd.grad(
        CPC(steps=1)
        .build(dim=5, population=Population(torch.arange(4), patches=4), seed=0)
        .double()(z, torch.arange(4), None, 0)
        .total,
        z,
    )
    contexts = gradient[16:].view(4, 4, 4, 5)
    assert not contexts[3].any()
    assert all(contexts[row].any() for row in range(3))


@pytest.mark.parametrize("name", ["gru", "mean", "attention"])
def test_it_learns_what_the_patches_of_an_image_have_in_common(name: Literal["gru", "mean", "attention"]) -> None:
    torch.manual_seed(0)
    encoder, context = nn.Linear(12, 8), ContextSettings(name=name, patches=3).build(size=28, dim=8)
    objective = CPC().build(dim=8, population=Population(torch.arange(16), patches=3), seed=0)
    parameters = [*encoder.parameters(), *context.parameters(), *objective.parameters()]
    optimiser, found = torch.optim.Adam(parameters, 0.02), []
    for step in range(120):
        # Four numbers are those of the image, and eight are noise, which is larger.
        images = torch.cat([torch.randn(1, 16, 4).expand(9, 16, 4), 2 * torch.randn(9, 16, 8)], 2)
        patches = encoder(images)
        loss = objective(torch.cat([patches, context(patches)]), torch.arange(16), None, step)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        found.append(loss.terms["information"].item())
    # All nine patches of an image are alike: log 16 = 2.8 nats are to be learned.
    assert found[0] < 0.5
    assert 1 < sum(found[-10:]) / 10 < math.log(16)


@pytest.mark.parametrize(
    ("options", "patches", "message"),
    [
        ({"steps": 4}, 4, r"objective\.steps=4, but of 4 rows of patches at most 3.*objective\.steps=3.*patches=5"),
        ({"skip": 3}, 4, r"objective\.skip=3 leaves nothing to predict of 3 steps; set objective\.skip=2 or less"),
        ({}, None, r"objective=cpc predicts patches.*set encoder\.context=gru"),
    ],
)
def test_what_cannot_be_predicted_is_refused(options: dict[str, int], patches: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CPC(**options).build(dim=5, population=Population(torch.arange(4), patches=patches), seed=0)
