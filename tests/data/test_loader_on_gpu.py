"""What a GPU is fed with: small sets live there, other batches are copied ahead; all are those of the CPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from manyviews.data import Folder, Loader, Order, Sample, loader
from manyviews.data.decoding.files import Files
from manyviews.features.encoding import encoded
from manyviews.system import distributed, hardware
from manyviews.system.launch import start
from manyviews.views import StandardView, ViewsSettings
from pretend_cuda import LOG, PretendTensor, pretend_cuda
from processes import launched

GPU = torch.device("cuda", 0)


@pytest.fixture
def unpinned(monkeypatch):
    """Memory is not pinned, which takes a driver; other threads than that of the test see no pretend GPU."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)


def folder(path: Path, count: int = 13) -> Folder:
    for index in range(count):
        values = np.random.default_rng(index).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(values).save(path / f"{index:02d}.png")
    return Folder(path=str(path), size=8, memory=0)


def take(batches: Loader, steps: int) -> list:
    iterator = iter(batches)
    taken = [next(iterator) for _ in range(steps)]
    iterator.close()
    return taken


def check_equal(on_gpu: list, on_cpu: list) -> None:
    for given, expected in zip(on_gpu, on_cpu, strict=True):
        (pixels,) = given.images.squares
        assert isinstance(pixels, PretendTensor)
        assert isinstance(given.ids, PretendTensor)
        assert given.epoch == expected.epoch
        assert torch.equal(given.ids.numbers, expected.ids)
        assert torch.equal(pixels.numbers, expected.images.squares[0])


def test_a_small_set_lives_on_the_gpu_and_a_step_copies_its_ids_alone():
    images, order = Sample().build().train, Order(10_000, 64, 3)
    expected = take(Loader(images, order, start=150, rank=1, size=2), 9)
    with pretend_cuda():
        iterator = iter(Loader(images, order, start=150, rank=1, size=2, device=GPU))
        batches = [next(iterator)]
        LOG.clear()
        batches += [next(iterator) for _ in range(8)]
        # For each: the copy of the ids, and the images at them.
        assert LOG.launches.total() == 16
        assert LOG.waits.total() == 0
        iterator.close()
    check_equal(batches, expected)


