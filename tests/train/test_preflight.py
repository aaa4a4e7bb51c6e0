"""`--check` does what a run would do, tells what would go wrong, and leaves nothing behind."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from manyviews import cli, recipe
from manyviews.objectives.in_batch import InBatchObjective
from manyviews.run.checkpoints import Checkpoint
from manyviews.train import preflight, pretrain, recorder
from processes import launched
from small_run import save_checkpoint

SMALL = [
    "train.batch_size=16",
    "train.precision=fp32",
    "train.threads=1",
    "train.workers=0",
    "train.preview=2",
]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MOST_TIMED", 2)
    monkeypatch.setattr(recorder, "MAX_MONITOR_IMAGES", 200)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A recipe for few images in a folder, one of which is broken."""
    for label in ("dark", "light"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(70):
            pixels = np.random.default_rng(index).integers(0, 128, (28, 28)) + 100 * (label == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / label / f"{index}.png")
    (tmp_path / "images" / "dark" / "9.png").write_bytes(b"no image")
    data = [f"data={tmp_path / 'images'}", "data.size=28", "data.channels=1", "data.max_bad=0.1"]
    return ["--check", *SMALL, *data, f"output={tmp_path / 'runs' / 'run'}"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_check_tells_what_it_found_and_leaves_nothing(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(tmp_path)
    assert cli.pretrain(["quickstart", *words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "125 to learn from and 14 held out, 1 unreadable and left out" in shown
    assert "written, read back, the same to the last bit" in shown
    assert "for 4 checkpoints, of" in shown
    # Of 125 images a batch of 16 makes 7 steps an epoch, and the quickstart has 40 epochs.
    assert "for 280 steps" in shown
    assert content(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_a_check_of_what_is_resumed_begins_at_its_step_and_leaves_it_as_it_was(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*words[1:], "train.monitor=0"]
    assert cli.pretrain([*run, "train.epochs=1"]) == 0
    folder = tmp_path / "runs" / "run"
    (folder / "done").unlink()
    before = content(tmp_path)
    capsys.readouterr()
    assert cli.pretrain(["--check", *run, "resume=true", "train.epochs=3"]) == 0
    assert "2, from step 7 on" in capsys.readouterr().out
    assert content(tmp_path) == before
    assert cli.pretrain(["--check", *run]) == 2
    assert "add resume=true" in capsys.readouterr().err


def test_what_would_go_wrong_is_an_error_each(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    forward = InBatchObjective.forward
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 10**6))
    monkeypatch.setattr(preflight, "memory", lambda: (10**9, 10**9))
    monkeypatch.setattr(
        InBatchObjective,
        "forward",
        lambda *arguments: (lambda loss: loss._replace(total=loss.total * torch.nan))(forward(*arguments)),
    )
    assert cli.pretrain(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["error"] * 3
    assert "not finite" in said[0]
    assert "0.00 GB are free" in said[1]
    assert "train.chunk" in said[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_a_step_that_does_not_fit_in_memory_is_one_sentence(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(pretrain, "train_step", full)
    assert cli.pretrain(words) == 2
    said = capsys.readouterr().err
    assert "of the machine's" in said
    assert "in use at most (tried to allocate 20 GiB); set train.chunk=" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize("where", ["parts", "optimiser"])
def test_a_checkpoint_that_is_not_what_was_written_is_found(tmp_path: Path, where: str) -> None:
    def made(value: float) -> Checkpoint:
        weights: dict[str, Tensor] = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([value])}
        group = {"params": [0], "lr": 0.1}
        if where == "parts":
            return Checkpoint(3, {"encoder": weights}, {"state": {}, "param_groups": [group]}, {})
        parts = {"encoder": {"a": torch.ones(1)}}
        return Checkpoint(3, parts, {"state": {0: weights}, "param_groups": [group]}, {})

    save_checkpoint(tmp_path, made(1.0))
    assert preflight.differences(made(1.0), tmp_path) == []
    (said,) = preflight.differences(made(2.0), tmp_path)
    assert said.endswith("encoder.b" if where == "parts" else "optimiser.0.b")
    (said,) = preflight.differences(made(1.0), tmp_path / "elsewhere")
    assert "no checkpoint" in said


def test_two_processes_check_together(tmp_path: Path, words: list[str]) -> None:
    launched(cli.pretrain, ["instance_discrimination", *words, "objective.estimator=exact"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_passes_its_check(tmp_path: Path, name: str) -> None:
    assert cli.pretrain([name, "--check", f"output={tmp_path / 'run'}"]) == 0
    assert not list(tmp_path.iterdir())
