import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from manyviews.features import store, store_rows
from manyviews.features.store_rows import Writer

ROWS = torch.arange(12.0).view(6, 2)


def key(**changes: object) -> dict[str, object]:
    layers = {"backbone": {"file": "backbone.npy", "shape": [6, 2], "dtype": "float32"}}
    return {"weights": {"sha256": "a" * 64}, "input": {"size": 28}, "layers": layers, **changes}


def write(folder: Path, *rows: slice) -> None:
    with Writer(folder, ["backbone"]) as pen:
        for part in rows:
            pen.put(part.start, {"backbone": ROWS[part]})


def complete(folder: Path) -> None:
    with store.held(folder, key(), replace=False):
        write(folder, slice(0, 6))
        store.finish(folder, ["backbone.npy"], key(), [("train", 0, "a"), ("train", 1, "b")])


def test_rows_that_were_put_are_there_in_their_places_once_the_folder_is_complete(tmp_path: Path) -> None:
    with store.held(tmp_path / "out", key(), replace=False) as there:
        assert not there
        write(tmp_path / "out", slice(4, 6), slice(0, 4))
        assert not (tmp_path / "out" / "backbone.npy").exists()
        store.finish(tmp_path / "out", ["backbone.npy"], key(), [])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["backbone.npy", "manifest.json"]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "backbone.npy"), ROWS.numpy())
    mapped = store.mapped(tmp_path / "out" / "backbone.npy")
    mapped += 1  # the file stays as it is
    assert torch.equal(store.mapped(tmp_path / "out" / "backbone.npy"), ROWS)
    with store.held(tmp_path / "out", key(), replace=False) as there:
        assert there


def test_only_rows_that_were_safely_written_count_after_a_cut(tmp_path: Path) -> None:
    with store.held(tmp_path, key(), replace=False):
        write(tmp_path, slice(2, 4))
    log = tmp_path / ".partial" / "done-00000.txt"
    # What a kill in the middle of a line leaves, and what another process wrote.
    log.write_text(log.read_text() + "4 6 do")
    (tmp_path / ".partial" / "done-00001.txt").write_text("0 1 done\n")
    assert store.rows_done(tmp_path, 6).tolist() == [True, False, True, True, False, False]
    with store.held(tmp_path, key(), replace=False) as there:
        assert not there
        write(tmp_path, slice(4, 6))
    assert store.rows_done(tmp_path, 6).tolist() == [True, False, True, True, True, True]


def test_a_failure_in_the_middle_keeps_what_was_put_before_it(tmp_path: Path) -> None:
    def cut() -> None:
        with Writer(tmp_path, ["backbone"]) as pen:
            pen.put(0, {"backbone": ROWS[:3]})
            pen.remark(["broken.png", "cut short"])
            raise KeyboardInterrupt

    with store.held(tmp_path, key(), replace=False), pytest.raises(KeyboardInterrupt):
        cut()
    assert store.rows_done(tmp_path, 6).sum() == 3
    assert store.remarks(tmp_path) == [["broken.png", "cut short"]]


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_fails_is_an_error_of_the_next_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.held(tmp_path, key(), replace=False):
        monkeypatch.setattr(store_rows.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, slice(0, 3))
        assert not store.rows_done(tmp_path, 6).any()


def test_rows_are_noted_beside_the_work_once_they_are_safe_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, begun, let_go = os.fsync, threading.Event(), threading.Event()

    def slow(file: int) -> None:
        begun.set()
        assert let_go.wait(30)
        original(file)

    with store.held(tmp_path, key(), replace=False), Writer(tmp_path, ["backbone"]) as pen:
        monkeypatch.setattr(store_rows.os, "fsync", slow)
        monkeypatch.setattr(store_rows, "SECONDS_BETWEEN_SYNCS", 0.0)
        pen.put(0, {"backbone": ROWS[:2]})
        assert begun.wait(30)
        pen.put(2, {"backbone": ROWS[2:3]})
        monkeypatch.setattr(store_rows, "SECONDS_BETWEEN_SYNCS", 1e9)
        assert not store.rows_done(tmp_path, 6).any()
        let_go.set()
        until = time.monotonic() + 30
        while not store.rows_done(tmp_path, 6).any() and time.monotonic() < until:
            time.sleep(0.01)
        assert store.rows_done(tmp_path, 6).tolist() == [True, True, False, False, False, False]
    assert store.rows_done(tmp_path, 6).sum() == 3


