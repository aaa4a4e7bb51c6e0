"""What images are known by: their content, which is read once, by one process, and again when a file was touched."""

import os
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from manyviews.data import STL10, Folder, Images
from manyviews.data.decoding.files import Files, State, digest, open_image
from manyviews.data.listing import digests as cache
from manyviews.data.listing import one_rank
from manyviews.data.listing.digests import DigestCache
from processes import start

SIDE = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    home = tmp_path_factory.mktemp("torch")
    monkeypatch.setenv("TORCH_HOME", str(home))
    return home / "manyviews/digests"


@pytest.fixture
def eager(monkeypatch):
    """Digests are kept of few files, too, and at once."""
    for name, value in (("WORTH_FILES", 1), ("SETTLED", -(10**15))):
        monkeypatch.setattr(cache, name, value)


def write(file: Path, seed: int) -> Path:
    """A picture that takes as many bytes as any other."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file)
    return file


def folder(root: Path) -> Path:
    for number, name in enumerate(("a/1.bmp", "a/2.bmp", "b/1.bmp", "b/2.bmp")):
        write(root / name, number)
    return root


def read(root: Path, memory: float = 0.0, **settings) -> Images:
    return Folder(path=str(root), size=SIDE, memory=memory, holdout=0, **settings).build().train


def as_before(file: Path, status: os.stat_result) -> None:
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_other_content_of_the_same_size_and_time_is_another_fingerprint(tmp_path, memory, eager):
    before = read(folder(tmp_path), memory)
    file = tmp_path / "b/1.bmp"
    status = file.stat()
    # In place, with its inode.
    write(file, 9)
    as_before(file, status)
    after = file.stat()
    assert all(getattr(after, of) == getattr(status, of) for of in ("st_size", "st_mtime_ns", "st_ino"))
    assert read(tmp_path, memory).fingerprint != before.fingerprint


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_images_that_change_names_with_each_other_have_another_fingerprint(tmp_path, memory, eager):
    before = read(folder(tmp_path), memory).fingerprint
    for old, new in (("1", "x"), ("2", "1"), ("x", "2")):
        (tmp_path / f"a/{old}.bmp").rename(tmp_path / f"a/{new}.bmp")
    assert read(tmp_path, memory).fingerprint != before


def test_a_copy_elsewhere_with_other_times_has_the_same_fingerprint(tmp_path, eager):
    before = read(folder(tmp_path / "one")).fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    os.utime(tmp_path / "two/a/1.bmp", (1, 1))
    (tmp_path / "one").rename(tmp_path / "moved")
    marks = [{read(tmp_path / name, memory).fingerprint for name in ("two", "moved")} for memory in (0.0, 1.0)]
    assert marks[0] == {before}
    assert len(marks[1]) == 1


def test_the_fingerprint_sees_names_labels_and_the_stored_form(tmp_path):
    folder(tmp_path)
    table = tmp_path / "labels.csv"
    marks = [read(tmp_path).fingerprint, read(tmp_path, labels="none").fingerprint]
    marks.append(read(tmp_path, channels=1).fingerprint)
    for labels in ("xyxy", "xyyx"):
        names = ("a/1.bmp", "a/2.bmp", "b/1.bmp", "b/2.bmp")
        table.write_text("name,label\n" + "".join(f"{a},{b}\n" for a, b in zip(names, labels, strict=True)))
        marks.append(read(tmp_path, labels=str(table)).fingerprint)
    (tmp_path / "a/1.bmp").rename(tmp_path / "a/3.bmp")
    marks.append(read(tmp_path).fingerprint)
    write(tmp_path / "a/4.bmp", 5)
    marks.append(read(tmp_path).fingerprint)
    assert len(set(marks)) == len(marks)


def test_what_a_followed_link_leads_to_counts(tmp_path, eager):
    root = folder(tmp_path / "data")
    for number in (1, 2):
        write(tmp_path / f"{number}.bmp", 10 + number)
    (root / "a/link.bmp").symlink_to(tmp_path / "1.bmp")
    before = read(root, follow_links=True).fingerprint
    (root / "a/link.bmp").unlink()
    (root / "a/link.bmp").symlink_to(tmp_path / "2.bmp")
    assert read(root, follow_links=True).fingerprint != before


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The files that are read to be known."""
    names: list[str] = []

    def noted(file):
        names.append(
            os.readlink(f"/proc/self/fd/{file.fileno()}").rsplit("/", 2)[-2] + "/" + Path(file_name(file)).name
        )
        return digest(file)

    monkeypatch.setattr(cache, "digest", noted)
    return names


