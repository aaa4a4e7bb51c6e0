"""Encoding on a GPU, a pretend one: the features of the CPU, and when the host waits for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manyviews.data import InMemory
from manyviews.data.images import Pictures, array_split
from manyviews.features.encoding import encoded, extract
from manyviews.system import hardware
from manyviews.system.distributed import all_gather_object
from manyviews.views import StandardView
from pretend_cuda import Log, pretend_cuda
from processes import start

COUNT = 37


def images() -> InMemory:
    pixels = torch.randint(0, 256, (COUNT, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return array_split("images", pixels, torch.arange(COUNT) % 4, "0123")


VIEW = StandardView(8, 1, mean=(0.0,), std=(1.0,))


@dataclass(frozen=True)
class Noted(StandardView):
    """A view that calls a function before each batch."""

    note: Callable[[], object] = lambda: None

    def __call__(self, pictures: Pictures) -> Tensor:
        self.note()
        return super().__call__(pictures)


def backbone() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


class Products(nn.Module):
    """Notes the precision of products while it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.add(torch.backends.cuda.matmul.fp32_precision)
        return inputs.flatten(1)


@pytest.fixture
def log() -> Iterator[Log]:
    with pretend_cuda() as log:
        yield log


def waits(log: Log, file: str = "features/encoding.py") -> int:
    return sum(count for line, count in log.waits.items() if line.startswith(file))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_waits_once_for_each_batch_when_the_next_one_has_begun(precision: Any, log: Log) -> None:
    module = backbone()
    expected = extract(module, images(), view=VIEW, batch_size=10, precision=precision)
    module.to("cuda")
    batches = torch.arange(COUNT).split(10)
    log.clear()
    begun, results = [], []

    noted = Noted(8, 1, (0.0,), (1.0,), note=lambda: begun.append(len(results)))
    given: Any = {"view": noted, "device": "cuda", "precision": precision}
    for ids, rows in encoded(module, images(), batches, **given):
        assert rows.device.type == "cpu"
        results.append(rows)
        torch.testing.assert_close(rows, expected[ids], rtol=1e-4, atol=5e-3 if precision == "bf16" else 1e-5)
    assert begun == [0, 0, 1, 2]
    copies_of_images = sum("copy to GPU" in line for line in log.waits)
    assert waits(log) - copies_of_images <= len(batches)


def test_features_that_stay_on_the_gpu_are_waited_for_by_nobody(log: Log) -> None:
    module, batches = backbone().to("cuda"), torch.arange(COUNT).split(10)
    log.clear()
    rows = [rows for _, rows in encoded(module, images(), batches, view=VIEW, device="cuda", keep=True)]
    assert waits(log) == 0
    assert {each.device.type for each in rows} == {"cuda"}
    log.clear()
    kept = extract(module, images(), view=VIEW, device="cuda", batch_size=10, keep=True)
    assert kept.device.type == "cuda"
    # Whether they are finite.
    assert waits(log) <= 1
    assert torch.equal(kept.cpu(), torch.cat(rows).cpu())
    assert torch.equal(kept.cpu(), extract(module, images(), view=VIEW, device="cuda", batch_size=10))


def test_features_that_do_not_fit_on_the_gpu_are_on_the_cpu(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    module = backbone().to("cuda")
    expected = extract(module, images(), view=VIEW, device="cuda", keep=True)
    monkeypatch.setattr(hardware, "free", lambda gpu: 100)
    found = extract(module, images(), view=VIEW, device="cuda", keep=True)
    assert found.device.type == "cpu"
    assert torch.equal(found, expected.cpu())


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "tf32"), ("bf16", "as before")])
def test_only_the_backbone_multiplies_in_tf32(precision: Any, expected: str) -> None:
    module, before = Products(), torch.backends.cuda.matmul.fp32_precision
    outside: list[str] = []
    noted = Noted(8, 1, note=lambda: outside.append(torch.backends.cuda.matmul.fp32_precision))
    extract(module, images(), view=noted, precision=precision)
    assert module.seen == {"tf32" if expected == "tf32" else before}
    assert {*outside, torch.backends.cuda.matmul.fp32_precision} == {before}


def _part(rank: int, world: int, folder: str, room: int) -> None:
    torch.set_num_threads(1)
    whole = extract(backbone(), images(), view=VIEW, batch_size=3)
    hardware.free = lambda gpu: room
    with pretend_cuda() as log:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=rank, world_size=world)
        for keep in (False, True):
            log.clear()
            module = backbone().to("cuda")
            found = extract(module, images(), view=VIEW, device="cuda", batch_size=3, keep=keep)
            assert found.device.type == ("cuda" if keep and room else "cpu")
            torch.testing.assert_close(found.cpu(), whole)
            rows = [name for name in log.collectives if "gather" in name and name.startswith("nccl")]
            assert bool(rows) == bool(room)
        if rank == 0 and room:
            # The memory of one rank is too small for all features: all of them gather on the CPU.
            hardware.free = lambda gpu: 0
        mixed = extract(module, images(), view=VIEW, device="cuda", batch_size=3, keep=True)
        assert all_gather_object(mixed.device.type) == ["cpu"] * world
        torch.testing.assert_close(mixed, whole)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("room", [80 << 30, 0])
@pytest.mark.parametrize("world", [2, 4])
def test_several_gpus_have_the_features_of_one(world: int, room: int, tmp_path: Path) -> None:
    start(_part, (world, str(tmp_path), room), count=world)