def test_a_disk_that_fails_beside_the_work_is_an_error_of_what_is_written_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []

    def work() -> None:
        with Writer(tmp_path, ["backbone"]) as pen:
            monkeypatch.setattr(store_rows.os, "fsync", full)
            monkeypatch.setattr(store_rows, "SECONDS_BETWEEN_SYNCS", 0.0)
            for row in range(6):
                try:
                    pen.put(row, {"backbone": ROWS[row : row + 1]})
                except OSError:
                    heard.append(row)
                    raise
                time.sleep(0.2)

    with store.held(tmp_path, key(), replace=False):
        with pytest.raises(OSError, match="No space left"):
            work()
        assert heard
        assert not store.rows_done(tmp_path, 6).any()


@pytest.mark.parametrize("finished", [True, False])
def test_features_of_another_key_are_refused_with_what_differs_or_replaced(tmp_path: Path, finished: bool) -> None:
    if finished:
        complete(tmp_path)
    else:
        with store.held(tmp_path, key(), replace=False):
            write(tmp_path, slice(0, 3))
    (tmp_path / "notes.txt").write_text("mine")
    other = key(weights={"sha256": "b" * 64, "projector": {"sha256": "c"}}, input={"size": 32})
    words = (
        r'weights\.sha256 was "a{11}… and is "b{11}…; weights\.projector was absent and is there; '
        r"input\.size was 28 and is 32; overwrite=true replaces them"
    )
    with pytest.raises(ValueError, match=words), store.held(tmp_path, other, replace=False):
        pass
    with store.held(tmp_path, other, replace=True) as there:
        assert not there
        assert not store.rows_done(tmp_path, 6).any()
        assert not (tmp_path / "backbone.npy").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_cut_between_the_last_files_and_the_manifest_is_healed(tmp_path: Path) -> None:
    with store.held(tmp_path, key(), replace=False):
        write(tmp_path, slice(0, 6))
        (tmp_path / ".partial" / "backbone.npy").replace(tmp_path / "backbone.npy")
    with store.held(tmp_path, key(), replace=False) as there:
        assert not there
        assert store.rows_done(tmp_path, 6).all()
        store.finish(tmp_path, ["backbone.npy"], key(), [])
    assert store.read_manifest(tmp_path) == {**key(), "files": ["backbone.npy"]}


def test_the_manifest_is_json_and_is_described_without_its_images(tmp_path: Path) -> None:
    complete(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content == {**key(), "files": ["backbone.npy"], "images": [["train", 0, "a"], ["train", 1, "b"]]}
    assert store.read_manifest(tmp_path) == {**key(), "files": ["backbone.npy"]}
    (tmp_path / "manifest.json").write_text('{"weights"')
    with pytest.raises(ValueError, match="is damaged"):
        store.read_manifest(tmp_path)


def test_a_folder_is_held_by_one_program_at_a_time(tmp_path: Path) -> None:
    with (
        store.held(tmp_path, key(), replace=False),
        pytest.raises(ValueError, match="is being written by another program"),
        store.held(tmp_path, key(), replace=False),
    ):
        pass
    complete(tmp_path)


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    huge = key(layers={"backbone": {"file": "backbone.npy", "shape": [10**9, 10**6], "dtype": "float32"}})
    with pytest.raises(ValueError, match=r"take 3725290\.30 GiB"), store.held(tmp_path / "x", huge, replace=False):
        pass
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "files", [["../mine.npy"], ["/tmp/mine.npy"], [".."], ["notes.txt"], [3], "backbone.npy", None]
)
def test_a_strangers_manifest_names_no_file_that_could_be_removed(tmp_path: Path, files: object) -> None:
    folder, mine = tmp_path / "features", tmp_path / "mine.npy"
    complete(folder)
    mine.write_text("mine")
    (folder / "notes.txt").write_text("mine")
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "files": files}))
    with pytest.raises(ValueError, match="its files are not named, or lie elsewhere"):
        store.read_manifest(folder)
    with store.held(folder, key(), replace=True) as there:
        assert not there
    assert mine.read_text() == (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["gone", "short", "other", "manifest"])
def test_what_is_not_as_the_manifest_says_is_not_complete_and_can_be_replaced(tmp_path: Path, damage: str) -> None:
    complete(tmp_path)
    rows = tmp_path / "backbone.npy"
    match damage:
        case "gone":
            rows.unlink()
        case "short":
            rows.write_bytes(rows.read_bytes()[:-1])
        case "other":
            np.save(rows, np.zeros((6, 3), np.float32))
        case "manifest":
            (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"backbone\.npy (cannot be read|holds float32 \[6, 3\])|is damaged"):
        store.state(tmp_path, key())
    with store.held(tmp_path, key(), replace=True) as there:
        assert not there
        assert not store.rows_done(tmp_path, 6).any()


def test_the_lock_goes_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    release = store.FileLock.release
    monkeypatch.setattr(
        store.FileLock, "release", lambda lock, **given: (held.append(Path(lock.lock_file).exists()), release(lock))
    )
    complete(tmp_path)
    assert held[0] is False