def file_name(file) -> str:
    return os.readlink(f"/proc/self/fd/{file.fileno()}")


def test_a_second_start_reads_only_what_was_touched(tmp_path, eager, hashed):
    before = read(folder(tmp_path)).fingerprint
    assert sorted(hashed) == ["a/1.bmp", "a/2.bmp", "b/1.bmp", "b/2.bmp"]
    hashed.clear()
    assert read(tmp_path).fingerprint == before
    assert hashed == []
    status = (tmp_path / "b/2.bmp").stat()
    write(tmp_path / "b/2.bmp", 77)
    as_before(tmp_path / "b/2.bmp", status)
    assert read(tmp_path).fingerprint != before
    assert hashed == ["b/2.bmp"]
    hashed.clear()
    read(tmp_path)
    assert hashed == []


def test_what_changed_just_before_it_was_read_is_read_again(tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(cache, "WORTH_FILES", 1)
    read(folder(tmp_path))
    read(tmp_path)
    assert len(hashed) == 8


def test_few_small_files_leave_no_cache_behind(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", -(10**15))
    read(folder(tmp_path))
    assert not own_cache.exists()


@pytest.mark.parametrize("harm", ["cut", "rubbish", "flipped", "other shapes", "folder"])
def test_a_damaged_cache_is_not_believed(tmp_path, eager, hashed, own_cache, harm):
    before = read(folder(tmp_path)).fingerprint
    (table,) = own_cache.glob("*.npz")
    whole = table.read_bytes()
    middle = len(whole) // 2
    if harm == "folder":
        table.unlink()
        table.mkdir()
    elif harm == "other shapes":
        np.savez(table, states=np.zeros((4, 5), np.int64), digests=np.zeros((3, 16), np.uint8))
    else:
        table.write_bytes(
            {"cut": whole[:-9], "rubbish": b"PK", "flipped": whole[:middle] + b"!" + whole[middle + 1 :]}[harm]
        )
    hashed.clear()
    assert read(tmp_path).fingerprint == before
    # A byte that no digest depends on may have been hit.
    assert len(hashed) in ((0, 4) if harm == "flipped" else (4,))


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, eager, own_cache):
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file")
    assert read(folder(tmp_path)).fingerprint == read(tmp_path).fingerprint


def states_of(*files: Path) -> np.ndarray:
    states = []
    for file in files:
        opened, state = open_image(file.parent, file.name, follow_links=True)
        opened.close()
        states.append(state)
    return np.array(states, np.int64)


def test_several_processes_lose_nothing_of_each_other(tmp_path, eager, own_cache):
    files = [write(tmp_path / f"{number}.bmp", number) for number in range(40)]
    states = states_of(*files)
    digests = np.random.default_rng(0).integers(0, 256, (40, 16), np.uint8)
    with ThreadPoolExecutor(8) as pool:
        for part in range(8):
            pool.submit(DigestCache(tmp_path).keep, states[part::8], digests[part::8], time.time_ns())
    found, known = DigestCache(tmp_path).look_up(states)
    assert known.all()
    assert (found == digests).all()
    assert not list(own_cache.glob("*.partial"))


def test_a_file_on_another_device_with_the_same_inode_is_another(tmp_path, eager):
    states = np.array([[7, 1, 1, 100, 1], [7, 1, 1, 100, 2], [7, 1, 1, -(2**63), 2**63 - 1]], np.int64)
    digests = np.arange(48, dtype=np.uint8).reshape(3, 16)
    DigestCache(tmp_path).keep(states, digests, time.time_ns())
    found, known = DigestCache(tmp_path).look_up(states)
    assert known.all()
    assert (found == digests).all()
    for field in range(len(State._fields)):
        assert not DigestCache(tmp_path).look_up(states[:1] + 3 * np.eye(5, dtype=np.int64)[field])[1].any()


def test_the_cache_stays_small(tmp_path, eager, own_cache, monkeypatch):
    monkeypatch.setattr(cache, "MOST_ROWS", 3)
    states = np.arange(50, dtype=np.int64).reshape(10, 5)
    for name in ("first", "second", "third"):
        DigestCache(tmp_path / name).keep(states, np.zeros((10, 16), np.uint8), time.time_ns())
        assert DigestCache(tmp_path / name).look_up(states)[1].tolist() == [False] * 7 + [True] * 3
    table = max(own_cache.glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
    monkeypatch.setattr(cache, "MOST_BYTES", table.stat().st_size)
    DigestCache(tmp_path / "third").keep(states, np.zeros((10, 16), np.uint8), time.time_ns())
    assert list(own_cache.glob("*.npz")) == [table]


def test_a_file_that_was_touched_or_copied_anew_is_still_the_same_image(tmp_path):
    images = read(folder(tmp_path))
    before = images.read(torch.arange(4))
    os.utime(tmp_path / "a/1.bmp", (5, 5))
    shutil.copy(tmp_path / "a/2.bmp", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "a/2.bmp")
    os.link(tmp_path / "b/1.bmp", tmp_path / "hard.bmp")
    assert torch.equal(images.read(torch.arange(4)), before)
    assert isinstance(images, Files)
    assert images.failed == {}


def test_a_file_that_was_replaced_with_its_size_and_time_is_not_learned_from(tmp_path):
    images = read(folder(tmp_path), max_bad=0.5)
    status = (tmp_path / "a/1.bmp").stat()
    write(tmp_path / "a/1.bmp", 50)
    as_before(tmp_path / "a/1.bmp", status)
    assert isinstance(images, Files)
    assert bool((images.read(torch.tensor([0])) == 127).all())
    assert "has changed since the start of the run" in images.failed["a/1.bmp"]


def stl10(root: Path, value: int) -> str:
    place = root / "stl10_binary"
    place.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 3), ("unlabeled", 2), ("test", 2)):
        (place / f"{split}_X.bin").write_bytes(bytes([value]) * count * 96 * 96 * 3)
        (place / f"{split}_y.bin").write_bytes(b"\1" * count)
    (place / "class_names.txt").write_text("\n".join("abcdefghij"))
    return STL10(path=str(root)).build().train.fingerprint


