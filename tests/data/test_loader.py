import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.data import Folder, Loader, Order
from contrastive.data.files import Files


def folder(path: Path, count: int = 13) -> Path:
    for index in range(count):
        values = np.random.default_rng(index).integers(0, 256, (12, 15, 3), np.uint8)
        values[0, 0] = index
        Image.fromarray(values).save(path / f"{index}.png")
    return path


def images(path: Path, memory: float = 0, max_bad: float = 0.5):
    return Folder(path=str(path), size=8, memory=memory, max_bad=max_bad).build().train


def take(loader: Loader, steps: int) -> list:
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(steps)]
    iterator.close()
    return batches


def equal(left: list, right: list) -> bool:
    return all(
        a.epoch == b.epoch and torch.equal(a.ids, b.ids) and torch.equal(a.images, b.images)
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
    assert torch.equal(batch.images, whole[batch.ids])
    assert sorted(disk.failed) == ["5.png", "6.png"]
    assert "5.png cannot be decoded" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_files_that_break_later_stop_the_run_with_their_names(tmp_path, workers):
    disk = images(folder(tmp_path), max_bad=0.1)
    for index in (5, 6):
        (tmp_path / f"{index}.png").write_text("gone")
    with pytest.raises(ValueError, match=r"2 of 13 images .*\n  [56].png: not an image"):
        take(Loader(disk, Order(13, 13, 0), workers=workers), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_vanished_folder_ends_in_an_error_that_names_a_file(tmp_path, workers):
    disk = images(folder(tmp_path), max_bad=0.9)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"\d+\.png.* no such file"):
        take(Loader(disk, Order(13, 13, 0), workers=workers), 1)


def test_a_file_that_never_ends_is_an_error_that_names_it(tmp_path):
    disk = images(folder(tmp_path))
    take(Loader(disk, Order(13, 13, 0), workers=1), 1)  # so that starting up is not what takes long
    (tmp_path / "3.png").unlink()
    os.mkfifo(tmp_path / "3.png")
    with pytest.raises(TimeoutError, match=r"for 4 seconds; being read: .*/3\.png"):
        take(Loader(disk, Order(13, 13, 0), workers=1, timeout=4.0), 1)


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


def test_a_program_that_leaves_in_the_middle_leaves_quietly(tmp_path):
    program = tmp_path / "program.py"
    (tmp_path / "images").mkdir()
    program.write_text(
        "from contrastive.data import Folder, Loader, Order\n"
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
