"""Nearest neighbours found by candidates, and by several processes, against a sort of all products."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from manyviews.engine import candidates, nearest, normalize, top_k
from manyviews.engine.candidates import Keys, search
from manyviews.evaluators.knn import KnnSettings, knn
from manyviews.evaluators.retrieval import retrieve
from manyviews.system import distributed
from processes import start

QUERIES, KEYS, DIM = 530, 9300, 24


@pytest.fixture(params=["integers", "float32"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "integers" and not candidates.multiplies_integers():
        pytest.skip("this CPU has no fast products of integers")
    monkeypatch.setattr(candidates, "multiplies_integers", lambda: request.param == "integers")


@pytest.fixture(autouse=True)
def few_queries_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "FEWEST_QUERIES", 512)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of keys and of queries, the last ones not full."""
    monkeypatch.setattr(candidates, "BLOCK", 4096 * DIM)
    monkeypatch.setattr(candidates, "ROWS", 300)


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def by_class(count: int, seed: int) -> Tensor:
    """All rows of a class beside each other, far from the origin, and the classes near to each other."""
    centres = 0.3 * rows(10, 99)
    labels = torch.arange(count) * 10 // count
    return normalize(3 + centres[labels] + 0.2 * rows(count, seed))


DATA = {
    "in all directions": lambda count, seed: normalize(rows(count, seed)),
    "by class": by_class,
    "of many lengths": lambda count, seed: rows(count, seed) * torch.logspace(-3, 3, count)[:, None].flip(0),
    "short": lambda count, seed: 1e-7 * rows(count, seed),
}


def products(queries: Tensor, keys: Tensor) -> Tensor:
    return queries.double() @ keys.double().T


@pytest.mark.parametrize("k", [1, 10, 140])
@pytest.mark.parametrize("data", DATA)
def test_candidates_give_what_a_sort_of_all_products_gives(data: str, k: int, kind: None, small: None) -> None:
    queries, keys = DATA[data](QUERIES, 0), DATA[data](KEYS, 1)
    *_, proved = search(queries, Keys(keys, None, None), k, None)
    assert proved.float().mean() > 0.9
    values, indices = top_k(queries, keys, k)
    everything = products(queries, keys)
    expected = everything.topk(k).values
    lengths = queries.norm(dim=1, keepdim=True) * keys.norm(dim=1).max()
    assert ((values - expected).abs() <= 1e-6 * lengths).all()
    assert ((everything.gather(1, indices) - expected).abs() <= 1e-6 * lengths).all()
    assert (indices.sort(dim=1).values.diff(dim=1) != 0).all()


@pytest.mark.parametrize("largest", [1, 6, 200])
def test_equal_values_are_ordered_by_index_and_few_values_are_no_trouble(largest: int, kind: None) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randint(-largest, largest + 1, (count, DIM), generator=generator).float() for count in (QUERIES, KEYS)
    )
    values, indices = top_k(queries, keys, 100)
    expected = products(queries, keys).sort(dim=1, descending=True, stable=True)
    assert torch.equal(values.double(), expected.values[:, :100])
    assert torch.equal(indices, expected.indices[:, :100])


def test_what_cannot_be_told_apart_in_eight_bits_is_told_apart(kind: None) -> None:
    queries, base = normalize(rows(QUERIES, 0)), normalize(rows(40, 1))
    keys = base.repeat_interleave(250, 0) + 1e-5 * rows(10_000, 2)
    values, _ = top_k(queries, keys, 100)
    torch.testing.assert_close(values.double(), products(queries, keys).topk(100).values, rtol=0, atol=5e-7)


def test_equal_ids_are_left_out_also_where_fewer_than_k_keys_remain(kind: None) -> None:
    queries, keys = normalize(rows(QUERIES, 0)), normalize(rows(KEYS, 1))
    query_ids, key_ids = torch.arange(QUERIES) % 50, torch.arange(KEYS) % 53
    expected = products(queries, keys).masked_fill_(query_ids[:, None] == key_ids, -torch.inf)
    values, indices = top_k(queries, keys, 100, query_ids=query_ids, key_ids=key_ids)
    torch.testing.assert_close(values.double(), expected.topk(100).values, rtol=0, atol=5e-7)
    assert (key_ids[indices] != query_ids[:, None]).all()
    key_ids[60:] = 7
    values, _ = top_k(queries, keys, 100, query_ids=query_ids, key_ids=key_ids)
    left = (query_ids[:, None] != key_ids).sum(1).clamp(max=100)
    assert torch.equal((values > -torch.inf).sum(1), left)
    assert left.min() < 60


def test_a_floor_that_was_too_high_is_noticed_and_the_query_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = normalize(rows(QUERIES, 0)), normalize(rows(KEYS, 1))
    expected = top_k(queries, keys, 50)
    monkeypatch.setattr(candidates, "rank_of", lambda k, share: max(1, int(k * share * 0.9)))
    assert not search(queries, Keys(keys, None, None), 50, None)[2].any()
    values, indices = top_k(queries, keys, 50)
    torch.testing.assert_close(values, expected[0])
    assert (indices == expected[1]).float().mean() > 0.999


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 1e30, 0.0])
def test_rows_that_no_bound_holds_for_are_searched_without_candidates(odd: float) -> None:
    queries, keys = normalize(rows(QUERIES, 0)), normalize(rows(KEYS, 1))
    queries[3], keys[77] = odd, odd
    *_, proved = search(queries, Keys(keys, None, None), 20, None)
    assert not proved[3]
    assert odd == 0.0 or not proved.any()
    values, _ = top_k(queries, keys, 20)
    expected = nearest._of_all_products(queries, Keys(keys, None, None), 20, None)[0]
    torch.testing.assert_close(values, expected, equal_nan=True)


