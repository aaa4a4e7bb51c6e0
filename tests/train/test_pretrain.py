"""The whole loop on real images, in small."""

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from manyviews import cli
from manyviews.config import load
from manyviews.evaluation import EvaluateSettings, evaluate
from manyviews.objectives.in_batch import InBatchObjective
from manyviews.recipe import Recipe, find
from manyviews.run.folder import read_metrics
from manyviews.system.console import Console
from manyviews.train import metric_line, recorder, setup
from manyviews.train.pretrain import pretrain
from processes import launched
from stopped_runs import content, differing, stop_after

SMALL = [
    "train.batch_size=32",
    "train.log_every=1",
    "train.precision=fp32",
    "train.preview=2",
    "train.monitor=0",
    "train.threads=1",
]
OBJECTIVES = {
    "in_batch": ["objective=in_batch"],
    "queue": ["objective=queue", "objective.size=80", "objective.momentum=0.9"],
    "bank": ["objective=bank"],
    "nce": ["objective=bank", "objective.estimator=nce", "objective.negatives=50"],
    "parametric": ["objective=bank", "objective.estimator=parametric"],
    "triplet": ["objective=triplet", "objective.sampling=distance_weighted"],
    "margin": ["objective=margin", "ids=labels", "train.images_per_class=4"],
    "log_ratio": ["objective=log_ratio", "values=pixels"],
    "noise_contrastive": ["objective=noise_contrastive", "objective.negatives=50"],
}
CHUNKS = [*OBJECTIVES["queue"], "train.chunk=5", "train.batch_size=16", "train.drop_last=false", "train.epochs=2"]


def recipe(output: Path, *words: str, steps: int = 6) -> Recipe:
    # 10,000 images in batches of 32: 312 steps are an epoch.
    defaults = [*SMALL, f"train.epochs={steps / 312}", f"output={output}"]
    given = {word.split("=")[0] for word in words}
    return load(Recipe, None, [*(word for word in defaults if word.split("=")[0] not in given), *words])


def images(folder: Path, count: int = 41) -> Path:
    """Images of which a batch of 16 leaves a rest."""
    folder.mkdir()
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (28, 28), np.uint8) // (1 + index % 3)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return folder


@pytest.mark.parametrize("name", [*OBJECTIVES, "chunks, uneven"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    words = OBJECTIVES.get(name) or [*CHUNKS, f"data={images(tmp_path / 'images')}"]
    straight = pretrain(recipe(tmp_path / "straight", *words))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(SystemExit) as ended:
            pretrain(recipe(tmp_path / "stopped", *words))
        assert ended.value.code == 128 + 15
    resumed = pretrain(recipe(tmp_path / "stopped", "resume=true", *words))
    assert differing(content(straight), content(resumed)) == []
    losses = [[(line["step"], line["loss"]) for line in read_metrics(folder)] for folder in (straight, resumed)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_complete_and_is_not_begun_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pretrain(recipe(tmp_path / "run", "train.monitor=1", steps=2))
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "views.png", "done", "tensorboard", "checkpoints"} <= there
    assert {"backbone/config.json", "backbone/model.safetensors"} <= there
    assert any("knn" in line for line in read_metrics(folder))
    with pytest.raises(ValueError, match="resume=true"):
        pretrain(recipe(tmp_path / "run"))
    pretrain(recipe(tmp_path / "run", "train.monitor=1", "resume=true", steps=2))
    assert "finished: nothing is left to do" in capsys.readouterr().out


def test_measuring_changes_nothing_of_what_is_learned(tmp_path: Path) -> None:
    without = pretrain(recipe(tmp_path / "without", steps=4))
    with_it = pretrain(recipe(tmp_path / "with", "train.monitor=4", steps=4))
    assert differing(content(without), content(with_it)) == []


def test_a_run_goes_on_only_as_it_was_begun(tmp_path: Path) -> None:
    pretrain(recipe(tmp_path / "run", steps=2))
    (tmp_path / "run" / "done").unlink()
    with pytest.raises(ValueError, match=r"objective\.temperature was 0\.1 and is 0\.3"):
        pretrain(recipe(tmp_path / "run", "resume=true", "objective.temperature=0.3"))
    with pytest.raises(ValueError, match=r"seed was 0 and is 1"):
        pretrain(recipe(tmp_path / "run", "resume=true", "seed=1"))


def spoil(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """The loss of the steps with these numbers, from 0, is not finite."""
    forward = InBatchObjective.forward

    def spoiled(self: InBatchObjective, embeddings: Any, ids: Any, targets: Any, step: int) -> Any:
        loss = forward(self, embeddings, ids, targets, step)
        return loss._replace(total=loss.total * torch.nan) if step in numbers else loss

    monkeypatch.setattr(InBatchObjective, "forward", spoiled)


def test_a_step_that_is_not_finite_is_skipped_counted_and_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 1, 3)
    folder = pretrain(recipe(tmp_path / "run", steps=5))
    assert [(line["step"], line["skipped"]) for line in read_metrics(folder)] == [(1, 0), (3, 1), (5, 2)]
    assert capsys.readouterr().out.count("step 2 was skipped: the loss (loss) and the gradient of encoder.") == 1
    assert not (folder / "not_finite.json").exists()


def test_a_loss_that_is_never_finite_ends_the_run_with_a_report_and_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, *range(4, 99))
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(SystemExit):
            pretrain(recipe(tmp_path / "run", steps=40))
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=r"20 steps in a row were skipped, up to step 26: .*not_finite\.json"):
        pretrain(recipe(tmp_path / "run", "resume=true", steps=40))
    assert differing(before, content(tmp_path / "run")) == []
    report = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert (report["step"], report["processes"][0]["loss"]["loss"]) == (25, "nan")
    assert len(report["processes"][0]["images"]) == 32
    assert {image["name"].partition("/")[0] for image in report["processes"][0]["images"]} == {"train"}