def test_a_set_beyond_a_quarter_of_the_free_memory_stays_in_that_of_the_host(monkeypatch):
    images, order = Sample().build().train, Order(10_000, 64, 3)
    taken = images.pixels.numel()
    for free, resident in ((4 * taken, True), (4 * taken - 1, False)):
        with pretend_cuda():
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
            batches = iter(Loader(images, order, device=GPU))
            first = next(batches)
            LOG.clear()
            following = [next(batches) for _ in range(3)]
            # The images are indexed, or copied with the ids.
            assert LOG.launches.total() == 6
            assert LOG.waits.total() == 0
            assert {line.split()[0].split(":")[0] for line in LOG.launches} <= {"data/loader.py", "data/images.py"}
            assert ("pixels" in batches.gi_frame.f_locals) == resident
        check_equal([first, *following], take(Loader(images, order), 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_files_are_copied_two_ahead_without_a_wait(tmp_path, unpinned, workers):
    images, order = folder(tmp_path).build().train, Order(13, 4, 1)
    assert isinstance(images, Files)
    expected = take(Loader(images, order, workers=workers), 5)
    with pretend_cuda():
        batches = iter(Loader(images, order, workers=workers, device=GPU))
        taken = [next(batches)]
        assert LOG.launches.total() == 2 * (1 + loader.COPIED)
        taken += [next(batches) for _ in range(4)]
        assert LOG.waits.total() == 0
        batches.close()
    check_equal(taken, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_and_aspects_are_copied_ahead_and_viewed_without_a_wait(tmp_path, unpinned, workers):
    for index in range(9):
        values = np.random.default_rng(index).integers(0, 256, (12 + index, 20, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / f"{index:02d}.png")
    images, order = Folder(path=str(tmp_path), size=8, memory=0).build().train, Order(9, 4, 1)
    views = ViewsSettings(size=16, local=2, rotation=20.0).build(size=8, channels=3, seed=1)
    expected = take(Loader(images, order, views, workers=workers), 3)
    seen = [views(batch.images, batch.ids, batch.epoch) for batch in expected]
    with pretend_cuda():
        batches = iter(Loader(images, order, views, workers=workers, device=GPU))
        views(*next(batches))
        LOG.clear()
        taken = [views(*next(batches)) for _ in range(2)]
        assert LOG.waits.total() == 0, LOG
        batches.close()
    for made, groups in zip(taken, seen[1:], strict=True):
        for one, other in zip(made, groups, strict=True):
            torch.testing.assert_close(one.numbers, other, rtol=0, atol=1e-5)


def test_each_batch_waits_for_its_copy_and_keeps_its_memory_until_it_was_used(monkeypatch):
    events: list[str] = []
    images = Sample().build().train

    class Stream:
        def __init__(self, *args: object) -> None: ...

        def record_event(self) -> str:
            events.append("copied")
            return f"copy {events.count('copied') - 1}"

        def wait_event(self, event: str) -> None:
            events.append(f"wait for {event}")

    with pretend_cuda():
        user = Stream()
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: user)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
        kept: list[tuple] = []
        monkeypatch.setattr(PretendTensor, "record_stream", lambda tensor, stream: kept.append((tensor, stream)))
        batches = iter(Loader(images, Order(10_000, 64, 3), device=GPU))
        first, second = next(batches), next(batches)
        assert events == ["copied"] * 3 + ["wait for copy 0", "copied", "wait for copy 1"]
        assert [tensor for tensor, stream in kept] == [
            *first.images.squares,
            first.ids,
            *second.images.squares,
            second.ids,
        ]
        assert {stream for _, stream in kept} == {user}


def test_features_are_those_of_the_cpu_and_batches_for_them_are_copied_ahead(tmp_path):
    images = folder(tmp_path).build().train
    ids = torch.arange(13).split(3)

    view, means = StandardView(8, 3), torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    expected = [rows for _, rows in encoded(means, images, ids, view=view, workers=0)]
    for workers in (0, 2):
        with pretend_cuda():
            rows = encoded(means, images, ids, view=view, device=GPU, workers=workers)
            on_gpu = [(batch, torch.as_tensor(values)) for batch, values in rows]
            assert not [line for line in LOG.waits if "to GPU" in line]
        assert torch.equal(torch.cat([batch for batch, _ in on_gpu]), torch.arange(13))
        assert torch.allclose(
            torch.cat([getattr(values, "numbers", values) for _, values in on_gpu]), torch.cat(expected)
        )


@pytest.mark.parametrize(
    ("cores", "quota", "processes", "expected"),
    [(16, "max 100000", 1, 15), (16, "max 100000", 4, 3), (2, "max 100000", 1, 1), (1, "max 100000", 8, 1),
     (256, "max 100000", 1, 32), (64, "800000 100000", 2, 3), (64, None, 4, 15)],
)  # fmt: skip
def test_workers_follow_from_the_cores_the_quota_and_the_processes(monkeypatch, cores, quota, processes, expected):
    def read_text(path: Path) -> str:
        assert str(path) == "/sys/fs/cgroup/cpu.max"
        if quota is None:
            raise FileNotFoundError(path)
        return quota

    monkeypatch.setattr(hardware, "cores", lambda: cores)
    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert hardware.decoders(None) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.decoders(None) == expected
    assert [hardware.decoders(asked) for asked in (0, 2, 64)] == [0, 2, 64]


def test_batches_that_are_prefetched_are_bounded_by_their_bytes(tmp_path, monkeypatch):
    images, requested = folder(tmp_path).build().train, []
    monkeypatch.setattr(loader.Worker, "request", lambda worker, request: requested.append(request))
    monkeypatch.setattr(loader.Worker, "get", lambda worker, timeout: (_ for _ in ()).throw(ValueError("enough")))
    for most, expected in ((1 << 32, 4), (3 * 4 * 3 * 64, 3), (1, 2)):
        monkeypatch.setattr(loader, "MOST_PREFETCHED", most)
        requested.clear()
        with pytest.raises(ValueError, match="enough"):
            next(iter(Loader(images, Order(13, 4, 1), workers=2)))
        assert len(requested) == expected


def work(data: str, out: str) -> None:
    """Trains a rank's share of two steps from files, from memory and from a cache; writes what it was fed with."""
    with pretend_cuda(2) as log:
        dist.init_process_group("cpu:gloo,cuda:nccl")
        accelerator = start(8, "fp32", 1)
        device, rank, size = accelerator.device, distributed.rank(), distributed.world_size()
        fed = []
        for words in ({"memory": 0}, {"memory": 1}, {"memory": 0, "cache": f"{out}/kept"}):
            images = Folder(path=data, size=8, **words).build(workers=None).train
            batches = iter(Loader(images, Order(13, 8, 1), rank=rank, size=size, workers=0, device=device))
            log.clear()
            for _ in range(2):
                batch = next(batches)
                (pixels,) = batch.images.squares
                assert pixels.device == batch.ids.device == device
                fed.append((batch.ids.numbers.tolist(), pixels.numbers.flatten().tolist()))
            # Images in memory are copied to the GPU once.
            assert log.waits.total() == (words["memory"] == 1), log
            batches.close()
        Path(out, f"{rank}.json").write_text(json.dumps(fed))


def test_two_processes_with_a_gpu_each_are_fed_with_the_batches_of_the_cpu(tmp_path):
    folder(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    launched(work, str(tmp_path), str(out))
    images, order = Folder(path=str(tmp_path), size=8, memory=1).build().train, Order(13, 8, 1)
    for rank in range(2):
        expected = [
            [batch.ids.tolist(), batch.images.squares[0].flatten().tolist()]
            for batch in take(Loader(images, order, rank=rank, size=2), 2)
        ]
        assert json.loads((out / f"{rank}.json").read_text()) == expected * 3
