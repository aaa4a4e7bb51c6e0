import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from manyviews.data import Folder, Images, Loader, Order
from manyviews.data.decoding.files import Files, newly_unreadable
from manyviews.data.pictures import pictures
from manyviews.views import ViewsSettings
from processes import start


def folder(path: Path, count: int = 13) -> Path:
    for index in range(count):
        values = np.random.default_rng(index).integers(0, 256, (12, 15, 3), np.uint8)
        values[0, 0] = index
        Image.fromarray(values).save(path / f"{index}.png")
    return path


def shapes(root: Path) -> Path:
    """Noise of nine shapes."""
    for number in range(9):
        noise = np.random.default_rng(number).integers(0, 256, (20 + 5 * number, 60 - 4 * number, 3), np.uint8)
        Image.fromarray(noise).save(root / f"{number}.png")
    return root


def images(path: Path, memory: float = 0, max_bad: float = 0.5) -> Images:
    return Folder(path=str(path), size=8, memory=memory, max_bad=max_bad).build().train


def take(loader: Loader, steps: int) -> list:
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(steps)]
    iterator.close()
    return batches


def equal(left: list, right: list) -> bool:
    return all(
        a.epoch == b.epoch
        and torch.equal(a.ids, b.ids)
        and a.images.cropped == b.images.cropped
        and all(map(torch.equal, a.images.tensors(), b.images.tensors()))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_from_disk_are_those_from_memory_with_any_number_of_workers(tmp_path, workers):
    folder(tmp_path)
    straight = take(Loader(images(tmp_path, memory=1), Order(13, 4, 1), rank=1, size=2), 7)
    disk = Loader(images(tmp_path), Order(13, 4, 1), rank=1, size=2, workers=workers)
    assert isinstance(disk.images, Files)
    assert equal(take(disk, 7), straight)
    resumed = Loader(images(tmp_path), Order(13, 4, 1), rank=1, size=2, workers=workers, start=4)
    assert equal(take(resumed, 3), straight[4:])


def test_a_smaller_last_batch_reaches_every_rank_from_workers_too(tmp_path):
    folder(tmp_path, 15)
    for rank, lengths in enumerate([[2, 2, 2, 1, 2], [2, 2, 2, 2, 2]]):
        loader = Loader(images(tmp_path), Order(15, 4, 1, smallest=2), rank=rank, size=2, workers=2)
        assert [len(batch.ids) for batch in take(loader, 5)] == lengths


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_later_is_replaced_under_the_others_id(tmp_path, workers, caplog):
    disk, order = images(folder(tmp_path)), Order(13, 13, 0)
    whole = disk.read(torch.arange(13))
    for index in (5, 6):
        (tmp_path / f"{index}.png").write_text("gone")
    batch = take(Loader(disk, order, workers=workers), 1)[0]
    expected = order.batch(0)[1]
    assert batch.ids.tolist() == [7 if index in (5, 6) else index for index in expected.tolist()]
    assert torch.equal(batch.images.squares[0], whole[batch.ids])
    assert sorted(disk.failed) == ["5.png", "6.png"]
    assert "5.png cannot be decoded" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_files_that_break_later_stop_the_run_with_their_names(tmp_path, workers):
    disk = images(folder(tmp_path), max_bad=0.1)
    for index in (5, 6):
        (tmp_path / f"{index}.png").write_text("gone")
    with pytest.raises(ValueError, match=r"2 of 13 images .*\n  [56].png: its content has changed"):
        take(Loader(disk, Order(13, 13, 0), workers=workers), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_vanished_folder_ends_in_an_error_that_names_a_file(tmp_path, workers):
    disk = images(folder(tmp_path), max_bad=0.9)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"\d+\.png.* no such file"):
        take(Loader(disk, Order(13, 13, 0), workers=workers), 1)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_crops_are_the_same_with_any_number_of_workers_and_after_a_resume(tmp_path, workers):
    views = ViewsSettings(size=16, local=2, rotation=10.0).build(size=8, channels=3, seed=2)
    disk, order = images(shapes(tmp_path)), Order(9, 4, 1)
    straight = take(Loader(disk, order, views, rank=1, size=2), 6)
    assert [list(part.shape) for part in straight[0].images.squares] == [[2, 2, 3, 19, 19], [2, 2, 3, 10, 10]]
    assert equal(take(Loader(disk, order, views, rank=1, size=2, workers=workers, start=2), 4), straight[2:])
    for batch in straight:
        both = pictures(disk, batch.ids, views, batch.epoch)
        assert all(map(torch.equal, both.tensors(), batch.images.tensors()))


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_in_the_place_of_a_broken_file_are_those_of_the_image_that_replaces_it(tmp_path, workers):
    views = ViewsSettings(size=16).build(size=8, channels=3, seed=2)
    disk, order = images(shapes(tmp_path)), Order(9, 9, 0)
    expected = pictures(disk, torch.tensor([5]), views, 0)
    (tmp_path / "4.png").write_text("gone")
    batch = take(Loader(disk, order, views, workers=workers), 1)[0]
    (rows,) = (batch.ids == 5).nonzero(as_tuple=True)
    assert len(rows) == 2
    for row in rows:
        assert torch.equal(batch.images.squares[0][:, row], expected.squares[0][:, 0])
        assert batch.images.aspects[row] == expected.aspects[0]


def work(number: int, path: str, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    disk, order = images(Path(path)), Order(13, 12, 0)
    lost = order.batch(0)[1][number * 6 : number * 6 + 2].tolist()
    if number == 1:  # the others still see these files
        disk.states[lost], disk.digests[lost] = 0, 0
    ids = take(Loader(disk, order, rank=number, size=2), 1)[0].ids.tolist()
    told = [name for name, _ in newly_unreadable(disk)]
    Path(path, f"{number}.json").write_text(json.dumps({"ids": ids, "lost": lost, "told": told}))
    assert newly_unreadable(disk) == []
    dist.destroy_process_group()


def test_what_breaks_for_one_process_is_replaced_there_alone_and_told_by_all(tmp_path):
    folder(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start(work, (str(tmp_path), port), count=2)
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    order, broken = Order(13, 12, 0).batch(0)[1].tolist(), second["lost"]

    def replaced(image: int) -> int:
        return replaced((image + 1) % 13) if image in broken else image

    assert first["ids"] == order[:6]
    assert second["ids"] == [replaced(image) for image in order[6:]]
    assert first["told"] == second["told"] == sorted(f"{image}.png" for image in broken)


class Trapped(Files):
    """Images of which the third is never read to its end, or kills who reads the fourth."""

    def decode(self, image: int) -> torch.Tensor:
        if self.names[image] == "3.png":
            time.sleep(60)
        if self.names[image] == "4.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(image)


def trapped(path: Path, name: str) -> Trapped:
    """The images of a folder, of which one is called as if it were the trap."""
    for index in (3, 4):
        (path / f"{index}.png").rename(path / f"x{index}.png")
    (path / "1.png").rename(path / name)
    disk = images(path)
    return Trapped(**{field.name: getattr(disk, field.name) for field in dataclasses.fields(disk)})


@pytest.mark.slow
def test_a_file_that_is_never_read_to_its_end_is_an_error_that_names_it(tmp_path):
    disk = trapped(folder(tmp_path), "3.png")
    with pytest.raises(TimeoutError, match=r"for 8 seconds; being read: .*/3\.png"):
        take(Loader(disk, Order(13, 13, 0), workers=1, timeout=8.0), 1)


def test_a_worker_that_dies_names_its_file(tmp_path):
    disk = trapped(folder(tmp_path), "4.png")
    with pytest.raises(ChildProcessError, match=r"images died \(killed by SIGKILL, .*memory.*; being read: .*/4\.png"):
        take(Loader(disk, Order(13, 13, 0), workers=1), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, workers):
    disk = images(folder(tmp_path))
    (tmp_path / "3.png").unlink()
    os.mkfifo(tmp_path / "3.png")
    take(Loader(disk, Order(13, 13, 0), workers=workers), 1)
    assert disk.failed == {"3.png": "is a pipe and no file"}


def test_a_replaced_file_is_not_learned_from_though_it_is_a_good_picture(tmp_path):
    disk, order = images(folder(tmp_path)), Order(13, 13, 0)
    status = (tmp_path / "5.png").stat()
    (tmp_path / "5.png").write_bytes((tmp_path / "9.png").read_bytes())
    os.utime(tmp_path / "5.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    batch = take(Loader(disk, order), 1)[0]
    assert 5 not in batch.ids.tolist()
    assert "has changed since the start of the run" in disk.failed["5.png"]
    assert newly_unreadable(disk) == list(disk.failed.items())
    assert newly_unreadable(disk) == []


@pytest.mark.parametrize("place", ["in/5.png", "in"])
def test_a_link_that_takes_the_place_of_a_file_or_its_folder_is_not_followed(tmp_path, place):
    for name in ("in", "other"):
        (tmp_path / "root" / name).mkdir(parents=True)
        folder(tmp_path / "root" / name, 6)
    for allowed in (False, True):
        disk = Folder(path=str(tmp_path / "root"), size=8, memory=0, max_bad=0.9, follow_links=allowed).build().train
        moved = (tmp_path / "root" / place).rename(tmp_path / "elsewhere")
        (tmp_path / "root" / place).symlink_to(moved)
        disk.read(torch.arange(6))
        reasons = set(disk.failed.values())
        assert reasons == (set() if allowed else {"is a symbolic link, or lies behind one"})
        (tmp_path / "root" / place).unlink()
        moved.rename(tmp_path / "root" / place)


def test_no_thread_or_process_outlives_the_iterator(tmp_path):
    disk = images(folder(tmp_path))
    before = threading.active_count()
    iterator = iter(Loader(disk, Order(13, 4, 0), workers=2))
    next(iterator)
    children = torch.multiprocessing.active_children()
    assert len(children) == 2
    iterator.close()
    assert not any(child.is_alive() for child in children)
    # The threads that feed the queues end on their own, a moment later.
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.slow
def test_a_program_that_leaves_in_the_middle_leaves_quietly(tmp_path):
    program = tmp_path / "program.py"
    (tmp_path / "images").mkdir()
    program.write_text(
        "from manyviews.data import Folder, Loader, Order\n"
        "if __name__ == '__main__':\n"
        f"    images = Folder(path={str(folder(tmp_path / 'images'))!r}, size=8, memory=0).build(workers=2).train\n"
        "    for step, batch in enumerate(Loader(images, Order(len(images), 4, 0), workers=2)):\n"
        "        if step == 5:\n"
        "            break\n"
        "    print(step, len(batch.ids))\n"
    )
    command = [sys.executable, "-W", "error::ResourceWarning", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5 4\n", "")