def test_the_pixels_of_stl10_count(tmp_path):
    assert stl10(tmp_path, 1) == stl10(tmp_path / "copy", 1) != stl10(tmp_path, 2)


def together(number: int, port: int, roots: list[str], out: str, memory: float, compared: int) -> None:
    """Reads a folder as one of two processes; writes down the files that were opened, and what came of it."""
    os.environ["TORCH_HOME"] = out
    one_rank.COMPARED = compared
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(Path(str(args[0])).name) if event == "open" else None)
    try:
        images = Folder(path=roots[number], size=SIDE, memory=memory, holdout=0, max_bad=0.5).build().train
        at_start = sorted(name for name in opened if name.endswith(".bmp"))
        pixels = images.read(torch.arange(len(images))).flatten().tolist()
        result = f"{images.fingerprint} {' '.join(images.names)} {type(images).__name__} {hash(tuple(pixels))}"
    except ValueError as problem:
        at_start, result = [], str(problem)
    Path(out, f"{number}.txt").write_text(f"{' '.join(at_start)}\n{result}")
    dist.destroy_process_group()


def by_two(tmp_path: Path, roots: list[Path], memory: float = 0.0, compared: int = 64) -> list[list[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start(together, (port, [str(root) for root in roots], str(tmp_path), memory, compared), count=2)
    return [(tmp_path / f"{number}.txt").read_text().split("\n") for number in range(2)]


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_of_two_processes_one_opens_the_files_and_both_know_them(tmp_path, memory):
    root = tmp_path / "data"
    for number in range(40):
        write(root / f"{number}.bmp", number)
    (root / "4.bmp").write_bytes(b"no image")
    names = {f"{number}.bmp" for number in range(40)}
    (first, result), (second, other) = by_two(tmp_path, [root, root], memory, compared=3)
    alone = read(root, memory, max_bad=0.5)
    pixels = hash(tuple(alone.read(torch.arange(39)).flatten().tolist()))
    assert result == other == f"{alone.fingerprint} {' '.join(alone.names)} {type(alone).__name__} {pixels}"
    assert set(first.split()) == names
    # To compare them: the first one, the last one, and one between.
    assert second.split() == ["0.bmp", "20.bmp", "39.bmp"]


@pytest.mark.parametrize(("memory", "harm"), [(1.0, "content"), (0.0, "size"), (0.0, "name")])
def test_processes_that_see_other_images_are_refused_on_all(tmp_path, memory, harm):
    roots = [tmp_path / "first", tmp_path / "second"]
    for root in roots:
        folder(root)
    if harm == "content":
        write(roots[1] / "a/1.bmp", 99)
    elif harm == "size":
        (roots[1] / "a/1.bmp").write_bytes((roots[1] / "a/1.bmp").read_bytes() + b"more")
    else:
        (roots[1] / "a/1.bmp").rename(roots[1] / "a/3.bmp")
    for _, result in by_two(tmp_path, roots, memory):
        assert "is not the same for all processes: process 1" in result
