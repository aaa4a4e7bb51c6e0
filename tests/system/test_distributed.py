"""Collectives of 1, 2 and 4 processes, and the engine's softmax over keys of all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from manyviews.engine import log_sum_exp
from manyviews.system import distributed
from processes import start

DIM = 5


def keys_with_gradient() -> dict[str, Tensor]:
    """The engine with keys that want their gradient, uneven in queries and in keys, some processes with none."""
    generator = torch.Generator().manual_seed(1)
    queries, keys = (torch.randn(count, DIM, generator=generator, dtype=torch.float64) for count in (9, 7))
    query_ids, key_ids = torch.tensor([4, 0, 2, 2, 9, 5, 1, 0, 3]), torch.tensor([2, 0, 7, 7, 4, 1, 0])
    sizes = {1: ([9], [7]), 2: ([9, 0], [2, 5]), 4: ([1, 4, 0, 4], [0, 6, 1, 0])}[distributed.world_size()]
    own_queries, own_keys = (torch.arange(sum(part)).split(part)[distributed.rank()] for part in sizes)
    found = {}
    for temperature in (0.3, 0.004):
        q, k = queries[own_queries].requires_grad_(), keys[own_keys].requires_grad_()
        result = log_sum_exp(q, k, temperature, query_ids=query_ids[own_queries], key_ids=key_ids[own_keys])
        gradients = torch.autograd.grad((result * (own_queries + 1)).sum(), [q, k])
        for name, value in zip(("result", "queries", "keys"), (result.detach(), *gradients), strict=True):
            found[f"{name} {temperature}"] = distributed.gather_without_gradient(value)
    return found


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{size}", rank=rank, world_size=size)
    found: dict[str, Any] = {"keys with gradient": keys_with_gradient()}
    local = torch.arange(6.0).view(3, 2) + 10 * rank
    leaf = local.clone().requires_grad_()
    # Each process weighs the gathered rows differently; the sum of the weights comes home.
    gathered = distributed.gather(leaf)
    (gathered * (rank + 1) * torch.arange(6.0 * size).view(-1, 2)).sum().backward()
    found["functions"] = {
        "rank": distributed.rank(),
        "size": distributed.world_size(),
        "gathered": gathered.detach(),
        "leaf": leaf.grad,
        "plain": distributed.gather_without_gradient(leaf),
        "uneven": distributed.gather_without_gradient(local[: 2 - rank % 2]),
        "empty": distributed.gather_without_gradient(local[:0] if rank else local),
        "nothing": distributed.gather_without_gradient(local[:0]),
        "counts": distributed.counts(7 * rank),
        "scattered": distributed.scatter_sum(torch.arange(float(size + 1)) * (rank + 1), [1] * (size - 1) + [2]),
        # Process r sends r + 1 rows to each of the others and to itself.
        "exchanged": distributed.exchange(
            local[:1].repeat((rank + 1) * size, 1), [rank + 1] * size, [other + 1 for other in range(size)]
        ),
        "maximum": distributed.maximum(torch.tensor([1.0, rank, -rank])),
        "total": distributed.total(torch.tensor([1.0, rank])),
        "mean": distributed.mean(torch.tensor([1.0, rank])),
        "any": [distributed.any_over_ranks(rank == 1), distributed.any_over_ranks(False)],
        "first": distributed.from_first_rank(0.1 + rank),
    }
    distributed.barrier()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} processes")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder, size = tmp_path_factory.mktemp("ranks"), request.param
    start(work, (size, str(folder)), count=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def test_keys_of_other_processes_get_their_gradient_also_where_counts_differ(ranks: list[dict[str, Any]]) -> None:
    for key, expected in keys_with_gradient().items():
        for rank in ranks:
            torch.testing.assert_close(rank["keys with gradient"][key], expected, rtol=1e-10, atol=1e-12)


def test_each_process_knows_its_place(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        assert (rank["functions"]["rank"], rank["functions"]["size"]) == (number, len(ranks))
        assert rank["functions"]["counts"] == [7 * other for other in range(len(ranks))]


@pytest.mark.parametrize(("count", "size"), [(10, 3), (2, 4), (0, 2), (12, 4)])
def test_shares_are_consecutive_and_alike_to_one(count: int, size: int) -> None:
    shares = [distributed.share(count, rank, size) for rank in range(size)]
    assert [number for share in shares for number in range(count)[share]] == list(range(count))
    assert {share.stop - share.start for share in shares} <= {count // size, count // size + 1}
    assert distributed.share(count) == slice(0, count)


def test_gather_concatenates_in_rank_order_and_sums_the_gradients_home(ranks: list[dict[str, Any]]) -> None:
    locals_ = [torch.arange(6.0).view(3, 2) + 10 * number for number in range(len(ranks))]
    weights = sum(number + 1 for number in range(len(ranks))) * torch.arange(6.0 * len(ranks)).view(-1, 2)
    for number, rank in enumerate(ranks):
        assert torch.equal(rank["functions"]["gathered"], torch.cat(locals_))
        assert torch.equal(rank["functions"]["plain"], torch.cat(locals_))
        assert not rank["functions"]["plain"].requires_grad
        assert torch.equal(rank["functions"]["leaf"], weights[3 * number : 3 * number + 3])


def test_gather_joins_any_lengths_none_included(ranks: list[dict[str, Any]]) -> None:
    locals_ = [torch.arange(6.0).view(3, 2)[: 2 - number % 2] + 10 * number for number in range(len(ranks))]
    for rank in ranks:
        assert torch.equal(rank["functions"]["uneven"], torch.cat(locals_))
        assert rank["functions"]["empty"].tolist() == [[0, 1], [2, 3], [4, 5]]
        assert rank["functions"]["nothing"].shape == (0, 2)


def test_a_scattered_sum_gives_each_process_its_own_slice_of_it(ranks: list[dict[str, Any]]) -> None:
    weight = sum(number + 1 for number in range(len(ranks)))
    found = [value for rank in ranks for value in rank["functions"]["scattered"].tolist()]
    assert found == [weight * number for number in range(len(ranks) + 1)]
    assert len(ranks[-1]["functions"]["scattered"]) == 2


def test_an_exchange_brings_each_process_what_the_others_have_for_it(ranks: list[dict[str, Any]]) -> None:
    expected = [[10 * other, 10 * other + 1] for other in range(len(ranks)) for _ in range(other + 1)]
    assert all(rank["functions"]["exchanged"].tolist() == expected for rank in ranks)


def test_sums_means_and_agreements_are_the_same_everywhere(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        numbers = list(range(len(ranks)))
        assert rank["functions"]["total"].tolist() == [len(ranks), sum(numbers)]
        assert rank["functions"]["mean"].tolist() == [1, sum(numbers) / len(ranks)]
        assert rank["functions"]["maximum"].tolist() == [1, numbers[-1], 0]
        assert rank["functions"]["any"] == [True, False]
        assert rank["functions"]["first"] == 0.1


def test_one_process_needs_no_process_group() -> None:
    local = torch.randn(3, 2, requires_grad=True)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather(local) is local
    assert torch.equal(distributed.gather_without_gradient(local), local)
    assert not distributed.gather_without_gradient(local).requires_grad
    assert torch.equal(distributed.scatter_sum(local, [3]), local)
    assert torch.equal(distributed.maximum(local), local)
    assert distributed.counts(3) == [3]
    assert torch.equal(distributed.mean(local), distributed.total(local))
    assert not distributed.mean(local).requires_grad
    assert distributed.any_over_ranks(True)
    assert not distributed.any_over_ranks(False)
    assert distributed.from_first_rank(0.3) == 0.3
    distributed.barrier()


def test_a_total_leaves_its_input_alone() -> None:
    value = torch.ones(2)
    distributed.total(value).add_(1)
    assert value.tolist() == [1, 1]
