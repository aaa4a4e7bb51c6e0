import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manyviews.run import folder as run_module
from manyviews.run.folder import Run, prepare, read_metrics
from manyviews.system.writing import write_atomic


def test_metrics_are_lines_and_curves_from_the_first_step_and_never_double_back(tmp_path: Path) -> None:
    first = Run(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": step / 2, "std": float("nan")})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    second = Run(tmp_path, step=2)
    second.log(3, {"loss": 9.0})
    (tmp_path / "backbone").mkdir()
    second.finish(tmp_path / "backbone")
    lines = list(read_metrics(tmp_path))
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert lines[0]["std"] is None
    assert (tmp_path / "done").exists()
    assert curve(tmp_path) == [(1, 0.5), (2, 1.0), (3, 9.0)]


def curve(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_run_that_was_cut_off_before_its_first_checkpoint_begins_its_curves_anew(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        run = Run(tmp_path)
        run.text("config", str(value))
        run.log(1, {"loss": value})
        run.close()
    assert curve(tmp_path) == [(1, 2.0)]
    assert [line["loss"] for line in read_metrics(tmp_path)] == [2.0]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Tensors("config/text_summary")) == 1


def test_a_full_disk_is_told_of_once_and_no_line_and_no_point_is_lost_or_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    run, write, room = Run(tmp_path, warn=messages.append), os.write, [10**9]

    def bounded(descriptor: int, content: Any) -> int:
        """What a disk does that is full: it takes a part, then nothing."""
        if not room[0]:
            raise OSError(28, "No space left on device")
        taken = write(descriptor, bytes(content)[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", bounded)
    run.log(1, {"loss": 1.0})
    room[0] = 20
    for step in (2, 3, 4):
        run.log(step, {"loss": float(step)})
    run.histogram("similarity", torch.linspace(-1, 1, 50), 4)
    assert [text.partition(" cannot be written")[0].rpartition("/")[2][:6] for text in messages] == ["metric", "events"]
    assert all("No space left on device" in text for text in messages)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    with pytest.raises(OSError, match="No space"):
        run.sync()
    room[0] = 10**9
    run.log(5, {"loss": 5.0})
    run.sync()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert curve(tmp_path) == [(step, float(step)) for step in range(1, 6)]
    assert len(messages) == 2
    room[0] = 0
    run.log(6, {"loss": 6.0})
    run.close()
    run.close()
    assert len(messages) == 6
    assert all("bytes are missing at the end" in text for text in messages[4:])


def test_a_picture_that_cannot_be_written_is_told_of_and_ends_nothing(tmp_path: Path) -> None:
    messages: list[str] = []
    run = Run(tmp_path, warn=messages.append)
    (tmp_path / "views.png").mkdir()
    run.picture("views", torch.zeros(3, 8, 12, dtype=torch.uint8))
    run.close()
    assert len(messages) == 1
    assert "views.png could not be written" in messages[0]


def test_curves_are_written_without_a_thread_that_could_fail_later(tmp_path: Path) -> None:
    before = threading.active_count()
    run = Run(tmp_path)
    run.log(1, {"loss": 1.0})
    assert threading.active_count() == before
    run.close()


def test_lines_that_are_no_metrics_are_dropped_on_resuming_and_named(tmp_path: Path) -> None:
    lines = [
        b'{"step": 1, "loss": 1.0}',
        b"[1]",
        b'{"step": [2]}',
        b"[" * 100_000,
        b'{"loss": 3}',
        b"\xff\xfe not UTF-8",
        b"\0" * 4096,
        b'{"step": true}',
        b'{"step": NaN}',
        b"{" + b" " * (5 << 20) + b"}",
        b'{"step": 2, "loss": 2.0}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 3, "lo']))
    messages: list[str] = []
    Run(tmp_path, step=2, warn=messages.append).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert messages == [f"{tmp_path}/metrics.jsonl: removed lines 2, 3, 4, 5, 6 and 4 more, which held no metrics"]


def test_a_last_line_that_was_cut_off_is_dropped_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    Run(tmp_path, step=2).close()
    (tmp_path / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes() + b'{"step": 3\0\0')
    Run(tmp_path, step=3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_metrics_that_are_no_file_are_named_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.mkdir() if kind == "folder" else os.mkfifo(file)
    with pytest.raises(ValueError, match=f"metrics.jsonl is a {kind} and no file"):
        Run(tmp_path, step=2)


def test_metrics_that_are_gone_on_resuming_are_told_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is missing: the metrics up to step 2 are lost"):
        Run(tmp_path, step=2).close()


@pytest.mark.parametrize("back", [3600 * 24 * 365 * 40, 3600, 1e-9, 0.0])
def test_a_clock_that_was_set_back_mixes_no_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: float
) -> None:
    first = Run(tmp_path)
    for step in (1, 2, 3, 4):
        first.log(step, {"loss": float(step)})
    first.close()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - int(back * 1e9))
    monkeypatch.setattr(time, "time", lambda: time.time_ns() / 1e9)
    for begun in (2, 3):
        run = Run(tmp_path, step=begun)
        for step in range(begun + 1, 5):
            run.log(step, {"loss": 10.0 * begun})
        run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 2.0), (3, 20.0), (4, 30.0)]
    walls = [point.wall_time for point in points]
    assert walls == sorted(walls)


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def without_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()