def test_a_line_of_metrics_is_the_same_when_the_run_was_stopped_between_two_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2)
    words = ["train.log_every=4"]
    pretrain(recipe(tmp_path / "straight", *words, steps=9))
    before = 0
    for step in (3, 6, 7):
        with monkeypatch.context() as patch:
            stop_after(patch, step - before)
            with pytest.raises(SystemExit):
                pretrain(recipe(tmp_path / "stopped", *words, f"resume={str(step > 3).lower()}", steps=9))
        before = step
    pretrain(recipe(tmp_path / "stopped", *words, "resume=true", steps=9))
    lines = [
        [{key: value for key, value in line.items() if "second" not in key} for line in read_metrics(tmp_path / name)]
        for name in ("straight", "stopped")
    ]
    assert [line["step"] for line in lines[0] if "loss" in line] == [1, 4, 8, 9]
    assert lines[0] == lines[1]


def test_a_measurement_that_a_signal_cuts_off_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MAX_MONITOR_IMAGES", 1_100)
    straight = pretrain(recipe(tmp_path / "straight", "train.monitor=2", steps=4))
    extract = recorder.extract

    def cut_off(*arguments: Any, stopped: Any, **options: Any) -> Any:
        calls = itertools.count()

        def later() -> bool:
            if next(calls) == 1:
                signal.raise_signal(signal.SIGTERM)
            return bool(stopped())

        return extract(*arguments, stopped=later, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "extract", cut_off)
        with pytest.raises(SystemExit) as ended:
            pretrain(recipe(tmp_path / "stopped", "train.monitor=2", steps=4))
        assert ended.value.code == 128 + signal.SIGTERM
    assert not any("knn" in line for line in read_metrics(tmp_path / "stopped"))
    resumed = pretrain(recipe(tmp_path / "stopped", "resume=true", "train.monitor=2", steps=4))
    measured = [
        [(line["step"], line["knn"]) for line in read_metrics(folder) if "knn" in line]
        for folder in (straight, resumed)
    ]
    assert measured[0] == measured[1]
    assert [step for step, _ in measured[0]] == [2, 4]
    assert differing(content(straight), content(resumed)) == []


def test_the_loss_falls_within_sixty_steps(tmp_path: Path) -> None:
    folder = pretrain(recipe(tmp_path / "run", "train.batch_size=64", "objective.temperature=0.2", steps=120))
    losses = [line["loss"] for line in read_metrics(folder)]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


@pytest.mark.parametrize(("splits", "warned"), [(1, True), (2, False)])
def test_a_twin_that_shares_batch_statistics_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], splits: int, warned: bool
) -> None:
    words = [*OBJECTIVES["queue"], f"encoder.batch_norm_splits={splits}"]
    pretrain(recipe(tmp_path / "run", *words, steps=1))
    assert ("normalise the same batch" in capsys.readouterr().out) == warned


