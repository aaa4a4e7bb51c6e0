"""A run goes on as it was started, or as it is asked to: on another schedule, from another path, and says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from manyviews.config import load
from manyviews.recipe import Recipe
from manyviews.run.folder import read_metrics
from manyviews.train import pretrain as loop
from manyviews.train import setup
from manyviews.train.pretrain import pretrain
from manyviews.train.recorder import Recorder
from stopped_runs import content, differing, stop_after

SMALL = [
    "train.batch_size=8",
    "train.log_every=1",
    "train.precision=fp32",
    "train.preview=0",
    "train.monitor=0",
    "train.threads=1",
    "train.workers=0",
    "data.size=16",
    "views.size=16",
    "encoder.projector.hidden=16",
    "encoder.projector.dim=8",
    "optim.rate=0.001",
]
PER_EPOCH = 3


def images(folder: Path, count: int = 8 * PER_EPOCH, first: int = 0) -> Path:
    folder.mkdir(parents=True)
    for index in range(first, first + count):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return images(tmp_path / "data")


def recipe(run: Path, data: Path, *words: str, epochs: float = 2) -> Recipe:
    return load(Recipe, None, [*SMALL, f"data={data}", f"output={run}", f"train.epochs={epochs}", *words])


def stopped(monkeypatch: pytest.MonkeyPatch, steps: int, made: Recipe) -> Path:
    """The folder of a run that a signal has ended after so many steps of this session."""
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(SystemExit):
            pretrain(made)
    return Path(str(made.output))


def config(run: Path) -> Recipe:
    return load(Recipe, run / "config.yaml")


def rates(run: Path) -> list[float]:
    return [line["rate"] for line in read_metrics(run)]


def test_the_same_words_on_a_finished_run_do_nothing(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(recipe(tmp_path / "run", data))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for words in (["resume=true"], ["resume=true", "extend=true"]):
        capsys.readouterr()
        pretrain(recipe(run, data, *words))
        assert "finished: nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize(
    ("words", "epochs", "said"),
    [
        ([], 4, r"train\.epochs was 2\.0 and is 4\.0; add extend=true"),
        (["train.minutes=9"], 2, r"train\.minutes was null and is 9\.0; add extend=true"),
        (["optim.weight_decay=0.5"], 2, r"optim\.weight_decay was null and is 0\.5; start another"),
        (["data=OTHER"], 2, "the images are not those that the run was started with"),
        (["views.num_views=3"], 2, r"views\.num_views was 2 and is 3"),
        (["extend=true"], 1, r"train\.epochs was 2\.0 and is 1\.0, but the run has had"),
    ],
)
def test_what_differs_is_refused_with_the_difference(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: bool,
    words: list[str],
    epochs: float,
    said: str,
) -> None:
    other = images(tmp_path / "other", first=50)
    made = recipe(tmp_path / "run", data)
    run = pretrain(made) if done else stopped(monkeypatch, 4, made)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    given = [word.replace("OTHER", str(other)) for word in words]
    named = other if "data=OTHER" in words else data
    with pytest.raises(ValueError, match=said):
        pretrain(recipe(run, named, *(word for word in given if "data=" not in word), "resume=true", epochs=epochs))
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    assert after.keys() == before.keys()
    assert {path for path in before if path != run and after[path] != before[path]} == set()


def test_another_budget_is_refused_before_the_first_checkpoint_too(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "save", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(recipe(tmp_path / "run", data))
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    with pytest.raises(ValueError, match=r"train\.epochs was 2\.0 and is 4\.0; add extend=true"):
        pretrain(recipe(tmp_path / "run", data, "resume=true", epochs=4))
    pretrain(recipe(tmp_path / "run", data, "resume=true", "extend=true", epochs=4))
    assert config(tmp_path / "run").train.epochs == 4


def test_extend_is_for_a_run_that_goes_on(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="extend=true continues a run: add resume=true"):
        recipe(tmp_path / "run", data, "extend=true")


@pytest.mark.parametrize("done", [True, False])
def test_an_extended_run_says_its_schedule_and_goes_on_bit_for_bit_as_its_own_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: bool
) -> None:
    run, step = tmp_path / "run", 2 * PER_EPOCH if done else 4
    if done:
        pretrain(recipe(run, data))
    else:
        stopped(monkeypatch, step, recipe(run, data))
    exported = (run / "backbone" / "model.safetensors").read_bytes() if done else b""
    shutil.copytree(run, tmp_path / "copy")
    capsys.readouterr()
    pretrain(recipe(run, data, "resume=true", "extend=true", epochs=4))
    told = " ".join(capsys.readouterr().out.split())
    assert (run / "done").exists()
    assert (run / "backbone" / "model.safetensors").read_bytes() != exported
    assert config(run).train.epochs == 4
    assert not config(run).extend
    assert f"# from step {step} on" in (run / "config.yaml").read_text()
    # From there on each rate is that of a run which had the whole budget from its beginning.
    whole = pretrain(recipe(tmp_path / "whole", data, epochs=4))
    assert rates(run)[step:] == rates(whole)[step:]
    short = rates(pretrain(recipe(tmp_path / "short", data)))
    before = f"{short[step]:.3g}" if step < len(short) else "0"
    said = f"step {step + 1} of 12 has a rate of {rates(whole)[step]:.3g}, not {before}"
    assert f"extended: train.epochs was 2.0 and is 4.0; {said}" in told
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 13))
    # Stopped and resumed, with the words that extended it or with those of any resumption.
    copy = stopped(monkeypatch, 2, recipe(tmp_path / "copy", data, "resume=true", "extend=true", epochs=4))
    assert not (copy / "done").exists()
    stopped(monkeypatch, 2, recipe(copy, data, "resume=true", "extend=true", epochs=4))
    pretrain(load(Recipe, copy / "config.yaml", ["resume=true", f"output={copy}"]))
    assert differing(content(run), content(copy)) == []
    assert [line["loss"] for line in read_metrics(run)] == [line["loss"] for line in read_metrics(copy)]


def test_an_extension_that_is_cut_off_before_its_first_step_is_not_finished(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretrain(recipe(tmp_path / "run", data))
    with monkeypatch.context() as patch:
        patch.setattr(setup.resume, "record_settings", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(recipe(run, data, "resume=true", "extend=true", epochs=4))
    assert not (run / "done").exists()
    shutil.copytree(run, tmp_path / "copy")
    pretrain(recipe(run, data, "resume=true"))
    assert config(run).train.epochs == 2
    assert (run / "done").exists()
    pretrain(recipe(tmp_path / "copy", data, "resume=true", "extend=true", epochs=4))
    assert [line["step"] for line in read_metrics(tmp_path / "copy")] == list(range(1, 13))


def test_a_run_in_minutes_is_extended_by_minutes(tmp_path: Path, data: Path) -> None:
    run = pretrain(recipe(tmp_path / "run", data, "train.minutes=0.005"))
    with pytest.raises(ValueError, match=r"train\.minutes was 0\.005 and is 0\.02; add extend=true"):
        pretrain(recipe(run, data, "train.minutes=0.02", "resume=true"))
    before = len(list(read_metrics(run)))
    pretrain(recipe(run, data, "train.minutes=0.02", "resume=true", "extend=true"))
    assert len(list(read_metrics(run))) > before
    assert config(run).train.minutes == 0.02


def test_free_settings_may_change_and_the_configuration_says_what_was_gone_on_with(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(monkeypatch, 4, recipe(tmp_path / "run", data))
    first = (run / "config.yaml").read_text()
    pretrain(recipe(run, data, "resume=true", "train.keep=5", "data.max_bad=0.5"))
    assert config(run).train.keep == 5
    assert not config(run).resume
    text = (run / "config.yaml").read_text()
    assert "train.keep was 2 and is 5" in text
    assert [line for line in first.splitlines() if line.startswith("#")] == []
    pretrain(recipe(run, data, "resume=true", "train.keep=5", "data.max_bad=0.5"))
    assert (run / "config.yaml").read_text() == text


@pytest.mark.parametrize("done", [True, False])
def test_a_run_whose_images_moved_goes_on_and_the_configuration_says_where_they_are(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: bool
) -> None:
    straight = pretrain(recipe(tmp_path / "straight", data))
    made = recipe(tmp_path / "run", data)
    run = pretrain(made) if done else stopped(monkeypatch, 4, made)
    there = data.rename(tmp_path / "job_2")
    pretrain(recipe(run, there, "resume=true"))
    assert differing(content(straight), content(run)) == []
    assert config(run).data.model_dump()["path"] == str(there)
    assert f"data.path was {data} and is {there}" in " ".join(capsys.readouterr().out.split())


def test_a_table_of_labels_and_a_file_of_values_may_move_but_not_change(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, values = tmp_path / "labels.csv", tmp_path / "values.npy"
    table.write_text("name,label\n" + "".join(f"{index:02d}.png,{index % 2}\n" for index in range(24)))
    words = ["data.holdout=0", "objective=log_ratio", "data.labels={}", "values={}"]
    np.save(values, np.arange(24.0)[:, None])

    def made(*more: str) -> Recipe:
        given = [word.format(path) for word, path in zip(words, ("", "", table, values), strict=True)]
        return recipe(tmp_path / "run", data, *given, *more)

    run = stopped(monkeypatch, 4, made())
    table, values = table.rename(tmp_path / "moved.csv"), values.rename(tmp_path / "moved.npy")
    np.save(tmp_path / "values.npy", np.arange(24.0)[::-1, None] ** 2)
    pretrain(made("resume=true"))
    assert config(run).values == str(values)
    values = tmp_path / "values.npy"
    (run / "done").unlink()
    with pytest.raises(ValueError, match="the values differ from those at the start of the run"):
        pretrain(made("resume=true"))
    values = tmp_path / "moved.npy"
    table.write_text(table.read_text().replace("03.png,1", "03.png,0"))
    with pytest.raises(ValueError, match="the images are not those that the run was started with"):
        pretrain(made("resume=true"))


def test_other_held_out_images_are_warned_of(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(name: str, *more: str) -> Recipe:
        for index, label in enumerate("ab"):
            if not (tmp_path / name / label).exists():
                images(tmp_path / name / label, 2, first=50 + index + len(name))
        return recipe(tmp_path / "run", train, f"data.test={tmp_path / name}", *more)

    train = tmp_path / "classes"
    for index, label in enumerate("ab"):
        images(train / label, 12, first=100 * index)
    stopped(monkeypatch, 4, made("held"))
    capsys.readouterr()
    pretrain(made("others", "resume=true"))
    assert "the held-out images are not those that the run was started with" in capsys.readouterr().out


def test_a_second_start_is_refused_while_the_first_one_trains(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    original = loop.train_step

    def again(*arguments: Any) -> Any:
        if not refused:
            with pytest.raises(ValueError, match=r"is being written by process \d+ on ") as problem:
                pretrain(recipe(tmp_path / "run", data, "resume=true"))
            refused.append(str(problem.value))
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", again)
    run = pretrain(recipe(tmp_path / "run", data))
    assert refused
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 7))
    assert json.loads(json.dumps(config(run).model_dump(mode="json")))["resume"] is False
