"""The engine against slow, obvious double loops in float64."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from manyviews.engine import log_sum_exp, nearest, normalize, pairs, softmax, top_k
from manyviews.engine.threads import on_all_cores

DISTINCT = torch.arange(30)
VIEWS = torch.arange(15).repeat(2)
CLASSES = torch.tensor([7, 0, 7, 3, 3]).repeat(6)
SCATTERED = torch.tensor([-5, 10**12, 2, 2, 2, 9]).repeat(5)
IDS = {"distinct": DISTINCT, "views": VIEWS, "reversed": VIEWS.flip(0), "classes": CLASSES, "scattered": SCATTERED}


@pytest.fixture(params=[None, (1, 1), (4, 7), (7, 2)], ids=lambda shape: f"tile={shape}")
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result must not depend on the tiles, whatever remains at the edges."""
    if request.param is not None:
        for module in (pairs, softmax):
            monkeypatch.setattr(module, "tile_shape", lambda device: request.param)


def unit_rows(count: int, dim: int = 5, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def oracle(queries: Tensor, keys: Tensor, temperature: float, query_ids: Tensor, key_ids: Tensor) -> Tensor:
    results = []
    for i in range(len(queries)):
        scores = [queries[i] @ keys[j] / temperature for j in range(len(keys)) if query_ids[i] != key_ids[j]]
        results.append(torch.stack(scores).logsumexp(0) if scores else queries[i].sum() * 0 - torch.inf)
    return torch.stack(results)


def oracle_matrix(queries: Tensor, keys: Tensor, temperature: float, query_ids: Tensor, key_ids: Tensor) -> Tensor:
    scores = (queries @ keys.T / temperature).masked_fill(query_ids[:, None] == key_ids, -torch.inf)
    return scores.logsumexp(1)


def gradients(values: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.randn(len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad(values @ weights.to(values.dtype), inputs)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("temperature", [0.1, 0.5, 0.002])
def test_the_symmetric_case_equals_the_double_loop(ids: Tensor, temperature: float) -> None:
    embeddings = unit_rows(30).requires_grad_()
    found = log_sum_exp(embeddings, None, temperature, query_ids=ids)
    expected = oracle(embeddings, embeddings, temperature, ids, ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(found, embeddings), gradients(expected, embeddings), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("temperature", [0.1, 0.5, 0.002])
@pytest.mark.parametrize("keys_learn", [True, False])
def test_queries_against_keys_equal_the_double_loop(ids: Tensor, temperature: float, keys_learn: bool) -> None:
    queries, keys = unit_rows(30).requires_grad_(), unit_rows(23, seed=1).requires_grad_(keys_learn)
    key_ids = ids.flip(0)[:23]
    inputs = (queries, keys) if keys_learn else (queries,)
    found = log_sum_exp(queries, keys, temperature, query_ids=ids, key_ids=key_ids)
    expected = oracle(queries, keys, temperature, ids, key_ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(found, *inputs), gradients(expected, *inputs), rtol=1e-9, atol=1e-9)


def test_without_ids_every_key_counts() -> None:
    queries, keys = unit_rows(6), unit_rows(9, seed=1)
    expected = (queries @ keys.T / 0.2).logsumexp(1)
    torch.testing.assert_close(log_sum_exp(queries, keys, 0.2), expected)


def test_keys_alone_may_learn() -> None:
    queries, keys = unit_rows(6), unit_rows(9, seed=1).requires_grad_()
    expected = (queries @ keys.T / 0.2).logsumexp(1)
    torch.testing.assert_close(gradients(log_sum_exp(queries, keys, 0.2), keys), gradients(expected, keys))


@pytest.mark.parametrize("length", [1.0, 1e-3, 5.0, 30.0])
def test_rows_of_any_length_are_summed_in_float32_without_overflow(length: float) -> None:
    embeddings = (unit_rows(40) * length).float().requires_grad_()
    ids = torch.arange(20).repeat(2)
    wide = embeddings.detach().double().requires_grad_()
    found, expected = log_sum_exp(embeddings, None, 0.1, query_ids=ids), oracle(wide, wide, 0.1, ids, ids)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    (gradient,), (wide_gradient,) = gradients(found, embeddings), gradients(expected, wide)
    scale = wide_gradient.abs().max()
    torch.testing.assert_close(gradient.double() / scale, wide_gradient / scale, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.03, 0.07])
def test_equal_embeddings_at_a_low_temperature_are_exact(temperature: float) -> None:
    embeddings = unit_rows(1).float().repeat(64, 1).requires_grad_()
    found = log_sum_exp(embeddings, None, temperature, query_ids=torch.arange(64))
    torch.testing.assert_close(found, torch.full((64,), 1 / temperature + math.log(63)), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(found.sum(), embeddings)[0].isfinite().all()


@pytest.mark.parametrize("keys", ["own", "others"])
def test_where_no_key_is_left_the_value_is_minus_infinity_and_the_gradient_zero(keys: str) -> None:
    queries = unit_rows(4).requires_grad_()
    ids = torch.tensor([1, 1, 1, 1])
    others = None if keys == "own" else unit_rows(3, seed=1).requires_grad_()
    found = log_sum_exp(queries, others, 0.1, query_ids=ids, key_ids=None if others is None else ids[:3])
    assert (found == -torch.inf).all()
    assert (torch.autograd.grad(found.sum(), queries)[0] == 0).all()


def test_a_row_without_keys_does_not_disturb_the_others() -> None:
    queries, keys = unit_rows(3).float().requires_grad_(), unit_rows(4, seed=1).float().requires_grad_()
    ids, key_ids = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1, 1])
    found = log_sum_exp(queries, keys, 0.1, query_ids=ids, key_ids=key_ids)
    assert found.isfinite().tolist() == [True, False, True]
    wanted, key_wanted = torch.autograd.grad(found[[0, 2]].sum(), (queries, keys))
    assert wanted.isfinite().all()
    assert key_wanted.isfinite().all()
    assert (wanted[1] == 0).all()
    assert wanted[[0, 2]].abs().min() > 0


def test_a_single_candidate_is_its_own_log_sum_exp() -> None:
    queries = unit_rows(2).requires_grad_()
    found = log_sum_exp(queries, None, 0.01, query_ids=torch.tensor([0, 1]))
    torch.testing.assert_close(found, (queries[0] @ queries[1] / 0.01).expand(2))


def test_narrow_keys_receive_their_gradient_in_their_own_type() -> None:
    queries, keys = unit_rows(8).float(), unit_rows(9, seed=1).to(torch.bfloat16).requires_grad_()
    (gradient,) = torch.autograd.grad(log_sum_exp(queries, keys, 0.07).sum(), keys)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing_inside(dtype: torch.dtype) -> None:
    embeddings = unit_rows(64, dim=32).float().requires_grad_()
    ids = torch.arange(32).repeat(2)
    plain = log_sum_exp(normalize(embeddings), None, 0.07, query_ids=ids)
    with torch.autocast("cpu", dtype=dtype):
        inside = log_sum_exp(normalize(embeddings), None, 0.07, query_ids=ids)
    assert inside.dtype == torch.float32
    assert torch.equal(plain, inside)
    assert torch.equal(gradients(plain, embeddings)[0], gradients(inside, embeddings)[0])


def test_half_precision_queries_are_computed_in_float32() -> None:
    embeddings = unit_rows(10).to(torch.bfloat16)
    found = log_sum_exp(embeddings, None, 0.07, query_ids=torch.arange(10))
    torch.testing.assert_close(found, log_sum_exp(embeddings.float(), None, 0.07, query_ids=torch.arange(10)))


def test_the_gradient_equals_finite_differences() -> None:
    embeddings, keys = unit_rows(6).requires_grad_(), unit_rows(5, seed=1).requires_grad_()
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda z: log_sum_exp(z, None, 0.3, query_ids=ids), embeddings)
    assert torch.autograd.gradcheck(
        lambda q, k: log_sum_exp(q, k, 0.3, query_ids=ids, key_ids=torch.arange(5)), (embeddings, keys)
    )


def test_a_second_derivative_is_refused_and_not_silently_wrong() -> None:
    embeddings = unit_rows(6).requires_grad_()
    value = log_sum_exp(embeddings, None, 0.3, query_ids=torch.arange(6)).sum()
    (gradient,) = torch.autograd.grad(value, embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_the_keys_may_change_between_forward_and_backward() -> None:
    queries, keys = unit_rows(6).requires_grad_(), unit_rows(9, seed=1)
    expected = gradients((queries @ keys.T / 0.2).logsumexp(1), queries)
    found = log_sum_exp(queries, keys, 0.2)
    keys.zero_()
    torch.testing.assert_close(gradients(found, queries), expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        log_sum_exp(unit_rows(2), None, temperature, query_ids=torch.arange(2))


def test_missing_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="query_ids are missing"):
        log_sum_exp(unit_rows(2), None, 0.1)
    with pytest.raises(ValueError, match="one side only"):
        log_sum_exp(unit_rows(2), unit_rows(2), 0.1, query_ids=torch.arange(2))


def test_normalized_rows_have_length_one_and_the_gradient_of_the_quotient() -> None:
    rows = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(normalize(rows).norm(dim=-1), torch.ones(2, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(normalize, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_zero_row_stays_zero_with_a_finite_gradient(dtype: torch.dtype) -> None:
    rows = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unit = normalize(rows)
    (gradient,) = torch.autograd.grad(unit.sum() * 1e-3, rows)
    assert unit.dtype == torch.float32
    assert (unit == 0).all()
    assert gradient.isfinite().all()


def ranking(queries: Tensor, keys: Tensor, k: int, query_ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The k best keys of each query by a sort of (−value, index)."""
    products = (queries @ keys.T).masked_fill(query_ids[:, None] == key_ids, -torch.inf)
    found = [sorted((-value, index) for index, value in enumerate(row))[:k] for row in products.tolist()]
    values = torch.tensor([[-value for value, _ in row] for row in found], dtype=queries.dtype)
    return values, torch.tensor([[index for _, index in row] for row in found])


@pytest.mark.parametrize(("count", "k"), [(1, 1), (5, 5), (40, 3), (333, 4), (333, 1), (2000, 7), (2000, 1999)])
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_equals_a_sort_by_value_and_index(
    count: int, k: int, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(count)
    draw = (lambda *shape: torch.randint(-1, 2, shape, generator=generator)) if ties else None
    queries, keys = (draw(9, 3).double(), draw(count, 3).double()) if draw else (unit_rows(9), unit_rows(count, seed=1))
    query_ids = torch.arange(9)
    key_ids = torch.randint(0, 20, (count,), generator=generator)
    expected = ranking(queries, keys, k, query_ids, key_ids)
    for width in (1 << 16, 700, 100, 3):
        monkeypatch.setattr(nearest, "COLUMNS", width)
        values, indices = top_k(queries, keys, k, query_ids=query_ids, key_ids=key_ids)
        torch.testing.assert_close(values, expected[0])
        assert torch.equal(indices, expected[1])


def test_top_k_leaves_equal_ids_out() -> None:
    embeddings = unit_rows(50)
    ids = torch.arange(50)
    values, indices = top_k(embeddings, embeddings, 1, query_ids=ids, key_ids=ids)
    assert (indices[:, 0] != ids).all()
    assert (values < 1 - 1e-6).all()


@pytest.mark.parametrize("k", [0, 5])
def test_top_k_refuses_a_k_that_the_keys_cannot_give(k: int) -> None:
    with pytest.raises(ValueError, match=f"k {k} must be between 1 and the number of keys, 4"):
        top_k(unit_rows(3), unit_rows(4), k)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(two_threads: None) -> None:
    embeddings, keys = unit_rows(2100).float(), unit_rows(4700, seed=1).float()
    ids, key_ids = torch.arange(1050).repeat(2), torch.arange(4700) % 1500

    def everything() -> list[Tensor]:
        z, k = embeddings.clone().requires_grad_(), keys.clone().requires_grad_()
        symmetric = log_sum_exp(z, None, 0.1, query_ids=ids)
        between = log_sum_exp(z, k, 0.1, query_ids=ids, key_ids=key_ids)
        cold = log_sum_exp(z, k, 0.005, query_ids=ids, key_ids=key_ids)
        results = [symmetric, between, cold]
        return [*results, *torch.autograd.grad(sum(result.sum() for result in results), [z, k])]

    on_two = everything()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(everything(), on_two, strict=True))
    exact = oracle_matrix(embeddings.double(), keys.double(), 0.1, ids, key_ids)
    torch.testing.assert_close(on_two[1].double(), exact, rtol=1e-5, atol=1e-5)


def test_each_core_has_one_thread_and_the_caller_keeps_its_own(two_threads: None) -> None:
    def own_threads() -> int:
        _ = torch.randn(512, 512) @ torch.randn(512, 512)
        return torch.get_num_threads()

    for _ in range(2):
        assert on_all_cores([own_threads] * 4, torch.device("cpu")) == [1, 1, 1, 1]
        assert torch.get_num_threads() == 2


def test_a_failure_on_one_thread_is_raised(two_threads: None) -> None:
    def fail() -> None:
        raise ValueError("a piece failed")

    with pytest.raises(ValueError, match="a piece failed"):
        on_all_cores([lambda: None, fail], torch.device("cpu"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("temperature", [0.07, 0.004])
def test_16_bit_keys_give_the_value_and_gradient_of_their_rows(
    native: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pairs, softmax):
        monkeypatch.setattr(module, "as_bfloat16", lambda rows, keys: native and keys.dtype == torch.bfloat16)
    queries, ids = unit_rows(60, 16).float().requires_grad_(), torch.arange(60)
    for kind in (torch.bfloat16, torch.float16):
        keys = unit_rows(3000, 16, seed=1).to(kind)
        found, expected = (
            log_sum_exp(queries, rows, temperature, query_ids=ids, key_ids=torch.arange(3000))
            for rows in (keys, keys.float())
        )
        gradients_ = [torch.autograd.grad(value.sum(), queries)[0] for value in (found, expected)]
        # Rounded are the queries and the products: each by half a unit in the last of 8 bits.
        bound = 2**-8 / temperature if native and kind == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=bound)
        assert (gradients_[0] - gradients_[1]).norm() < max(bound, 1e-4) * gradients_[1].norm()
