import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contrastive import run as run_module
from contrastive.run import Run, prepare, read_metrics


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
    told: list[str] = []
    run, write, room = Run(tmp_path, warn=told.append), os.write, [10**9]

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
    assert [text.partition(" cannot be written")[0].rpartition("/")[2][:6] for text in told] == ["metric", "events"]
    assert all("No space left on device" in text for text in told)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    with pytest.raises(OSError, match="No space"):
        run.sync()
    room[0] = 10**9
    run.log(5, {"loss": 5.0})
    run.sync()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert curve(tmp_path) == [(step, float(step)) for step in range(1, 6)]
    assert len(told) == 2
    room[0] = 0
    run.log(6, {"loss": 6.0})
    run.close()
    run.close()
    assert len(told) == 6
    assert all("bytes are missing at the end" in text for text in told[4:])


def test_a_picture_that_cannot_be_written_is_told_of_and_ends_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    run = Run(tmp_path, warn=told.append)
    (tmp_path / "views.png").mkdir()
    run.picture("views", torch.zeros(3, 8, 12, dtype=torch.uint8))
    run.close()
    assert len(told) == 1
    assert "views.png could not be written" in told[0]


def test_curves_are_written_without_a_thread_that_could_fail_later(tmp_path: Path) -> None:
    before = threading.active_count()
    run = Run(tmp_path)
    run.log(1, {"loss": 1.0})
    assert threading.active_count() == before
    run.close()


def test_lines_that_are_no_lines_of_metrics_are_dropped_on_resuming(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 1.0}',
        "[1]",
        '{"step": [2]}',
        "[" * 100_000,
        '{"loss": 3}',
        '{"step": 2, "loss": 2.0}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))
    Run(tmp_path, step=2).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


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
