import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyviews.data import Folder, InMemory, shorthand
from manyviews.data.decoding.decode import UnreadableImageError
from manyviews.data.decoding.files import Files, in_threads, listed
from manyviews.system.launch import Interrupted, Stop


def picture(path: Path, value: int = 0, side: int = 8, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(path, **options)
    return path


def build(path: Path, workers: int = 2, **settings):
    return Folder(path=str(path), size=8, **settings).build(workers=workers)


def messy(root: Path) -> Path:
    picture(root / "10.png", 10)
    picture(root / "2.PNG", 20, side=20)
    picture(root / "deep/er/3.tif", 30)
    picture(root / "no_ending", 40, format="PNG")
    picture(root / "wrong.jpg", 50, format="PNG")
    picture(root / "grün/ß 1.webp", 60, lossless=True)
    picture(root / ".hidden/x.png")
    picture(root / "__MACOSX/x.png")
    (root / "._10.png").write_bytes(b"\0\5\26\7")
    for name in (".DS_Store", "notes.txt", "labels.csv", "film.mp4", "README", "deep/Thumbs.db"):
        (root / name).write_bytes(b"no image")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    return root


MESSY = ["2.PNG", "10.png", "deep/er/3.tif", "grün/ß 1.webp", "no_ending", "wrong.jpg"]


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_images_are_found_at_any_depth_among_other_files(tmp_path, memory):
    split = build(messy(tmp_path), memory=memory)
    assert list(split.train.names) == MESSY
    assert split.train.labels is None
    assert split.train.classes == ()
    assert split.test is None
    assert split.unreadable == ()
    assert split.train.read(torch.arange(6))[:, 1, 3, 3].tolist() == [20, 10, 30, 60, 40, 50]


def test_ids_do_not_depend_on_the_order_in_which_the_file_system_lists(tmp_path, monkeypatch):
    messy(tmp_path)
    scandir = os.scandir
    first = build(tmp_path).train

    class Backwards(list):
        def close(self) -> None: ...

    def backwards(path):
        with scandir(path) as entries:
            return Backwards(sorted(entries, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr("os.scandir", backwards)
    second = build(tmp_path).train
    assert list(second.names) == list(first.names) == MESSY
    assert second.fingerprint == first.fingerprint


def test_on_disk_and_in_memory_are_the_same_images(tmp_path):
    messy(tmp_path)
    memory, disk = build(tmp_path).train, build(tmp_path, memory=0).train
    assert isinstance(memory, InMemory)
    assert isinstance(disk, Files)
    ids = torch.tensor([4, 0, 4, 2])
    assert torch.equal(memory.read(ids), disk.read(ids))
    # What is learned from differs: whole images in memory, crops of the files.
    assert (disk.whole, memory.fingerprint == disk.fingerprint) == (False, False)
    assert (memory.size, memory.channels, len(memory)) == (disk.size, disk.channels, len(disk)) == (8, 3, 6)


def broken(root: Path) -> Path:
    for index in range(18):
        picture(root / f"{index}.png", index)
    (root / "4.png").write_bytes((root / "4.png").read_bytes()[:-30])
    (root / "7.png").write_text("no image")
    return root


@pytest.mark.parametrize("workers", [0, 3])
def test_broken_files_are_left_out_and_listed(tmp_path, workers):
    split = build(broken(tmp_path), workers, max_bad=0.2)
    assert [name for name, _ in split.unreadable] == ["4.png", "7.png"]
    assert "not an image" in split.unreadable[1][1]
    assert list(split.train.names) == [f"{index}.png" for index in range(18) if index not in (4, 7)]
    values = split.train.read(torch.arange(16))[:, 0, 0, 0].tolist()
    assert values == [index for index in range(18) if index not in (4, 7)]
    assert split.train.fingerprint == build(tmp_path, max_bad=0.5).train.fingerprint


def test_what_the_header_tells_is_found_without_decoding(tmp_path, monkeypatch):
    broken(tmp_path)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert [name for name, _ in build(tmp_path, memory=0, max_bad=0.2).unreadable] == ["7.png"]


def test_too_many_broken_files_stop_with_the_list_the_bound_and_the_way_out(tmp_path):
    with pytest.raises(
        ValueError, match=r"(?s)2 of 18 images .* data.max_bad=0.1 allows:\n  4.png: .*\n  7.png: .*data.max_bad$"
    ):
        build(broken(tmp_path), max_bad=0.1)


def test_nothing_but_broken_files_is_an_error_under_any_bound(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="1 of 1 image in"):
        build(tmp_path, max_bad=0.99)


def test_a_file_that_breaks_later_is_grey_listed_and_warned_of_and_too_many_stop(tmp_path, caplog):
    for index in range(10):
        picture(tmp_path / f"{index}.png", index)
    images = build(tmp_path, memory=0, max_bad=0.1).train
    (tmp_path / "3.png").write_text("gone")
    for _ in range(2):
        assert images.read(torch.tensor([2, 3, 4]))[:, 0, 0, 0].tolist() == [2, 127, 4]
    assert list(images.failed) == ["3.png"]
    assert caplog.text.count("3.png cannot be decoded") == 1
    (tmp_path / "4.png").write_text("gone")
    with pytest.raises(ValueError, match="2 of 10"):
        images.read(torch.tensor([4]))


def classes(root: Path, **counts: int) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            picture(root / name / "nested" / f"{index}.png", 10 * number + index)
    return root


def test_class_folders_give_contiguous_labels_and_empty_ones_are_tolerated(tmp_path):
    classes(tmp_path, zebra=3, ape=4)
    (tmp_path / "moth").mkdir()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/readme.txt").touch()
    split = build(tmp_path, holdout=0)
    assert split.train.classes == ("ape", "zebra")
    assert split.train.labels.tolist() == [0] * 4 + [1] * 3
    assert split.test is None


def test_one_folder_alone_gives_no_labels(tmp_path):
    assert build(classes(tmp_path, ape=3)).train.labels is None


def test_a_share_of_each_class_is_held_out_the_same_whatever_is_added(tmp_path):
    classes(tmp_path, ape=20, bee=10, one=1, two=2)
    split = build(tmp_path, holdout=0.1)
    assert split.test.labels.bincount().tolist() == [2, 1, 0, 1]
    assert split.train.labels.bincount().tolist() == [18, 9, 1, 1]
    assert not set(split.train.names) & set(split.test.names)
    assert split.test.classes == split.train.classes
    assert list(build(tmp_path).test.names) == list(split.test.names)
    assert list(build(tmp_path, holdout_seed=1).test.names) != list(split.test.names)
    classes(tmp_path / "cat", more=3)
    assert set(split.test.names) <= set(build(tmp_path).test.names)


def test_links_are_passed_over_unless_allowed_and_loops_end(tmp_path, caplog):
    root = tmp_path / "root"
    picture(root / "in/1.png")
    picture(tmp_path / "outside/2.png", 9)
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "file.png").symlink_to(tmp_path / "outside/2.png")
    (root / "in/loop").symlink_to(root)
    (root / "broken.png").symlink_to("nowhere.png")
    assert list(build(root).train.names) == ["in/1.png"]
    assert "4 symbolic links were passed over" in caplog.text
    assert list(build(root, follow_links=True).train.names) == ["file.png", "in/1.png", "out/2.png"]


def test_links_in_a_circle_end_as_links_that_were_passed_over(tmp_path, caplog):
    picture(tmp_path / "1.png")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "round.png").symlink_to("about.png")
    (tmp_path / "about.png").symlink_to("round.png")
    assert list(build(tmp_path, follow_links=True).train.names) == ["1.png"]


HOSTILE = (
    "line\nbreak.png",
    "\x1b[31mred.png",
    "'\"quotes`.png",
    "\udcff\udcfe.png",
    "\u202egnp.exe.png",
    "<b>$(x).png",
)


def test_names_of_any_kind_are_read_and_shown_as_one_line_that_no_terminal_obeys(tmp_path, caplog):
    for number, name in enumerate(HOSTILE):
        picture(tmp_path / name, number)
    images = build(tmp_path, memory=0, max_bad=0.9).train
    assert set(images.names) == set(HOSTILE)
    for name in HOSTILE:
        (tmp_path / name).write_text("gone")
    with pytest.raises(ValueError, match="6 of 6") as refused:
        images.read(torch.arange(6))
    for said in (str(refused.value), caplog.text, listed(images.failed.items())):
        assert said.isascii() or "\u202e" not in said
        assert not any(letter in said for letter in "\x1b\udcff\u202e")
        assert r"line\nbreak.png" in said
    assert len(listed(images.failed.items()).splitlines()) == 6


def test_a_folder_that_vanishes_while_it_is_listed_is_a_sentence(tmp_path, monkeypatch):
    picture(tmp_path / "in/1.png")
    scandir = os.scandir

    def vanish(path):
        if str(path).rstrip("/").endswith("in"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", vanish)
    with pytest.raises(ValueError, match="in cannot be listed: no such file"):
        build(tmp_path)


def test_a_folder_of_links_alone_says_how_to_follow_them(tmp_path):
    picture(tmp_path / "outside/2.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/2.png").symlink_to(tmp_path / "outside/2.png")
    with pytest.raises(ValueError, match=r"holds no images .*follow_links=true"):
        build(tmp_path / "root")


def test_a_wrong_path_says_how_far_it_leads_and_what_is_alike(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=rf"photo/summer does not exist; {tmp_path} does, and holds photos"):
        build(tmp_path / "photo/summer")
    with pytest.raises(ValueError, match="holds no images"):
        build(tmp_path / "photos")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        build(picture(tmp_path / "photos/1.png"))


def test_a_forbidden_folder_says_so(tmp_path, monkeypatch):
    def forbid(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", forbid)
    with pytest.raises(ValueError, match="may not be read: permission denied"):
        build(tmp_path)


def test_the_background_shows_through(tmp_path):
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "a.png")
    assert build(tmp_path).train.pixels.unique().tolist() == [255]
    assert build(tmp_path, background="grey").train.pixels.unique().tolist() == [128]
    assert build(tmp_path, background=(1, 2, 3)).train.pixels[0, :, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="background"):
        Folder(path=str(tmp_path), background=(1, 2, 256))


def test_a_relative_path_does_not_depend_on_where_the_run_is_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Folder(path="photos").path == str(tmp_path / "photos")


def test_reading_reports_how_far_it_is(tmp_path):
    for index in range(70):
        picture(tmp_path / f"{index}.png")
    said = []
    Folder(path=str(tmp_path), size=8).build(workers=2, report=lambda *words: said.append(words))
    assert said[-1] == ("decoding", 70, 70)
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)


def test_shorthand_knows_names_and_paths_and_helps_with_neither(tmp_path):
    assert shorthand("cifar10") == {"name": "cifar10"}
    assert shorthand(str(tmp_path)) == {"name": "folder", "path": str(tmp_path)}
    with pytest.raises(ValueError, match=r"neither a known name \(did you mean cifar10\?\).*nor an existing path"):
        shorthand("cifra10")
    with pytest.raises(ValueError, match="but holds nothing like 'zzzzzz'"):
        shorthand(str(tmp_path / "zzzzzz"))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_signal_in_the_middle_of_a_decoder_calls_no_image_broken(tmp_path, workers):
    began, found = threading.Event(), []

    def visit(position):
        began.set()
        try:
            time.sleep(0.05)
        except BaseException as problem:  # as a file that a decoder then closes twice makes it
            raise UnreadableImageError(tmp_path / f"{position}.png", "bad file descriptor") from problem

    def send():
        assert began.wait(10)
        os.kill(os.getpid(), signal.SIGUSR1)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Interrupted), Stop(at_once=True), Stop(at_once=True):
        found.append(in_threads(visit, 40, workers))
    sender.join()
    assert found == []


def test_images_on_disk_are_read_under_inference_mode_too(tmp_path):
    for index in range(3):
        picture(tmp_path / f"{index}.png", 40 * index)
    images = build(tmp_path, memory=0, holdout=0).train
    with torch.inference_mode():
        pixels = images.read(torch.arange(3))
    assert pixels[:, 0, 0, 0].tolist() == [0, 40, 80]
