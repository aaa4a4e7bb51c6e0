"""Processes that share a batch do what one process does on the whole: loss, gradient and state, at 1, 2 and 4."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from manyviews.engine import log_sum_exp, pairs, softmax
from manyviews.objectives import (
    Bank,
    Contrastive,
    InBatch,
    LogRatio,
    Margin,
    MarginSoftmax,
    NearestNeighbours,
    NoiseContrastive,
    NPair,
    Population,
    Queue,
    Ranking,
    Supervised,
    Triplet,
    noise,
)
from manyviews.objectives.mining import All, DistanceWeighted, Easiest, Hard, Hardest, Random, SemiHard
from manyviews.objectives.objective import ObjectiveSettings
from manyviews.system import distributed
from processes import start

BATCHES, INPUTS, DIM, IMAGES = [8, 8, 5, 8], 6, 5, 41
"""The third batch is uneven on 2 and on 4 processes; neither bank nor queue divides evenly."""
OBJECTIVES: dict[
    str, tuple[ObjectiveSettings, int] | tuple[ObjectiveSettings, int, bool] | tuple[ObjectiveSettings, int, bool, int]
] = {
    "in_batch": (InBatch(), 2),
    "in_batch, decoupled": (InBatch(decoupled=True), 2),
    "in_batch, three views": (InBatch(temperature=0.5), 3),
    "in_batch, cold": (InBatch(temperature=0.01), 2),
    "in_batch, debiased": (InBatch(positive_probability=0.1), 2),
    "in_batch, hard": (InBatch(temperature=0.5, positive_probability=0.1, hardness=1.0), 2),
    "in_batch, bilinear": (InBatch(score="bilinear", temperature=20.0), 2),
    "in_batch, bilinear, hard": (InBatch(score="bilinear", temperature=20.0, hardness=0.5, decoupled=True), 3),
    "supervised": (Supervised(), 2),
    "supervised, three views": (Supervised(temperature=0.5), 3),
    "nearest_neighbours": (NearestNeighbours(size=27), 2),
    "nearest_neighbours, three views": (NearestNeighbours(size=5), 3),
    "queue": (Queue(size=27), 2),
    "queue, cold": (Queue(size=27, temperature=0.01), 2),
    "queue, symmetric": (Queue(size=5, symmetric=True), 2),
    "queue, classes": (Queue(size=27), 2, False, 5),
    "queue, symmetric, classes": (Queue(size=13, symmetric=True), 2, False, 5),
    "bank": (Bank(), 2),
    "bank, cold": (Bank(temperature=0.01), 2),
    "bank, one view": (Bank(momentum=0.0), 1),
    "bank, proximal": (Bank(proximal=2.0), 2),
    "bank, nce": (Bank(estimator="nce", negatives=12), 2),
    "bank, nce, noise per image": (Bank(estimator="nce", negatives=12, shared=False), 2),
    "bank, nce, one noise row": (Bank(estimator="nce", negatives=1), 2),
    "bank, nce, exact Z": (Bank(estimator="nce", negatives=12, normaliser="exact"), 2),
    "bank, nce, exact Z, refreshed": (Bank(estimator="nce", negatives=12, normaliser="exact", normaliser_every=2), 2),
    "bank, nce, first Z": (Bank(estimator="nce", negatives=12, normaliser="first_batch"), 2),
    "bank, nce, given Z": (Bank(estimator="nce", negatives=12, normaliser=30.0), 2),
    "bank, infonce": (Bank(estimator="infonce", negatives=12), 2),
    "bank, infonce, noise per image": (Bank(estimator="infonce", negatives=12, shared=False), 2),
    "bank, infonce, one noise row": (Bank(estimator="infonce", negatives=1, shared=False), 2),
    "bank, parametric": (Bank(estimator="parametric", temperature=0.2), 2),
    "margin_softmax": (MarginSoftmax(), 2),
    "margin_softmax, of any length": (MarginSoftmax(preset="sphereface"), 1),
    "noise_contrastive": (NoiseContrastive(negatives=12, temperature=0.5), 2),
    "noise_contrastive, one noise row": (NoiseContrastive(negatives=1, power=0.0, normaliser=3.0), 1),
    "noise_contrastive, sampling": (NoiseContrastive(negatives=60, correction=False, temperature=0.5), 2),
    "noise_contrastive, sampling for all": (NoiseContrastive(negatives=60, correction=False, shared=True), 2),
    "noise_contrastive, noise for each": (NoiseContrastive(negatives=12, temperature=0.5, shared=False), 2),
    "noise_contrastive, classes": (NoiseContrastive(negatives=3, correction=False, temperature=0.5), 2, False, 7),
    "n_pair": (NPair(), 2),
    "n_pair, both ways round": (NPair(symmetric=True), 2),
    "n_pair, one_vs_one, both ways round": (NPair(form="one_vs_one", symmetric=True), 2),
    "n_pair, three views, both ways round": (NPair(symmetric=True, norm_penalty=0.1), 3),
    "n_pair, one_vs_one": (NPair(form="one_vs_one"), 2),
    "log_ratio, values": (LogRatio(), 2, True),
    "log_ratio, one view, values": (LogRatio(squared="embeddings"), 1, True),
    "ranking, squared_error": (Ranking(loss="squared_error"), 2),
    "ranking, cross_entropy": (Ranking(loss="cross_entropy"), 2),
    "ranking, rank_net": (Ranking(loss="rank_net"), 3),
    "ranking, hinge": (Ranking(loss="hinge"), 3),
    "ranking, list_net": (Ranking(loss="list_net"), 2),
    "ranking, list_mle": (Ranking(loss="list_mle"), 3),
    "ranking, hinge, values": (Ranking(loss="hinge"), 2, True),
    "ranking, list_mle, values": (Ranking(loss="list_mle"), 1, True),
    "contrastive": (Contrastive(), 2),
    "contrastive, un-normalised": (Contrastive(margin=5.0, squared=False, normalized=False, average="all"), 2),
    "contrastive, random": (Contrastive(sampling=Random(positives="random"), average="all"), 2),
    "contrastive, distance-weighted": (Contrastive(margin=1.4, sampling=DistanceWeighted()), 2),
    "triplet": (Triplet(margin=1.0), 2),
    "triplet, all": (Triplet(sampling=All()), 2),
    "triplet, all, soft": (Triplet(sampling=All(), soft=True, squared=False, normalized=False), 2),
    "triplet, hard": (Triplet(sampling=Hard()), 2),
    "triplet, semi-hard or left out": (Triplet(sampling=SemiHard(fallback=None)), 2),
    "triplet, hardest, one view": (Triplet(sampling=Hardest(), squared=False), 1),
    "triplet, easiest, three views": (Triplet(sampling=Easiest(), average="all", margin=1.0), 3),
    "margin": (Margin(), 2),
    "margin, a boundary for each id": (Margin(beta_per="class", nu=0.1, sampling=SemiHard()), 2),
    "margin, all": (Margin(sampling=All(), nu=0.1), 2),
}
SHARED = ("information", "ceiling", "active", "easy", "semi_hard", "hard", "without_negative", "fallback")
STATELESS = ("in_batch", "supervised", "n_pair", "ranking", "contrastive", "triplet")
GATHERED = ("bank, nce, noise per image", "bank, infonce, noise per image")
PROCESSES = (2, 4)


def train(
    settings: ObjectiveSettings, views: int, labelled: bool = False, classes: int = IMAGES, *, double: bool = True
) -> dict[str, Any]:
    """A few steps of a linear encoder on this process's share of fixed batches; figures are means over processes."""
    dtype = torch.float64 if double else torch.float32
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(INPUTS, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    twin = torch.randn(INPUTS, DIM, generator=generator, dtype=torch.float64).to(dtype)
    values = torch.sin(torch.arange(2.0 * IMAGES)).view(IMAGES, 2).to(dtype) if labelled else None
    objective = settings.build(dim=DIM, population=Population(torch.arange(IMAGES) % classes, values), seed=3)
    objective = objective.double() if double else objective
    learned = [weight, *objective.parameters()]
    losses, gradients = [], []
    for step, batch in enumerate(BATCHES):
        own = distributed.share(batch)
        images = torch.randn(views, batch, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
        # The second half is another kind of data: a gradient that forgets the other processes shows.
        images[:, batch // 2 :] = images[:, batch // 2 :].abs() * 3 + 1
        ids = torch.randperm(IMAGES, generator=generator)[:batch]
        ids[-1], ids[1] = ids[0], ids[2]  # one image on two processes, one twice on the same
        ids %= classes
        embeddings, targets = images[:, own] @ weight, images[:, own] @ twin
        if settings.splits_views:
            embeddings, targets = embeddings[:1], targets[1:]
        loss, terms = objective(embeddings, ids[own], targets, step)
        found = torch.autograd.grad(loss, learned)
        gradients.append(distributed.mean(found[0]))
        # The terms that are shares of the whole batch, beside its loss.
        shared = [terms[name].to(loss) for name in SHARED if name in terms]
        losses.append(distributed.mean(torch.stack([loss, *shared])))
        with torch.no_grad():
            # Embeddings that are not normalised would grow without bound.
            weight -= gradients[-1] * (1e-3 if isinstance(settings, NPair) else 1)
            for (name, parameter), gradient in zip(objective.named_parameters(), found[1:], strict=True):
                # What is spread over the processes has the sum of their gradients, what is alike on all a part of it.
                parameter -= (
                    gradient / distributed.world_size() if name in objective.shards() else distributed.mean(gradient)
                )
        objective.update(embeddings.detach(), ids[own], targets)
    spread = objective.shards()
    state = {name: value.detach() for name, value in objective.state_dict().items()}
    whole = {
        name: distributed.gather_without_gradient(value) if name in spread else value.clone()
        for name, value in state.items()
    }
    parts = {f"{name}, own": len(value) for name, value in state.items() if name in spread}
    lengths = {f"{name}, all": length for name, length in spread.items()}
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients), **whole, **parts, **lengths}


@functools.cache
def by_one(name: str, *, double: bool = True) -> dict[str, Any]:
    """What one process makes of it."""
    return train(*OBJECTIVES[name], double=double)


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


def _keep_own(whole: Tensor, lengths: list[int]) -> Tensor:
    """A wrong way home: what this process found for its own rows, without what the others found for them."""
    return whole.split(list(lengths))[distributed.rank()]


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{size}", rank=rank, world_size=size)
    found: dict[str, Any] = {name: train(*arguments) for name, arguments in OBJECTIVES.items()}
    found |= {f"{name} in float32": train(*arguments, double=False) for name, arguments in OBJECTIVES.items()}
    right, distributed.scatter_sum = distributed.scatter_sum, _keep_own
    found["wrong"] = train(*OBJECTIVES["in_batch"])
    distributed.scatter_sum = right
    noise.DENSE = 0
    for name in GATHERED:
        found[f"{name}, gathered"] = train(*OBJECTIVES[name])
    pairs.tile_shape = softmax.tile_shape = lambda device: (2, 3)
    found["small tiles"] = train(*OBJECTIVES["in_batch, three views"])
    found["keys with gradient"] = keys_with_gradient()
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


@pytest.fixture(scope="module", params=PROCESSES, ids=lambda size: f"{size} processes")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder, size = tmp_path_factory.mktemp("ranks"), request.param
    start(work, (size, str(folder)), count=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def difference(found: dict[str, Any], expected: dict[str, Any], key: str) -> float:
    return ((found[key] - expected[key]).abs().max() / expected[key].abs().max()).item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_processes_have_the_loss_and_gradient_of_one(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = by_one(name)
    narrow = by_one(name, double=False)
    for rank in ranks:
        for key in ("losses", "gradients"):
            assert difference(rank[name], alone, key) < 1e-10
            # At a temperature of 0.01 float32 itself is no better than 2e-6 after a few steps. Nor is it for products
            # of long embeddings, which are exponents, and for small distances.
            if not name.startswith(("n_pair", "log_ratio")) and "cold" not in name:
                assert difference(rank[f"{name} in float32"], narrow, key) < 1e-6


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not name.startswith(STATELESS)])
def test_what_is_spread_over_the_processes_is_together_what_one_has(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = by_one(name)
    assert ranks[0][name].keys() == alone.keys() != {"losses", "gradients"}
    for key, expected in alone.items():
        for rank in ranks:
            if key.endswith(", own"):
                assert rank[name][key] in (expected // len(ranks), expected // len(ranks) + 1)
            elif key.endswith(", all"):
                assert rank[name][key] == expected == alone[key.replace("all", "own")]
            else:
                torch.testing.assert_close(rank[name][key], expected, rtol=1e-10, atol=1e-10, equal_nan=True)
                assert torch.equal(rank[name][key], ranks[0][name][key]) or rank[name][key].isnan().all()
    for own in (key for key in alone if key.endswith(", own")):
        assert sum(rank[name][own] for rank in ranks) == alone[own]


def test_the_comparison_finds_gradients_that_do_not_come_home(ranks: list[dict[str, Any]]) -> None:
    alone = by_one("in_batch")
    assert abs(ranks[0]["wrong"]["losses"][0, 0] - alone["losses"][0, 0]) < 1e-10
    assert difference(ranks[0]["wrong"], alone, "gradients") > 1e-2


def test_tiles_smaller_than_a_share_change_nothing(ranks: list[dict[str, Any]]) -> None:
    alone = by_one("in_batch, three views")
    for key in ("losses", "gradients"):
        assert difference(ranks[0]["small tiles"], alone, key) < 1e-10


@pytest.mark.parametrize("name", GATHERED)
def test_noise_rows_that_are_gathered_give_what_products_with_all_rows_give(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    alone = by_one(name)
    for key in ("losses", "gradients", "rows"):
        assert difference(ranks[-1][f"{name}, gathered"], alone, key) < 1e-10


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


def test_what_is_spread_is_named() -> None:
    for settings, *_ in OBJECTIVES.values():
        population = Population(torch.arange(IMAGES), torch.arange(1.0 * IMAGES).unsqueeze(1))
        objective = settings.build(dim=DIM, population=population, seed=0)
        assert objective.shards().keys() <= objective.state_dict().keys()
