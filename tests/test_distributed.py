"""Two processes on half of the batch each do what one process does on the whole: loss, gradient and state."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from contrastive import distributed
from contrastive.config import Settings
from contrastive.objectives import Bank, InBatch, Queue

STEPS, BATCH, INPUTS, DIM, IMAGES = 4, 8, 6, 5, 40
OBJECTIVES: dict[str, tuple[Settings, int]] = {
    "in_batch": (InBatch(), 2),
    "in_batch, decoupled": (InBatch(decoupled=True), 2),
    "in_batch, three views": (InBatch(temperature=0.5), 3),
    "queue": (Queue(size=27), 2),
    "queue, symmetric": (Queue(size=5, symmetric=True), 2),
    "bank": (Bank(), 2),
    "bank, one view": (Bank(momentum=0.0), 1),
    "bank, nce": (Bank(estimator="nce", negatives=12), 2),
    "bank, nce, noise per image": (Bank(estimator="nce", negatives=12, shared=False), 2),
    "bank, nce, exact Z": (Bank(estimator="nce", negatives=12, normaliser="exact"), 2),
    "bank, nce, first Z": (Bank(estimator="nce", negatives=12, normaliser="first_batch"), 2),
}
WRONG = {"no gradient": distributed.gather_without_gradient, "own slice put back": lambda local: _own_slice(local)}


def train(settings: Settings, views: int) -> dict[str, Any]:
    """A few steps of a linear encoder on this process's slice of a fixed batch; figures are means over processes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(INPUTS, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    twin = torch.randn(INPUTS, DIM, generator=generator, dtype=torch.float64)
    objective = settings.build(dim=DIM, num_images=IMAGES, seed=3).double()
    own = slice(
        distributed.rank() * BATCH // distributed.size(), (distributed.rank() + 1) * BATCH // distributed.size()
    )
    losses, gradients = [], []
    for step in range(STEPS):
        images = torch.randn(views, BATCH, INPUTS, generator=generator, dtype=torch.float64)
        # The second half is another kind of data: a gradient that forgets the other process shows.
        images[:, BATCH // 2 :] = images[:, BATCH // 2 :].abs() * 3 + 1
        ids = torch.randperm(IMAGES, generator=generator)[:BATCH]
        ids[-1], ids[1] = ids[0], ids[2]  # one image on both processes, one twice on the same
        embeddings, targets = images[:, own] @ weight, images[:, own] @ twin
        loss = objective(embeddings, ids[own], targets, step).total
        (gradient,) = torch.autograd.grad(loss, weight)
        gradients.append(distributed.mean(gradient))
        losses.append(distributed.mean(loss))
        with torch.no_grad():
            weight -= gradients[-1]
        objective.update(embeddings, ids[own], targets)
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients), **state}


