"""Rows in eight bits: their bounds hold for whatever rows there are, and are near."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from manyviews.engine import int8_products, normalize
from manyviews.engine.int8_products import Frame, Narrow, bounds, left, multiplies_integers, right

integers_only = pytest.mark.skipif(not multiplies_integers(), reason="this CPU has no fast products of integers")


def normal(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def all_the_same(count: int, dim: int, seed: int) -> Tensor:
    return normal(count, 1, seed).expand(-1, dim).contiguous()


def halfway(count: int, dim: int, seed: int) -> Tensor:
    """As far from whole numbers of the scale as can be."""
    rows = (0.5 + normal(count, dim, seed).mul(30).round_().clamp_(-126, 126)) / 127
    rows[:, 0] = 1
    return rows


def with_gaps(count: int, dim: int, seed: int) -> Tensor:
    rows = normal(count, dim, seed)
    rows[::3] = 0
    rows[1::3, 0] = 1e6
    return rows


ROWS: dict[str, Callable[[int, int, int], Tensor]] = {
    "in all directions": lambda count, dim, seed: normalize(normal(count, dim, seed)),
    "all the same": all_the_same,
    "halfway": halfway,
    "with gaps": with_gaps,
    "of many lengths": lambda count, dim, seed: normal(count, dim, seed) * torch.logspace(-9, 9, count)[:, None],
    "short": lambda count, dim, seed: 1e-15 * normal(count, dim, seed),
}


@integers_only
@pytest.mark.parametrize("dim", [1, 2, 3, 24, 250, 251, 512, 1100])
@pytest.mark.parametrize("rows", ROWS)
def test_no_product_is_above_its_bound_and_no_bound_far_above_its_product(rows: str, dim: int) -> None:
    queries, keys = ROWS[rows](30, dim, 0), ROWS[rows](40, dim, 1)
    query, key = left(queries, integers=True), right(keys, 64, 30, integers=True)
    found = bounds(query, key, torch.empty(0))[:, :40].double() * query.scales[:, None].double()
    lengths = queries.double().norm(dim=1)[:, None] * keys.double().norm(dim=1)
    exact = queries.double() @ keys.double().T
    # Rounded to bfloat16.
    assert (found >= exact - 2**-8 * found.abs() - 1e-5 * lengths).all()
    margins = []
    for row, other in ((queries, keys), (keys, queries)):
        scales = row.double().abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        errors = ((row / scales).round() * scales - row).norm(dim=1)
        margins.append(errors[:, None] * other.double().norm(dim=1))
    margin = margins[0] + margins[1].T
    # Two whole numbers of a few dozen are rounded up, and the products of lengths are of the rounded rows.
    least = query.scales[:, None] * key.scales[:40].double() * 127 * 2 * dim
    assert (found <= exact + 2.2 * margin + 2**-8 * exact.abs() + 2 * least + 1e-5 * lengths).all()


@integers_only
def test_rows_that_fill_up_a_tile_have_the_bound_zero() -> None:
    key = right(normal(5, 24, 1), 64, 7, integers=True)
    assert not bounds(left(normal(7, 24, 0), integers=True), key, torch.empty(0))[:, 5:].any()


@integers_only
def test_for_features_the_bound_is_within_a_fortieth_of_their_lengths() -> None:
    queries, keys = normalize(normal(100, 512, 0)), normalize(normal(200, 512, 1))
    query = left(queries, integers=True)
    found = bounds(query, right(keys, 200, 100, integers=True), torch.empty(0)).float() * query.scales[:, None]
    above = found - queries @ keys.T
    assert above.min() > 0
    assert above.max() < 1 / 40


def test_rows_as_they_are_have_their_products_as_bounds() -> None:
    queries, keys = normal(7, 24, 0), normal(5, 24, 1)
    buffer = torch.empty(7, 8)
    found = bounds(left(queries, integers=False), right(keys, 8, 7, integers=False), buffer)
    assert found is buffer
    torch.testing.assert_close(found[:, :5], queries @ keys.T)
    assert not found[:, 5:].any()


@integers_only
def test_instructions_whose_sums_stop_at_what_sixteen_bits_hold_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    check = multiplies_integers.__wrapped__
    assert check()

    def saturated(queries: Narrow, keys: Narrow, buffer: Tensor) -> Tensor:
        return (torch.ones(8, 8) * 34 * (2**15 - 1)).bfloat16()

    monkeypatch.setattr(int8_products, "bounds", saturated)
    assert not check()


def test_without_the_instructions_no_integers_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_products, "has_instructions", lambda name: False)
    assert not multiplies_integers.__wrapped__()


@pytest.mark.parametrize("apart", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("dim", [3, 40, 200])
def test_products_are_the_same_wherever_rows_are_measured_from(dim: int, apart: float) -> None:
    common = apart * normal(1, dim, 2).double()
    queries, keys = normal(50, dim, 0).double() + common, normal(60, dim, 1).double() + common
    lengths = queries.norm(dim=1, keepdim=True)
    centre = keys.mean(0)
    frames = Frame.of(queries / lengths, keys, centre), Frame.of_keys_alone(centre)
    assert frames[0].columns <= max(1, dim // 16)
    for frame in frames:
        framed = frame.queries(queries / lengths) @ frame.keys(keys).T
        torch.testing.assert_close(queries @ centre[:, None] + lengths * framed, queries @ keys.T)


def test_in_a_frame_rows_are_as_long_as_their_spread_and_one_scale_is_enough() -> None:
    common = 20 * normalize(normal(1, 256, 2))
    queries, keys = normalize(normal(500, 256, 0) + common), normalize(normal(600, 256, 1) + common)
    frame = Frame.of(queries, keys, keys.mean(0))
    spread = math.sqrt(float((keys - keys.mean(0)).square().sum(1).mean()))
    framed = frame.keys(keys)
    assert float(framed.norm(dim=1).mean()) < 1.2 * spread
    assert float(framed[:, 256:].abs().max()) < 1.5 * float(framed[:, :256].abs().amax(1).mean())


@pytest.mark.parametrize("same", ["queries", "keys"])
def test_a_frame_for_rows_that_are_all_the_same_is_finite(same: str) -> None:
    queries, keys = normalize(normal(20, 8, 0)), normal(30, 8, 1)
    if same == "queries":
        queries = queries[:1].expand(20, -1)
    else:
        keys = keys[:1].expand(30, -1)
    frame = Frame.of(queries, keys, keys.mean(0))
    assert frame.keys(keys).isfinite().all()
    assert frame.queries(queries).isfinite().all()