@pytest.mark.parametrize("few", [False, True], ids=["by candidates", "by all products"])
def test_cosines_are_products_of_rows_of_length_one(few: bool) -> None:
    make = DATA["of many lengths"]
    queries, keys = make(300 if few else QUERIES, 0), make(KEYS, 1)
    keys[5], keys[7] = 0.0, 1e-9
    assert candidates.pays(queries, keys, 20) is not few
    before = keys.clone()
    values, indices = top_k(3 * queries, keys, 20, cosine=True)
    expected = top_k(normalize(queries), normalize(keys), 21)
    torch.testing.assert_close(values, expected[0][:, :20], atol=1e-6, rtol=0)
    # Where two keys are equally near but for rounding, either may come first.
    apart = (expected[0][:, :-1] - expected[0][:, 1:] > 1e-6).all(1)
    assert apart.sum() > 100
    assert torch.equal(indices[apart], expected[1][apart, :20])
    assert torch.equal(keys, before)


def test_a_value_depends_on_its_two_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = normalize(rows(QUERIES, 0)), normalize(rows(KEYS, 1))
    values, indices, proved = search(queries, Keys(keys, None, None), 30, None)
    monkeypatch.setattr(candidates, "BLOCK", 2048 * DIM)
    monkeypatch.setattr(candidates, "ROWS", 100)
    values_again, indices_again, proved_again = search(queries[8:], Keys(keys, None, None), 30, None)
    both = proved[8:] & proved_again
    assert both.float().mean() > 0.9
    assert torch.equal(values[8:][both], values_again[both])
    assert torch.equal(indices[8:][both], indices_again[both])


@pytest.mark.parametrize("few", [False, True], ids=["by candidates", "by all products"])
def test_values_are_exact_and_in_float32_also_under_autocast(few: bool, kind: None) -> None:
    queries, keys = rows(300 if few else QUERIES, 0) + 1, rows(KEYS, 1) + 30
    expected = top_k(queries, keys, 20)
    with torch.autocast("cpu", torch.bfloat16):
        values, indices = top_k(queries, keys, 20)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


def test_another_default_number_format_changes_nothing(kind: None, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = normalize(rows(QUERIES, 0)), normalize(rows(KEYS, 1))
    expected = top_k(queries, keys, 20)
    torch.set_default_dtype(torch.float64)
    try:
        values, indices = top_k(queries, keys, 20)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


def test_candidates_are_for_many_float32_keys_on_a_cpu() -> None:
    queries, keys = rows(600, 0), rows(8192, 1)
    assert candidates.pays(queries, keys, 128)
    assert not candidates.pays(queries, keys, 129)
    assert not candidates.pays(queries, keys[1:], 1)
    assert not candidates.pays(queries[:500], keys, 1)
    assert not candidates.pays(queries.double(), keys, 1)
    assert not candidates.pays(queries, keys.bfloat16(), 1)


def shared_answers(shared: bool) -> dict[str, Tensor]:
    """Searches of many keys; of equal values; of fewer keys than neighbours on a process, or none; and kNN."""
    found = {}
    queries, keys = normalize(rows(520, 0)), normalize(rows(2 * 8192 + 5, 1))
    ids, key_ids = torch.arange(520), torch.arange(len(keys)) // 2
    cases: dict[str, tuple[Tensor, Tensor, int, bool]] = {
        "many": (queries, keys, 50, False),
        "many, ids": (queries, keys, 50, True),
        "fewer on a process than k": (queries[:30], keys[:45], 40, False),
        "ids leave too few": (queries[:20], keys[:41], 40, True),
        "one": (queries[:20], keys[:1], 1, False),
        "equal values": ((queries[:30] * 9).round(), (keys[:1001] * 5).round(), 60, False),
        "no query": (queries[:0], keys[:9], 3, False),
    }
    for name, (left, right, k, with_ids) in cases.items():
        given = {"query_ids": ids[: len(left)], "key_ids": key_ids[: len(right)]} if with_ids else {}
        values, indices = top_k(left, right, k, shared=shared, **given)
        found |= {f"{name}: values": values, f"{name}: indices": indices}
    labels = torch.arange(900) % 7
    features = rows(1000, 5)
    features[:900, 0] += 3 * (labels == 2)
    result = knn(features[:900], labels, features[900:], 8, KnnSettings(neighbours=(1, 20, 2000)), shared=shared)
    numbers = torch.tensor([*result.chosen.values(), result.validation], dtype=torch.float64)
    ranked = retrieve(features[:900], labels, shared=shared)
    found |= {"retrieval: recall": ranked.recall, "retrieval: MAP@R": ranked.map_at_r}
    return found | {"kNN: predictions": result.predictions, "kNN: numbers": numbers}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(shared_answers(True), f"{folder}/{rank}.pt")
    assert distributed.world_size() == 2
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("shared")
    start(work, (str(folder),), count=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_with_a_share_of_the_keys_each_give_the_whole_answer_of_one(
    by_two: list[dict[str, Tensor]],
) -> None:
    for name, expected in shared_answers(False).items():
        for found in by_two:
            assert torch.equal(by_two[0][name], found[name]), name
            if expected.is_floating_point():
                torch.testing.assert_close(found[name], expected, rtol=0, atol=5e-7, msg=name)
            else:
                assert torch.equal(found[name], expected), name
