"""Nearest neighbours on a GPU, a pretend one, against a sort of all products on the CPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from manyviews.engine import gpu_search, nearest, normalize, squared_distance_rows, top_k
from manyviews.engine.candidates import Keys
from manyviews.system import hardware
from pretend_cuda import Log, pretend_cuda

QUERIES, KEYS, DIM = 230, 5300, 24


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates pay for small problems, which take several tiles of keys and of queries, the last ones not full."""
    monkeypatch.setattr(gpu_search, "WORK", 1)
    monkeypatch.setattr(gpu_search, "SHARE", 32)
    monkeypatch.setattr(gpu_search, "COLUMNS", 2048)
    monkeypatch.setattr(gpu_search, "SCORES", 100 * 2048)
    monkeypatch.setattr(gpu_search, "NUMBERS", 50 * 64 * DIM)


@pytest.fixture
def log() -> Iterator[Log]:
    with pretend_cuda() as log:
        yield log


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def by_class(count: int, seed: int) -> Tensor:
    """All rows of a class beside each other, far from the origin, and the classes near to each other."""
    labels = torch.arange(count) * 10 // count
    return normalize(3 + 0.3 * rows(10, 99)[labels] + 0.2 * rows(count, seed))


def of_distances(count: int, seed: int) -> Tensor:
    """Rows whose products are squared distances: their last columns are far longer than the others."""
    left, right = squared_distance_rows(10 + 5 * rows(QUERIES, 0), 10 + 5 * rows(KEYS, 1))
    return -left if seed == 0 else right


DATA: dict[str, Callable[[int, int], Tensor]] = {
    "in all directions": lambda count, seed: normalize(rows(count, seed)),
    "by class": by_class,
    "of distances": of_distances,
    "all alike": lambda count, seed: normalize(30 + rows(count, seed)),
    "short": lambda count, seed: 1e-7 * rows(count, seed),
    "long": lambda count, seed: 1e6 * rows(count, seed),
    "with a column of zeros": lambda count, seed: rows(count, seed) * (torch.arange(DIM) > 2),
}


def products(queries: Tensor, keys: Tensor) -> Tensor:
    return queries.double() @ keys.double().T


@pytest.mark.parametrize("k", [1, 10, 140])
@pytest.mark.parametrize("data", DATA)
def test_candidates_give_what_a_sort_of_all_products_gives(data: str, k: int, small: None, log: Log) -> None:
    queries, keys = DATA[data](QUERIES, 0), DATA[data](KEYS, 1)
    *_, proved = gpu_search.search(queries.to("cuda"), Keys(keys.to("cuda"), None, None), k, None)
    assert proved.cpu().float().mean() > 0.9
    log.clear()
    values, indices = (found.cpu() for found in top_k(queries.to("cuda"), keys.to("cuda"), k))
    everything = products(queries, keys)
    expected = everything.topk(k).values
    size = queries.norm(dim=1, keepdim=True) * keys.norm(dim=1).max()
    assert ((values - expected).abs() <= 1e-6 * size).all()
    assert ((everything.gather(1, indices) - expected).abs() <= 1e-6 * size).all()
    assert (indices.sort(dim=1).values.diff(dim=1) != 0).all()


@pytest.mark.parametrize("data", DATA)
def test_what_is_proved_is_the_result_even_if_only_few_candidates_are_kept(
    data: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_search, "SPARE", 1)
    queries, keys = DATA[data](QUERIES, 0), DATA[data](KEYS, 1)
    values, indices, proved = gpu_search.search(queries, Keys(keys, None, None), 2, None)
    assert 0 < proved.sum() < len(proved)
    expected = products(queries, keys).sort(dim=1, descending=True, stable=True)
    size = queries.norm(dim=1, keepdim=True) * keys.norm(dim=1).max()
    assert ((values - expected.values[:, :2]).abs() <= 1e-6 * size)[proved].all()
    clear = (expected.values[:, :2] - expected.values[:, 1:3] > 1e-6 * size).all(1) & proved
    assert clear.any()
    assert torch.equal(indices[clear], expected.indices[clear, :2])


def test_the_bound_is_no_smaller_than_the_error_of_the_products() -> None:
    for make in DATA.values():
        queries, keys = make(QUERIES, 0), make(KEYS, 1)
        frame = gpu_search.Frame.of(queries, Keys(keys, None, None))
        (left, factors), (right, (last, remainder)) = frame.queries(queries), frame.keys(keys)
        assert right.rows.isfinite().all()
        assert right.rows.shape[1] % 8 == left.rows.shape[1] % 8 == 0
        scale = factors[:, None].double()
        found = products(left.rows, right.rows) * scale + queries.double() @ frame.centre.double()[:, None]
        bound = left.errors[:, None] * right.lengths + (left.lengths + left.errors)[:, None] * right.errors + remainder
        bound += 2**-22 * (last + left.lengths[:, None] * right.lengths)
        size = queries.abs() @ (frame.greatest + frame.centre.abs())
        assert ((found - products(queries, keys)).abs() <= bound * scale + 2**-21 * size[:, None]).all()