def _own_slice(local: Tensor) -> Tensor:
    gathered = distributed.gather_without_gradient(local).clone()
    gathered[distributed.rank() * len(local) : (distributed.rank() + 1) * len(local)] = local
    return gathered


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found: dict[str, Any] = {name: train(*arguments) for name, arguments in OBJECTIVES.items()}
    right = distributed.gather
    for name, wrong in WRONG.items():
        distributed.gather = wrong
        found[name] = train(*OBJECTIVES["in_batch"])
    distributed.gather = right
    local = torch.arange(6.0).view(3, 2) + 10 * rank
    leaf = local.clone().requires_grad_()
    # Each process weighs the gathered rows differently; the sum of the weights comes home.
    gathered = distributed.gather(leaf)
    (gathered * (rank + 1) * torch.arange(12.0).view(6, 2)).sum().backward()
    found["functions"] = {
        "rank": distributed.rank(),
        "size": distributed.size(),
        "gathered": gathered.detach(),
        "leaf": leaf.grad,
        "plain": distributed.gather_without_gradient(leaf),
        "uneven": distributed.gather_uneven(local[: 2 - rank]),
        "empty": distributed.gather_uneven(local[:0] if rank else local),
        "nothing": distributed.gather_uneven(local[:0]),
        "total": distributed.total(torch.tensor([1.0, rank])),
        "mean": distributed.mean(torch.tensor([1.0, rank])),
        "any": [distributed.any_rank(rank == 1), distributed.any_rank(False)],
        "first": distributed.from_first_rank(0.1 + rank),
    }
    distributed.barrier()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def difference(found: dict[str, Any], expected: dict[str, Any], key: str) -> float:
    return ((found[key] - expected[key]).abs().max() / expected[key].abs().max()).item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_have_the_loss_and_gradient_of_one(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = train(*OBJECTIVES[name])
    for rank in ranks:
        assert difference(rank[name], alone, "losses") < 1e-10
        assert difference(rank[name], alone, "gradients") < 1e-10


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not name.startswith("in_batch")])
def test_queue_and_bank_are_the_same_on_every_process_and_alone(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = train(*OBJECTIVES[name])
    assert ranks[0][name].keys() == alone.keys() != {"losses", "gradients"}
    for key in alone.keys() - {"losses", "gradients"}:
        assert torch.equal(ranks[0][name][key], ranks[1][name][key]) or ranks[0][name][key].isnan().all()
        torch.testing.assert_close(ranks[0][name][key], alone[key], rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", WRONG)
def test_the_comparison_finds_a_gather_with_a_wrong_gradient(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = train(*OBJECTIVES["in_batch"])
    assert abs(ranks[0][name]["losses"][0] - alone["losses"][0]) < 1e-10
    assert difference(ranks[0][name], alone, "gradients") > 1e-2


def test_each_process_knows_its_place(ranks: list[dict[str, Any]]) -> None:
    assert [rank["functions"]["rank"] for rank in ranks] == [0, 1]
    assert [rank["functions"]["size"] for rank in ranks] == [2, 2]


def test_gather_concatenates_in_rank_order_and_sums_the_gradients_home(ranks: list[dict[str, Any]]) -> None:
    locals_ = [torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 10]
    for number, rank in enumerate(ranks):
        assert torch.equal(rank["functions"]["gathered"], torch.cat(locals_))
        assert torch.equal(rank["functions"]["plain"], torch.cat(locals_))
        assert not rank["functions"]["plain"].requires_grad
        assert torch.equal(rank["functions"]["leaf"], 3 * torch.arange(12.0).view(6, 2)[3 * number : 3 * number + 3])


def test_gather_uneven_joins_any_lengths_none_included(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["functions"]["uneven"].tolist() == [[0, 1], [2, 3], [10, 11]]
        assert rank["functions"]["empty"].tolist() == [[0, 1], [2, 3], [4, 5]]
        assert rank["functions"]["nothing"].shape == (0, 2)


def test_sums_means_and_agreements_are_the_same_everywhere(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["functions"]["total"].tolist() == [2, 1]
        assert rank["functions"]["mean"].tolist() == [1, 0.5]
        assert rank["functions"]["any"] == [True, False]
        assert rank["functions"]["first"] == 0.1


def test_one_process_needs_no_process_group() -> None:
    local = torch.randn(3, 2, requires_grad=True)
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.gather(local) is local
    assert torch.equal(distributed.gather_without_gradient(local), local)
    assert not distributed.gather_without_gradient(local).requires_grad
    assert torch.equal(distributed.gather_uneven(local), local)
    assert torch.equal(distributed.mean(local), distributed.total(local))
    assert not distributed.mean(local).requires_grad
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.from_first_rank(0.3) == 0.3
    distributed.barrier()


def test_a_total_leaves_its_input_alone() -> None:
    value = torch.ones(2)
    distributed.total(value).add_(1)
    assert value.tolist() == [1, 1]


def test_every_objective_is_a_module_that_keeps_its_state_in_buffers() -> None:
    for settings, _ in OBJECTIVES.values():
        objective: nn.Module = settings.build(dim=DIM, num_images=IMAGES, seed=0)
        assert not list(objective.parameters())