def without_curves(folder: Path) -> None:
    shutil.rmtree(folder / "tensorboard")


def replaced(folder: Path) -> None:
    (folder / "other").write_text("other\n")
    (folder / "other").rename(folder / "metrics.jsonl")


@pytest.mark.parametrize("meddle", [moved, removed, without_metrics, without_curves, replaced])
def test_what_another_program_takes_from_a_live_run_is_told_of_and_written_again(
    tmp_path: Path, meddle: Callable[[Path], None]
) -> None:
    folder, messages, locked = tmp_path / "run", list[str](), list[int]()
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    run = Run(folder, warn=messages.append, lock_again=lambda: locked.append(1))
    run.picture("views", torch.zeros(3, 8, 8, dtype=torch.uint8))
    for step in (1, 2, 3, 4):
        run.log(step, {"loss": float(step)})
        if step == 2:
            assert not messages
            meddle(folder)
        if step == 3:
            assert any("by another program" in text for text in messages)
            seen = len(messages)
    run.sync()
    assert len(messages) == seen
    assert bool(locked) == (meddle in (moved, removed))
    (folder / "backbone").mkdir()
    run.finish(folder / "backbone")
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4]
    assert curve(folder) == [(step, float(step)) for step in (1, 2, 3, 4)]
    assert (folder / "config.yaml").read_text() == "seed: 0\n"
    names = {"backbone", "config.yaml", "done", "metrics.jsonl", "tensorboard", "views.png"}
    assert {entry.name for entry in folder.iterdir()} == names


def test_a_run_of_which_a_part_is_missing_at_its_end_is_not_called_finished(tmp_path: Path) -> None:
    messages: list[str] = []
    run = Run(tmp_path, warn=messages.append)
    (tmp_path / "backbone").mkdir()
    for step in (1, 2):
        run.log(step, {"loss": 1.0})
    os.truncate(tmp_path / "metrics.jsonl", 5)
    run.log(3, {"loss": 1.0})
    assert messages == [f"45 bytes of {tmp_path}/metrics.jsonl were cut off by another program"]
    with pytest.raises(OSError, match=r"metrics\.jsonl lacks 45 bytes; .*step-1 is missing; done is not written"):
        run.finish(tmp_path / "backbone", [tmp_path / "step-1"])
    assert not (tmp_path / "done").exists()


def test_a_picture_is_a_file_and_an_event(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.picture("views", torch.zeros(3, 8, 12, dtype=torch.uint8))
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert (tmp_path / "views.png").exists()
    assert (events.Images("views")[0].height, events.Images("views")[0].width) == (8, 12)


def test_a_histogram_counts_every_value_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.histogram("similarity/negative", torch.linspace(-1, 1, 100, dtype=torch.bfloat16), 7)
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Histograms("similarity/negative")
    assert event.step == 7
    assert event.histogram_value.num == sum(event.histogram_value.bucket) == 100
    assert (event.histogram_value.min, event.histogram_value.max) == (-1, 1)


def test_a_folder_with_anything_in_it_is_never_overwritten_silently(tmp_path: Path) -> None:
    prepare(tmp_path / "new", resume=False)
    prepare(tmp_path, resume=False)
    (tmp_path / "photo.jpg").touch()
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            prepare(tmp_path, resume=resume)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="resume=true"):
        prepare(tmp_path, resume=False)
    prepare(tmp_path, resume=True)
    with pytest.raises(ValueError, match="is a file"):
        prepare(tmp_path / "photo.jpg", resume=True)


def test_what_was_exported_is_on_the_disk_before_done_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "model.safetensors").write_text("weights")
    synced: list[str] = []

    def sync(path: Path) -> None:
        assert not (tmp_path / "done").exists()
        synced.append(path.name)

    monkeypatch.setattr(run_module, "sync", sync)
    Run(tmp_path).finish(tmp_path / "backbone")
    assert synced[:2] == ["model.safetensors", "backbone"]
    assert (tmp_path / "done").exists()


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_its_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "done").write_text("before")
    seen: list[tuple[int, str]] = []
    fsync = os.fsync

    def noted(file: int) -> None:
        seen.append((os.fstat(file).st_ino, (tmp_path / "done").read_text()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    write_atomic(tmp_path / "done", [b"after"])
    assert seen == [((tmp_path / "done").stat().st_ino, "before"), (tmp_path.stat().st_ino, "after")]
