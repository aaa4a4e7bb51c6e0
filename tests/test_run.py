import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contrastive import run as runs
from contrastive.run import Checkpoint, Run, newest_checkpoint, prepare, read_metrics, save_checkpoint


def checkpoint(step: int) -> Checkpoint:
    weight = torch.nn.Parameter(torch.full((3,), float(step)))
    optimiser = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimiser.step()
    parts = {"encoder": {"weight": weight.detach()}, "objective": {"bank": torch.arange(4.0) + step}}
    return Checkpoint(step, parts, optimiser.state_dict(), {"seconds": 1.5, "fingerprint": "abc"})


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = checkpoint(7)
    save_checkpoint(tmp_path, saved)
    found, skipped = newest_checkpoint(tmp_path)
    assert found is not None
    assert not skipped
    assert (found.step, found.facts) == (7, saved.facts)
    assert torch.equal(found.parts["objective"]["bank"], saved.parts["objective"]["bank"])
    assert torch.equal(found.optimiser["state"][0]["exp_avg"], saved.optimiser["state"][0]["exp_avg"])


@pytest.mark.parametrize("file", ["encoder.safetensors", "optimiser.pt", "facts.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, file: str, damage: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    path = save_checkpoint(tmp_path, checkpoint(2)) / file
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else content[:-9] + b"!" + content[-8:])
    found, skipped = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step-000000002" in skipped[0]


@pytest.mark.parametrize("stage", ["save_file", "_sync", "_digest"])
def test_a_save_that_fails_keeps_the_older_checkpoint_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=1)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, stage, full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, checkpoint(2), keep=1)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000000001"]
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None


def test_a_process_killed_while_saving_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / ".step-000000002.partial-99").mkdir()
    (tmp_path / "tmp").mkdir()
    found, skipped = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, skipped) == (1, [])


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-000000003", "step-000000010"]
    with pytest.raises(ValueError, match="keep=0"):
        save_checkpoint(tmp_path, checkpoint(11), keep=0)


def test_a_malicious_pickle_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    folder = save_checkpoint(tmp_path / "checkpoints", checkpoint(1))
    (folder / "optimiser.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["optimiser.pt"] = runs._digest(folder / "optimiser.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found, skipped = newest_checkpoint(tmp_path / "checkpoints")
    assert found is None
    assert "step-000000001" in skipped[0]
    assert not (tmp_path / "exploded").exists()


def test_metrics_are_lines_and_curves_from_the_first_step_and_never_double_back(tmp_path: Path) -> None:
    first = Run(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": step / 2, "std": float("nan")})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    second = Run(tmp_path, step=2)
    second.log(3, {"loss": 9.0})
    second.finish()
    lines = list(read_metrics(tmp_path))
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert lines[0]["std"] is None
    assert (tmp_path / "done").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_picture_is_a_file_and_an_event(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.picture("views", torch.zeros(3, 8, 12, dtype=torch.uint8))
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert (tmp_path / "views.png").exists()
    assert (events.Images("views")[0].height, events.Images("views")[0].width) == (8, 12)


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