@pytest.mark.slow
def test_the_quickstart_learns_features_ahead_of_raw_pixels_and_random_weights(tmp_path: Path) -> None:
    words = ["train.epochs=10", "train.monitor=0", f"output={tmp_path / 'run'}"]
    pretrain(load(Recipe, find("quickstart"), words))
    evaluation = evaluate(tmp_path / "run", EvaluateSettings()).evaluation
    assert evaluation is not None
    assert evaluation.differences
    assert all(difference.low > 0 for difference in evaluation.differences), evaluation.verdict()


def test_minutes_take_the_place_of_epochs(tmp_path: Path) -> None:
    folder = pretrain(recipe(tmp_path / "run", "train.minutes=0.1"))
    assert 5 < list(read_metrics(folder))[-1]["seconds"] < 12


@pytest.mark.parametrize("name", ["nce", "parametric", "chunks, uneven"])
def test_two_processes_train_as_one(tmp_path: Path, name: str) -> None:
    # Without batch norm: its statistics are those of each process.
    words = [
        "encoder.name=test_vit",
        "views.size=32",
        "encoder.projector.batch_norm=false",
        "optim.name=sgd",
        "optim.warmup=0",
    ]
    if name in OBJECTIVES:
        words += [*SMALL, *OBJECTIVES[name], f"train.epochs={4 / 312}"]
    else:
        words += [*SMALL[1:], *CHUNKS, f"data={images(tmp_path / 'images')}"]
    for processes, output in ((1, "one"), (2, "two")):
        launched(cli.pretrain, [*words, f"output={tmp_path / output}"], count=processes)
        assert (tmp_path / output / "done").exists()
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    for key, value in one.items():
        torch.testing.assert_close(
            torch.as_tensor(two[key]), torch.as_tensor(value), rtol=1e-3, atol=2e-5, equal_nan=True, msg=key
        )
    losses = [[line["loss"] for line in read_metrics(tmp_path / output)] for output in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_the_exported_backbone_is_the_trained_one(tmp_path: Path) -> None:
    folder = pretrain(recipe(tmp_path / "run", steps=2))
    exported = load_file(folder / "backbone" / "model.safetensors")
    trained = {key: value for key, value in content(folder).items() if key.startswith("encoder.backbone.")}
    assert len(exported) == len(trained)
    assert all(torch.equal(exported[key.removeprefix("encoder.backbone.")], value) for key, value in trained.items())
    assert json.loads((folder / "backbone" / "config.json").read_text())["architecture"]


def fails(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("no room for 2 GiB\non the device")


def test_no_measurement_and_no_picture_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = pretrain(recipe(tmp_path / "straight", steps=3))
    monkeypatch.setattr(recorder, "monitor_knn", fails)
    monkeypatch.setattr(metric_line, "similarities", fails)
    monkeypatch.setattr(setup, "preview", fails)
    found = pretrain(recipe(tmp_path / "run", "train.monitor=2", steps=3))
    said = " ".join(capsys.readouterr().out.split())
    assert (found / "done").is_file()
    reason = "OutOfMemoryError: no room for 2 GiB on the device"
    assert said.count(f"warning: kNN could not be measured now, training continues: {reason}") == 2
    assert said.count(f"warning: there is no picture of the views: {reason}") == 1
    assert f"the embeddings could not be examined, training continues: {reason}" in said
    assert not any("knn" in line for line in read_metrics(found))
    weights = "backbone/model.safetensors"
    assert (found / weights).read_bytes() == (straight / weights).read_bytes()


def test_monitoring_without_five_images_of_a_class_is_left_out_with_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, labels = recipe(Path("x"), "train.monitor=3"), torch.arange(100).repeat_interleave(4)
    assert recorder.monitored_ids(labels, recipe(Path("x"), "train.monitor=0"), Console()) is None
    assert recorder.monitored_ids(labels[:99], made, Console()) is None
    assert capsys.readouterr().out == ""
    assert recorder.monitored_ids(labels, made, Console()) is None
    assert "among 400 no class has more than 4; training continues without it" in capsys.readouterr().out
    chosen = recorder.monitored_ids(torch.cat([labels, torch.tensor([7, -1])]), made, Console())
    assert chosen is not None
    assert chosen.tolist() == list(range(401))
    # Of 20,000 classes the 5,000 images that are looked at are hardly two of any.
    assert recorder.monitored_ids(torch.arange(20_000).repeat_interleave(30), made, Console()) is None
    assert "among 5,000 no class has more than" in capsys.readouterr().out