@pytest.mark.parametrize("largest", [1, 6, 200])
@pytest.mark.parametrize("work", [1, 1 << 60])
def test_equal_values_are_ordered_by_index(
    largest: int, work: int, small: None, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_search, "WORK", work)
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randint(-largest, largest + 1, (count, DIM), generator=generator).float() for count in (QUERIES, KEYS)
    )
    values, indices = (found.cpu() for found in top_k(queries.to("cuda"), keys.to("cuda"), 100))
    expected = products(queries, keys).sort(dim=1, descending=True, stable=True)
    assert torch.equal(values.double(), expected.values[:, :100])
    assert torch.equal(indices, expected.indices[:, :100])


@pytest.mark.parametrize("work", [1, 1 << 60])
def test_equal_ids_are_left_out_also_where_fewer_than_k_keys_remain(
    work: int, small: None, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_search, "WORK", work)
    queries, keys = normalize(rows(QUERIES, 0)), normalize(rows(KEYS, 1))
    query_ids, key_ids = torch.arange(QUERIES) % 50, torch.arange(KEYS) % 53
    for few in (KEYS, 60):
        key_ids[few:] = 7
        expected = products(queries, keys).masked_fill_(query_ids[:, None] == key_ids, -torch.inf)
        given: Any = {"query_ids": query_ids.to("cuda"), "key_ids": key_ids.to("cuda")}
        values, indices = (found.cpu() for found in top_k(queries.to("cuda"), keys.to("cuda"), 100, **given))
        torch.testing.assert_close(values.double(), expected.topk(100).values, rtol=0, atol=5e-7)
        found = values > -torch.inf
        assert ((key_ids[indices] != query_ids[:, None]) | ~found).all()
    assert (~found).any()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_products_are_searched_without_a_wait(cosine: bool, dtype: torch.dtype, log: Log) -> None:
    queries, keys = rows(QUERIES, 0).to(dtype), rows(KEYS, 1).to(dtype)
    keys[100:200] = keys[:100]
    given = queries.to("cuda"), keys.to("cuda")
    log.clear()
    found = top_k(*given, 20, cosine=cosine)
    assert not log.waits
    assert log.launches.total() < 60
    for own, expected in zip(found, top_k(queries, keys, 20, cosine=cosine), strict=True):
        torch.testing.assert_close(own.cpu(), expected)


def test_candidates_wait_once_and_launch_by_tiles(small: None, log: Log) -> None:
    queries, keys = normalize(rows(QUERIES, 0)).to("cuda"), normalize(rows(KEYS, 1)).to("cuda")
    log.clear()
    top_k(queries, keys, 10, cosine=True)
    assert log.waits.total() == 1
    assert log.launches.total() < 500


@pytest.mark.parametrize("work", [1, 1 << 60])
def test_keys_that_stay_on_the_cpu_are_searched_part_by_part(
    work: int, small: None, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_search, "WORK", work)
    monkeypatch.setattr(nearest, "COLUMNS", 512)
    monkeypatch.setattr(hardware, "free", lambda gpu: 4 * 1500 * DIM * 4)
    queries, keys = normalize(rows(QUERIES, 0)), normalize(rows(KEYS, 1)).repeat(2, 1)
    ids = torch.arange(len(keys))
    log.clear()
    given: Any = {"query_ids": ids[:QUERIES].to("cuda"), "key_ids": ids}
    values, indices = top_k(queries.to("cuda"), keys, 10, cosine=True, **given)
    expected = top_k(queries, keys, 10, query_ids=ids[:QUERIES], key_ids=ids, cosine=True)
    torch.testing.assert_close(values.cpu(), expected[0])
    assert torch.equal(indices.cpu(), expected[1])


def test_codes_keep_values_and_order() -> None:
    special = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 1e-40, -1e-40, 3e38, -3e38]
    scores = torch.tensor([special, special[::-1]])
    values, columns = gpu_search.largest(scores, len(special))
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values)
    assert torch.equal(columns, expected.indices)


def test_candidates_are_taken_for_imagenet_and_not_for_few_keys_or_many_neighbours(log: Log) -> None:
    queries, keys = torch.empty(50_000, 1, device="cuda"), torch.empty(1_280_000, 1, device="cuda")
    wide = queries.expand(-1, 2048), keys.expand(-1, 2048)
    assert gpu_search.pays(*wide, 200)
    # Exact values of so many candidates would take longer than all products.
    assert not gpu_search.pays(*wide, 10_000)
    assert not gpu_search.pays(queries, keys[:10_000], 20)
    assert not gpu_search.pays(queries.double(), keys.double(), 20)
    assert not gpu_search.pays(*(rows[:10].cpu() for rows in wide), 1)
