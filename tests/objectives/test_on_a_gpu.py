"""Objectives on a pretend GPU: the CPU's numbers, without waiting and in few launches, also on several of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_contract import BATCHES, CASES, IMAGES, Case, by_one, difference, drawn, every, step, train

from manyviews.engine import pairs, softmax, tiles
from manyviews.objectives import OBJECTIVES, Margin, Population, noise, query_losses
from manyviews.system import distributed
from pretend_cuda import LOG, pretend_cuda
from processes import start

LAUNCHES = {
    "in_batch": 200,
    "cpc": 300,
    "supervised": 150,
    "nearest_neighbours": 360,
    "queue": 150,
    "bank": 200,
    "margin_softmax": 210,
    "noise_contrastive": 380,
    "n_pair": 330,
    "log_ratio": 260,
    "ranking": 320,
    "contrastive": 780,
    "triplet": 350,
    "margin": 500,
}
"""Launches of a step at most, forward, backward and update, with tiles that are to it as those of a GPU are to one of
8,192 embeddings. A launch takes a host some 5 µs."""
CUBIC = "ranking, hinge, values"
"""Its work grows with the third power of the batch, and its launches with it."""


def waits(case: Case) -> int:
    """How often a host waits: once, where it has to know how many embeddings an id has and has no bound of it."""
    name, settings = case.settings.name, case.settings
    of_pairs = name in ("contrastive", "triplet", "margin") or getattr(settings, "loss", None) == "rank_net"
    return int(of_pairs and case.relations is None)


@every
def test_values_gradients_and_state_are_those_of_a_cpu_and_nothing_waits(name: str) -> None:
    expected = by_one(name)
    with pretend_cuda() as log:
        case = CASES[name]
        objective = case.build().to("cuda")
        views, ids = drawn(case)
        views, ids = views.float().to("cuda").requires_grad_(), ids.to("cuda")
        for number in range(2):
            log.clear()
            loss = step(objective, case, views, ids, number)
            torch.autograd.grad(loss.total, views)
        assert log.waits.total() == waits(case), str(log)
        assert loss.total.device.type == "cuda"
        assert all(term.device.type == "cuda" for term in loss.terms.values())
        found = {
            key: value.cpu() if isinstance(value, torch.Tensor) else value
            for key, value in train(case, device="cuda").items()
        }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, equal_nan=True)
        else:
            assert found[key] == value


@pytest.mark.parametrize("alike", [2, 5], ids=["as many", "more"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if waits(case)])
def test_where_the_number_of_images_of_an_id_is_bounded_nothing_waits(name: str, alike: int) -> None:
    case = CASES[name]
    views, ids = drawn(case)
    expected: list[torch.Tensor] = []
    with pretend_cuda() as log:
        for device in ("cpu", "cuda"):
            population = Population(torch.arange(IMAGES), alike=alike, keys=case.keys)
            objective = case.settings.build(dim=5, population=population, seed=3).to(device, torch.float64)
            z, own_ids = views.to(device).requires_grad_(), ids.to(device)
            log.clear()
            loss = step(objective, case, z, own_ids, 0)
            found = [loss.total.detach(), *torch.autograd.grad(loss.total, z), *loss.terms.values()]
            assert not log.waits
            expected = expected or found
        torch.testing.assert_close([part.cpu() for part in found], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [name if name in OBJECTIVES else pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != CUBIC],
)
def test_launches_stay_within_the_budget_where_a_batch_has_several_tiles(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings, dim = 256, 8192 // 256
    for module in (tiles, noise, query_losses):
        monkeypatch.setattr(module, "tile_numbers", lambda device, on_cpu: (1 << 25) // dim**2)
    for module in (pairs, softmax):
        monkeypatch.setattr(module, "tile_shape", lambda device: (embeddings, embeddings))
    case = CASES[name]
    classes = case.classes if case.classes < IMAGES else 1000
    monkeypatch.setattr("test_contract.IMAGES", 1000)
    with pretend_cuda() as log:
        objective = case._replace(classes=classes).build().to("cuda")
        count, generator = case.views + case.local, torch.Generator().manual_seed(0)
        ids = (torch.randperm(1000, generator=generator) % classes)[: embeddings // count // case.size * case.size]
        views = torch.randn(count, len(ids), 5, generator=torch.Generator().manual_seed(0)).to("cuda")
        views, ids = views.requires_grad_(), ids.to("cuda")
        for number in range(2):
            log.clear()
            torch.autograd.grad(step(objective, case, views, ids, number).total, views)
        assert log.launches.total() <= LAUNCHES.get(case.settings.name, 400), str(log)
        assert log.waits.total() == waits(case), str(log)


def test_unit_rows_need_no_maximum_unless_the_temperature_is_low() -> None:
    with pretend_cuda() as log:
        rows = torch.nn.functional.normalize(torch.randn(64, 5, generator=torch.Generator().manual_seed(0))).to("cuda")
        ids = torch.arange(64).to("cuda")
        counts = []
        for temperature, unit in ((0.1, True), (0.1, False), (0.01, True)):
            log.clear()
            softmax.log_sum_exp(rows, None, temperature, query_ids=ids, unit=unit)
            counts.append(log.launches.total())
    assert counts[0] < counts[1] == counts[2]


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("temperature", [0.03, 0.1])
def test_rows_that_coincide_or_oppose_are_summed_without_overflow(temperature: float, unit: bool) -> None:
    row = torch.nn.functional.normalize(torch.tensor([1.0, 2.0, 3.0]), dim=0)
    rows = torch.stack([row] * 32 + [-row] * 32)
    with pretend_cuda():
        z = rows.to("cuda").requires_grad_()
        value = softmax.log_sum_exp(z, None, temperature, query_ids=torch.arange(64).to("cuda"), unit=unit)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        value, gradient = value.cpu(), gradient.cpu()
    expected = torch.logsumexp((rows.double() @ rows.double().T / temperature).fill_diagonal_(-torch.inf), 1)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)
    assert gradient.isfinite().all()


def work(rank: int, size: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    with pretend_cuda(size):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
        )
        found: dict[str, Any] = {}
        for name in names:
            LOG.clear()
            trained = train(CASES[name], device="cuda")
            # Beside the copies of modules and batches.
            copies = [count for line, count in LOG.waits.items() if line.startswith("backward blocking copy to GPU")]
            trained["waits"] = LOG.waits.total() - sum(copies)
            found[name] = {
                key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in trained.items()
            }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=lambda size: f"{size} GPUs")
def gpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder, size = tmp_path_factory.mktemp("gpus"), request.param
    names = list(OBJECTIVES) if size == 2 else list(CASES)
    start(work, (size, names, str(folder)), count=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def test_several_gpus_have_the_losses_gradients_and_state_of_one_cpu(gpus: list[dict[str, Any]]) -> None:
    assert distributed.world_size() == 1
    for found in gpus:
        for name, trained in found.items():
            alone = by_one(name)
            for key in ("losses", "gradients"):
                assert difference(trained, alone, key) < 1e-10, (name, key)
            for key in alone.keys() - {"losses", "gradients"}:
                if isinstance(alone[key], torch.Tensor):
                    torch.testing.assert_close(trained[key], alone[key], rtol=1e-10, atol=1e-10, equal_nan=True)


def test_several_gpus_wait_no_more_than_one(gpus: list[dict[str, Any]]) -> None:
    for found in gpus:
        for name, trained in found.items():
            # Whether the first batch's normaliser is known is read until it is.
            assert trained["waits"] == len(BATCHES) * waits(CASES[name]) + (name == "bank, nce, first Z"), name


@pytest.mark.slow
def test_the_budget_would_not_hold_tiles_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "tile_numbers", lambda device, on_cpu: (1 << 18) // 1024)
    with pretend_cuda() as log:
        case = Case(Margin())
        views = torch.randn(2, 128, 5, generator=torch.Generator().manual_seed(0)).to("cuda").requires_grad_()
        step(case.build().to("cuda"), case, views, torch.arange(128).to("cuda") % IMAGES, 0)
        assert log.launches.total() > LAUNCHES["margin"]
