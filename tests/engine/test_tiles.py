"""Sums over tiles against plain autograd on the whole matrix."""

import pytest
import torch
from torch import Tensor

from manyviews.engine import normalize, squared_distance_rows, sum_over_tiles, tiles


def rows(count: int, dim: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, dtype=torch.float64, generator=generator).requires_grad_()


def term(span: slice, products: Tensor, margin: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    own = torch.arange(100)[span]
    hinge = (margin[0] - products).relu() * weights * torch.cos(own[:, None].double())
    return hinge.square().sum(), torch.stack([(hinge > 0).sum(), torch.tensor(len(own))])


@pytest.mark.parametrize("few", [0, 1], ids=["by products", "pair by pair"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("numbers", [1, 33, 1 << 18])
def test_value_gradient_and_figures_are_those_of_the_whole_matrix(
    few: int, threads: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "NUMBERS", numbers)
    monkeypatch.setattr(tiles, "FEW", few)
    anchors, candidates, before = rows(13), rows(11, seed=1), torch.get_num_threads()
    margin, weights = torch.tensor([0.3], dtype=torch.float64, requires_grad=True), rows(11, 1, 2).squeeze(1)
    weights = weights.detach().requires_grad_()
    learned = [anchors, candidates, margin, weights]
    torch.set_num_threads(threads)
    try:
        total, figures = sum_over_tiles(anchors, candidates, term, margin, weights)
    finally:
        torch.set_num_threads(before)
    expected, counts = term(slice(0, 13), anchors @ candidates.T, margin, weights)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    assert figures.tolist() == counts.tolist()
    found = torch.autograd.grad(3 * total, learned)
    torch.testing.assert_close(found, torch.autograd.grad(3 * expected, learned), rtol=1e-10, atol=1e-12)


def test_anchors_that_are_the_candidates_get_both_gradients() -> None:
    points = rows(9)

    def spread(span: slice, products: Tensor) -> tuple[Tensor, Tensor]:
        return products.exp().sum(), torch.zeros(1)

    found = torch.autograd.grad(sum_over_tiles(points, points, spread)[0], points)
    torch.testing.assert_close(found, torch.autograd.grad((points @ points.T).exp().sum(), points))


def test_without_anchors_the_sum_is_nothing_and_has_no_gradient() -> None:
    candidates, margin = rows(4), torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    weights = torch.ones(4, dtype=torch.float64)
    total, figures = sum_over_tiles(rows(1)[:0], candidates, term, margin, weights)
    assert (total, figures.tolist()) == (0, [0, 0])
    assert not any(gradient.any() for gradient in torch.autograd.grad(total, [candidates, margin]))


def test_a_term_that_asks_for_no_product_has_no_gradient() -> None:
    points = rows(4)
    total, _ = sum_over_tiles(points, points, lambda span, products: (products.new_zeros(()), torch.zeros(1)))
    assert not torch.autograd.grad(total, points)[0].any()


def test_without_gradient_none_is_made() -> None:
    points = rows(4)
    with torch.no_grad():
        total, _ = sum_over_tiles(points, points, lambda span, products: (products.sum(), torch.zeros(1)))
    assert not total.requires_grad
    torch.testing.assert_close(total, (points @ points.T).sum().detach())


def test_products_of_the_longer_rows_are_squared_distances() -> None:
    first, second = rows(6), rows(4, seed=1)
    left, right = squared_distance_rows(first, second)
    expected = (first[:, None] - second).square().sum(2)
    torch.testing.assert_close(left @ right.T, expected, rtol=1e-12, atol=1e-12)
    weights = rows(6, 4, 3).detach()
    found = torch.autograd.grad((left @ right.T * weights).sum(), [first, second])
    expected_gradient = torch.autograd.grad((expected * weights).sum(), [first, second])
    torch.testing.assert_close(found, expected_gradient, rtol=1e-10, atol=1e-12)


def test_a_common_part_a_thousand_times_as_long_does_not_spoil_the_distances() -> None:
    points = normalize(rows(50).detach().float())
    left, right = squared_distance_rows(points + 1000, points + 1000)
    expected = torch.cdist(points.double(), points.double()).square()
    # Adding 1,000 in float32 itself moves each coordinate by up to 3e-5.
    assert ((left @ right.T).double() - expected).abs().max() < 1e-3
