"""Fine-tuning: choice of labels, modes, rates, the loop and what it leaves behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.layers import LayerNorm
from timm.loss import SoftTargetCrossEntropy
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from manyviews import cli
from manyviews.config import load
from manyviews.data import Folder, select
from manyviews.data.images import Pictures
from manyviews.evaluators.confusion import confusion, confusion_picture, mistakes_picture, worst
from manyviews.evaluators.results.intervals import wilson
from manyviews.features.backbone import open_model, open_run
from manyviews.run.folder import read_metrics
from manyviews.system.console import Console
from manyviews.system.launch import start
from manyviews.train.finetune import FinetuneSettings, classifier, finetune, loop
from manyviews.train.finetune import folder as folder_module
from manyviews.train.finetune import result as results
from manyviews.train.finetune.classifier import (
    Probe,
    create_optimiser,
    fit_probe,
    freeze,
    set_classes,
    set_head,
    train_mode,
)
from manyviews.train.finetune.folder import describe
from manyviews.train.finetune.loop import Average, draws_of
from manyviews.train.finetune.task import task_of
from manyviews.train.not_finite import Guard
from manyviews.views import StandardView
from processes import launched
from stopped_runs import newest, stop_after, tensors

CLASSES = ("dark", "light", "striped")
SHORT = [
    "epochs=1",
    "min_steps=6",
    "batch_size=12",
    "precision=fp32",
    "threads=1",
    "workers=0",
    "log_every=1",
    "checks=3",
]
TINY = "tiny_without_batch_norm"


class Tiny(nn.Module):
    """A timm model without batch norm, for what batch statistics would blur."""

    def __init__(self, *, in_chans: int = 3, num_classes: int = 10, **_: Any) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 16
        self.stem = nn.Conv2d(in_chans, 16, 4, 4)
        self.norm = LayerNorm(16)
        self.head = nn.Linear(16, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(torch.relu(self.stem(x)).mean((2, 3))))
        return output

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(16, num_classes)


default_cfgs = generate_default_cfgs(
    {
        f"{TINY}.untrained": {
            "input_size": (1, 20, 20),
            "mean": (0.4,),
            "std": (0.2,),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 10,
            "first_conv": "stem",
            "classifier": "head",
        }
    }
)


@register_model
def tiny_without_batch_norm(pretrained: bool = False, **options: Any) -> nn.Module:
    return build_model_with_cfg(Tiny, TINY, pretrained, **options)


def draw(folder: Path, each: int = 20, side: int = 20) -> Path:
    """Three classes of noisy grey pictures."""
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            noise = np.random.default_rng([number, index]).integers(0, 90, (side, side))
            base = (20, 130, 20 + 110 * (np.arange(side) // 2 % 2))[number]
            Image.fromarray((noise + base).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("images") / "pictures")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    words = ["quickstart", f"data={images}", "data.channels=1", "data.size=20", "train.batch_size=16", "train.epochs=1"]
    words += ["train.precision=fp32", "train.preview=0", "train.monitor=0", "train.threads=1", f"output={folder}"]
    assert cli.pretrain(words) == 0
    return folder


def settings(output: Path, *words: str) -> FinetuneSettings:
    given = {word.split("=")[0] for word in words}
    kept = [word for word in SHORT if word.split("=")[0] not in given]
    return load(FinetuneSettings, None, [*kept, *words, f"output={output}"])


@pytest.fixture(scope="module")
def tuned(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["min_steps=30", "rate=0.01", "held_out=0.25"]
    return finetune(str(run), settings(tmp_path_factory.mktemp("tuned") / "folder", *words), header="# a command\n")


def content(folder: Path) -> dict[str, Tensor]:
    found = newest(folder)
    assert found.parts.keys() - {"probe"} == {"model", "average", "best"}
    return tensors(found) | {"best": torch.tensor([found.metadata["best_step"], found.metadata["best_accuracy"]])}


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


# What is left behind


def test_a_classifier_is_no_run_and_its_features_are_extracted_from_its_own_folder(tuned: Path) -> None:
    with pytest.raises(ValueError, match="fine-tuned classifier, not a run"):
        open_run(tuned)
    assert open_model(f"local-dir:{tuned / 'classifier'}", pretrained=True).channels == 1


def test_the_classifier_is_timms_own_and_predicts_what_the_result_says(tuned: Path, images: Path) -> None:
    described = json.loads((tuned / "classifier" / "config.json").read_text())
    assert described["label_names"] == list(CLASSES)
    model = timm.create_model(f"local-dir:{tuned / 'classifier'}", pretrained=True).eval()
    test = Folder(path=str(images), channels=1, size=20).build().test
    assert test is not None
    with torch.inference_mode():
        predictions = model(StandardView(20, 1)(Pictures((test.read(torch.arange(len(test))),)))).argmax(1)
    found = result(tuned)
    assert found["confusion"] == confusion_matrix(test.labels, predictions, labels=range(3)).tolist()
    right = int((predictions == test.labels).sum())
    assert found["accuracy"] == right / len(test)
    assert found["interval"] == list(wilson(right, len(test)))
    assert found["images"] == {"labelled": 54, "trained": 39, "held_out": 15, "test": 6}
    assert found["command"] == "a command"
    assert found["best_step"] in {0, 10, 20, 30}


def test_the_folder_is_a_finished_run_with_its_pictures_on_disk_and_in_tensorboard(
    tuned: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {path.relative_to(tuned).as_posix() for path in tuned.rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "result.json", "confusion.png", "mistakes.png", "done"} <= there
    assert (tuned / "config.yaml").read_text().startswith("# a command\n")
    events = EventAccumulator(str(tuned / "tensorboard"))
    events.Reload()
    assert {"confusion", "mistakes"} <= set(events.Tags()["images"])
    assert {"loss", "held_out", "rate"} <= set(events.Tags()["scalars"])
    with pytest.raises(ValueError, match="resume=true"):
        finetune(str(run), settings(tuned))
    assert finetune(str(run), load(FinetuneSettings, tuned / "config.yaml", ["resume=true"])) == tuned
    assert "is finished" in capsys.readouterr().out


def test_the_kept_weights_are_the_best_of_the_held_out_part_the_later_of_equals(tuned: Path) -> None:
    measured = [(line["held_out"], line["step"]) for line in read_metrics(tuned) if "held_out" in line]
    assert [step for _, step in measured] == [0, 10, 20, 30]
    first = measured[0]
    # The probe only gives way to what is better.
    better = [pair for pair in measured if pair[0] > first[0]]
    assert (result(tuned)["best_accuracy"], result(tuned)["best_step"]) == max(better, default=first)
    state = timm.create_model(f"local-dir:{tuned / 'classifier'}", pretrained=True).state_dict()
    assert all(torch.equal(value, content(tuned)[f"best.{key}"]) for key, value in state.items())


def test_other_test_labels_change_nothing_of_what_is_learned(tmp_path: Path, run: Path) -> None:
    pixels = draw(tmp_path / "data" / "train", each=8)
    for name in CLASSES:
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        Image.open(pixels / name / "0.png").save(tmp_path / "data" / "test" / name / "0.png")
    words = [f"data={tmp_path / 'data'}", "data.channels=1", "data.size=20", "min_steps=3"]
    first = finetune(str(run), settings(tmp_path / "first", *words))
    held = tmp_path / "data" / "test"
    (held / "dark").rename(held / "x")
    (held / "light").rename(held / "dark")
    (held / "x").rename(held / "light")
    second = finetune(str(run), settings(tmp_path / "second", *words))
    assert all(torch.equal(value, content(second)[key]) for key, value in content(first).items())
    assert result(first)["accuracy"] != result(second)["accuracy"]


# Going on


@pytest.mark.parametrize(
    "words",
    [
        ["mixup=0.4", "cutmix=0.5", "mode=full"],
        ["mode=last_blocks", "blocks=2", "drop_path=0.0", "ema=0"],
    ],
    ids=["mixing and averaging", "a part of the network"],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    straight = finetune(str(run), settings(tmp_path / "straight", *words))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit) as ended:
            finetune(str(run), settings(tmp_path / "stopped", *words))
        assert ended.value.code == 128 + 15
    assert not (tmp_path / "stopped" / "done").exists()
    # From a command line: what the run was started with stands in its folder.
    np.random.seed(5)
    assert cli.finetune([str(run), "resume=true", f"output={tmp_path / 'stopped'}"]) == 0
    one, two = content(straight), content(tmp_path / "stopped")
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    check_same_record(straight, tmp_path / "stopped")


def check_same_record(one: Path, two: Path) -> None:
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
    results = [{**result(folder), "seconds": 0, "command": ""} for folder in (one, two)]
    assert results[0] == results[1]


# Lines of metrics are of the steps 4, 8 and 10, checks of 5 and 10.
IN_PARTS = ["min_steps=10", "log_every=4", "checks=2", "mixup=0.4", "drop_path=0.0"]


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(str(run), settings(tmp_path_factory.mktemp("whole") / "folder", *IN_PARTS))


@pytest.mark.parametrize("stopped", [0, 2, 4, 5, 9])
def test_metrics_and_result_are_the_same_wherever_it_was_stopped(
    tmp_path: Path, run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    words = [*IN_PARTS, "save_minutes=1000"]
    with monkeypatch.context() as patch:
        stop_after(patch, stopped)
        with pytest.raises(SystemExit):
            finetune(str(run), settings(tmp_path / "stopped", *words))
    finetune(str(run), settings(tmp_path / "stopped", *words, "resume=true"))
    check_same_record(whole, tmp_path / "stopped")
    one, two = content(whole), content(tmp_path / "stopped")
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def test_a_run_that_was_killed_after_its_last_checkpoint_ends_with_the_same_record(
    tmp_path: Path, run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "measure", killed)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(str(run), settings(tmp_path / "killed", *IN_PARTS))
    # The probe is read from the checkpoint, not fitted again.
    monkeypatch.setattr(loop, "fitted_probe", killed)
    finetune(str(run), settings(tmp_path / "killed", *IN_PARTS, "resume=true"))
    check_same_record(whole, tmp_path / "killed")


def test_a_start_that_was_killed_before_its_first_checkpoint_leaves_no_line_twice(
    tmp_path: Path, run: Path, whole: Path
) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    shutil.copy(whole / "config.yaml", folder)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]))
    finetune(str(run), settings(folder, *IN_PARTS, "resume=true"))
    check_same_record(whole, folder)


@pytest.mark.parametrize("words", [["epochs=3"], ["min_steps=11"], ["minutes=1"], ["rate=0.1"]])
def test_a_finished_or_unfinished_run_is_not_gone_on_with_by_another_budget_or_rate(
    run: Path, whole: Path, words: list[str]
) -> None:
    key = words[0].split("=")[0]
    given = [word for word in IN_PARTS if not word.startswith(key)]
    with pytest.raises(ValueError, match=f"{key} was"):
        finetune(str(run), settings(whole, *given, *words, "resume=true"))


def test_a_run_does_not_go_on_with_other_settings_or_weights(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 2)
    with pytest.raises(SystemExit):
        finetune(str(run), settings(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"mode was linear_then_full and is full"):
        finetune(str(run), settings(tmp_path / "run", "mode=full", "resume=true"))
    other = tmp_path / "other"
    shutil.copytree(run, other)
    weights = load_file(other / "backbone" / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, other / "backbone" / "model.safetensors")
    with pytest.raises(ValueError, match="other weights than the run was started with"):
        finetune(str(other), settings(tmp_path / "run", "resume=true"))


def test_draws_are_keyed_by_the_step_and_leave_numpys_generator_where_it_was() -> None:
    np.random.seed(1)
    expected = np.random.get_state()[1]
    found = []
    for step in (7, 8, 7):
        with draws_of(3, step):
            found.append((np.random.rand(), torch.rand(1).item()))
    assert found[0] == found[2] != found[1]
    assert np.array_equal(np.random.get_state()[1], expected)


@pytest.mark.parametrize("ema", [0.5, 0.9999])
def test_the_average_begins_at_the_first_step_and_gets_longer_up_to_its_decay(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, ema: float
) -> None:
    decays: list[float] = []
    apply = Average.apply_update_

    def noted(self: Average, model: nn.Module, decay: float) -> None:
        decays.append(decay)
        apply(self, model, decay)

    monkeypatch.setattr(Average, "apply_update_", noted)
    finetune(str(run), settings(tmp_path / "tuned", f"ema={ema}", "min_steps=12"))
    # timm's warm-up, gamma = 1 and power = 2/3, in steps after the first.
    assert decays == pytest.approx([min(ema, 1 - (1 + step) ** (-2 / 3)) for step in range(12)])


def test_a_step_whose_loss_is_not_finite_is_skipped_counted_and_leaves_no_trace(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, forward, seen = [*IN_PARTS, "log_every=1", "mode=full"], SoftTargetCrossEntropy.forward, []

    def spoiled(self: SoftTargetCrossEntropy, *inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return forward(self, *inputs) * (torch.nan if len(seen) == 4 else 1)

    begin, skip, same = Guard.__init__, Guard.skip, []
    before: list[tuple[Tensor, Tensor]] = []

    def begun(self: Guard, accelerator: Any, optimiser: Any, modules: Any, model: Any) -> None:
        begin(self, accelerator, optimiser, modules, model)
        before[:] = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def skipped(self: Guard, *known: Any) -> Any:
        found = skip(self, *known)
        same.append(all(torch.equal(buffer, value) for buffer, value in before))
        return found

    monkeypatch.setattr(SoftTargetCrossEntropy, "forward", spoiled)
    monkeypatch.setattr(Guard, "__init__", begun)
    monkeypatch.setattr(Guard, "skip", skipped)
    given = [word for word in words if word != "log_every=4"]
    folder = finetune(str(run), settings(tmp_path / "tuned", *given))
    lines = [(line["step"], line["skipped"]) for line in read_metrics(folder) if "loss" in line]
    assert lines == [(step, int(step > 4)) for step in range(1, 11) if step != 4]
    assert same == [True]
    assert "step 4 was skipped: the loss (loss) and the gradient of model." in " ".join(capsys.readouterr().out.split())
    assert all(torch.isfinite(value).all() for key, value in content(folder).items() if value.is_floating_point())


# Several processes


def learn(images: str, output: str, words: tuple[str, ...]) -> None:
    finetune(TINY, settings(Path(output), *tiny_words(images), *words))


def tiny_words(images: str) -> list[str]:
    return [f"data={images}", "data.channels=1", "data.size=20", "pretrained=false"]


def test_two_processes_learn_what_one_does(tmp_path: Path, images: Path) -> None:
    words = ("rate=0.01", "fraction=0.5", "mixup=0")
    launched(learn, str(images), str(tmp_path / "two"), words)
    finetune(TINY, settings(tmp_path / "one", *tiny_words(str(images)), *words))
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    first, second = result(tmp_path / "one"), result(tmp_path / "two")
    assert first["confusion"] == second["confusion"]
    assert first["images"] == second["images"]
    losses = [[line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# The task


def chosen(run: Path, *words: str) -> tuple[set[str], set[str]]:
    """Names of the images that are trained on and that are held out."""
    task = task_of(settings(Path("unused"), *words), open_model(str(run)), 1, Console(quiet=True))
    return set(task.images.names), {task.split.train.names[index] for index in task.held_out.tolist()}


def test_a_smaller_fraction_is_a_part_of_a_larger_one_of_every_class_alike(run: Path) -> None:
    whole = set.union(*chosen(run))
    part = set.union(*chosen(run, "fraction=0.5"))
    few = set.union(*chosen(run, "fraction=0.01"))
    assert few < part < whole
    assert [len(names) for names in (few, part, whole)] == [3, 27, 54]
    assert {name.partition("/")[0] for name in few} == set(CLASSES)
    assert set.union(*chosen(run, "fraction=0.5", "seed=1")) != part


def test_held_out_images_are_not_trained_on_and_one_label_of_each_class_leaves_none(run: Path) -> None:
    kept, held = chosen(run, "held_out=0.25")
    assert not kept & held
    assert [sum(name.startswith(label) for name in held) for label in CLASSES] == [5, 5, 5]
    assert chosen(run, "held_out=0")[1] == set()
    assert chosen(run, "fraction=0.01", "held_out=0.5") == (chosen(run, "fraction=0.01")[0], set())


def test_one_label_of_each_class_trains_to_the_last_step_and_says_so(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finetune(str(run), settings(tmp_path / "few", "fraction=0.01", "mode=full"))
    found = result(folder)
    assert found["images"]["trained"] == 3
    assert found["best_accuracy"] is None
    assert found["best_step"] == found["step"] == 6
    assert "too few labels of each class" in capsys.readouterr().out


def test_scratch_is_the_same_network_with_random_weights_that_follow_from_the_seed(tmp_path: Path, run: Path) -> None:
    words = ["mode=full", "rate=1e-12", "ema=0", "min_steps=1", "epochs=0.01", "checks=1"]
    keys = {}
    for name, extra in (("learned", []), ("scratch", ["scratch=true"]), ("other", ["scratch=true", "seed=1"])):
        keys[name] = content(finetune(str(run), settings(tmp_path / name, *words, *extra)))
    learned = load_file(run / "backbone" / "model.safetensors")
    convolution = "stages.0.0.0.weight"
    torch.testing.assert_close(keys["learned"][f"model.{convolution}"], learned[convolution])
    assert not torch.allclose(keys["scratch"][f"model.{convolution}"], learned[convolution], atol=1e-6)
    assert not torch.equal(keys["scratch"][f"model.{convolution}"], keys["other"][f"model.{convolution}"])
    probe = {"probe.weights", "probe.biases"}
    assert keys["scratch"].keys() == keys["learned"].keys() - probe


# Beside the probe


def test_weights_that_training_destroys_give_way_to_the_probe_and_that_is_said(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rate=3", "warmup_steps=0", "ema=0", "held_out=0.25"]
    folder = finetune(str(run), settings(tmp_path / "destroyed", *words))
    found, measured = result(folder), {line["step"]: line.get("held_out") for line in read_metrics(folder)}
    assert found["best_step"] == 0
    assert found["best_accuracy"] == found["probe"]["held_out_accuracy"] == measured[0] > 1 / 3
    assert found["accuracy"] == found["probe"]["accuracy"]
    assert ["the classifier is the probe" in line for line in found["remarks"]] == [True]
    said = capsys.readouterr().out
    assert found["remarks"][0] in said
    assert f"probe      {100 * found['best_accuracy']:.1f} % of the held-out images" in said
    # It is the backbone as it was pretrained.
    state, before = (
        load_file(folder / "classifier" / "model.safetensors"),
        load_file(run / "backbone/model.safetensors"),
    )
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_under_a_random_head_the_probe_stands_beside_the_result_too(tmp_path: Path, run: Path) -> None:
    words = ["mode=full", "rate=1e-9", "held_out=0.25"]
    found = result(finetune(str(run), settings(tmp_path / "random", *words)))
    assert found["best_accuracy"] < found["probe"]["held_out_accuracy"]
    assert any("mode=linear_then_full begins from it" in line for line in found["remarks"])
    assert found["best_step"] > 0


def test_remarks_are_made_where_the_probe_is_not_worse_and_only_there() -> None:
    def of(best: float | None, held: float | None, accuracy: float, probed: float) -> list[str]:
        record = {"best_accuracy": best, "accuracy": accuracy, "probe": {"held_out_accuracy": held, "accuracy": probed}}
        return results.remarks(record, is_probe=False, begins_as_probe=True)

    assert of(0.8, 0.7, 0.9, 0.9) == []
    assert of(None, None, 0.9, 0.8) == []
    assert ["held-out" in line for line in of(0.7, 0.7, 0.9, 0.8)] == [True]
    assert ["test images (80.0 % and 90.0 %)" in line for line in of(None, None, 0.8, 0.9)] == [True]
    assert results.remarks({"best_accuracy": 0.1}, is_probe=False, begins_as_probe=False) == []


def test_a_short_run_rises_to_a_part_of_the_rate_and_one_under_a_random_head_to_all_of_it(
    tmp_path: Path, run: Path
) -> None:
    rates = {}
    for mode in ("linear_then_full", "full"):
        folder = finetune(str(run), settings(tmp_path / mode, f"mode={mode}", "rate=0.01", "warmup=0.5"))
        rates[mode] = [line["rate"] for line in read_metrics(folder) if "rate" in line]
    assert rates["linear_then_full"][:3] == pytest.approx([0.01 * (step + 0.5) / 100 for step in range(3)])
    assert rates["full"][:3] == pytest.approx([0.01 * (step + 0.5) / 3 for step in range(3)])


# Budgets and what fails before the first step


@pytest.mark.parametrize("words", [["epochs=0.1", "min_steps=0"], ["minutes=1e-9"]])
def test_a_budget_of_less_than_a_step_takes_one(tmp_path: Path, run: Path, words: list[str]) -> None:
    found = result(finetune(str(run), settings(tmp_path / "short", *words)))
    assert found["step"] == 1


def test_what_fails_before_the_first_step_leaves_no_folder_that_blocks_the_same_words(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Tensor:
        raise ValueError("no step can be taken")

    folder = tmp_path / "failed"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "model_input", fails)
        with pytest.raises(ValueError, match="no step"):
            finetune(str(run), settings(folder))
    assert not folder.exists()
    assert finetune(str(run), settings(folder)) == folder


@pytest.mark.parametrize(
    "word", ["epochs=0", "epochs=1e308", "min_steps=-1", "checks=0", "log_every=0", "warmup=1", "warmup_steps=-1"]
)
def test_a_budget_out_of_bounds_is_refused_with_the_bound(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert cli.finetune([str(run), word, f"output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {word.split('=')[0]}=")
    assert "1" in error or "0" in error
    assert not (tmp_path / "out").exists()


def test_random_weights_are_called_so_and_a_class_without_training_images_is_told(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_of(settings(tmp_path, *tiny_words(str(images))), open_model(TINY, pretrained=False), 1, Console())
    fewer = task._replace(images=select(task.split.train, (task.split.train.labels != 1).nonzero().flatten()))
    describe(fewer, Tiny(), None, start(None, "fp32", 1), tmp_path, Console())
    said = capsys.readouterr().out
    assert f"{TINY}, random weights" in said
    assert "1 of 3 classes have no image to train on" in said


def test_many_classes_have_their_confusion_listed_and_a_picture_that_fails_takes_nothing_from_the_result(
    tmp_path: Path, run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> Tensor:
        raise UnicodeError("no such letter")

    monkeypatch.setattr(results, "MOST_SQUARED", 2)
    monkeypatch.setattr(results, "mistakes_picture", fails)
    found = result(finetune(str(run), settings(tmp_path / "many", *IN_PARTS)))
    matrix = np.zeros((3, 3), int)
    for true, taken, count in found.pop("confusion_pairs"):
        matrix[true, taken] = count
    assert matrix.tolist() == result(whole)["confusion"]
    said = capsys.readouterr().out
    assert "a picture could not be drawn (UnicodeError: no such letter)" in said
    assert "finished" in said


@pytest.mark.parametrize(("most", "warned"), [(2, True), (3, False)])
def test_a_probe_that_is_cut_off_for_its_many_classes_is_warned_of(
    tmp_path: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    most: int,
    warned: bool,
) -> None:
    monkeypatch.setattr("manyviews.evaluators.logistic.MOST_CLASSES_SOLVED", most)
    finetune(str(run), settings(tmp_path / "tuned"))
    said = " ".join(capsys.readouterr().out.split())
    assert ("With 3 classes each fit of the probe ends after 20 steps" in said) == warned


# The classifier


def test_the_head_starts_as_scikit_learns_logistic_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 16, generator=generator) * 3 + 5 + labels[:, None] * torch.arange(16) / 8
    features[:, 3] = 2.5
    model = Tiny(num_classes=3)
    set_head(model, fit_probe(features, labels, None, labels[:0], 3))
    scaled = (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-4)
    oracle = LogisticRegression(C=1 / (0.1 * 60), tol=1e-8, max_iter=2000).fit(scaled.numpy(), labels.numpy())
    found = model.head(features).softmax(1).detach().numpy()
    assert np.abs(found - oracle.predict_proba(scaled.numpy())).max() < 5e-3


def test_the_strength_of_the_head_is_the_best_for_the_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.randn(80, 16, generator=generator) + labels.repeat(2)[:, None] * 0.4
    hits = {}
    for strength in (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3):
        oracle = LogisticRegression(C=1 / (strength * 40), tol=1e-8, max_iter=5000)
        mean, deviation = features[:40].mean(0), features[:40].std(0, correction=0)
        oracle.fit(((features[:40] - mean) / deviation).numpy(), labels.numpy())
        hits[strength] = (oracle.predict(((features[40:] - mean) / deviation).numpy()) == labels.numpy()).sum()
    model, done = Tiny(num_classes=2), []
    probe = fit_probe(features[:40], labels, features[40:], labels, 2, lambda *numbers: done.append(numbers))
    set_head(model, probe)
    assert (model.head(features[40:]).argmax(1) == labels).sum() == max(hits.values())
    assert probe.held_out == max(hits.values()) / 40
    assert probe.regularisation in hits
    assert done == [(1, 1)]
    # One strength after the other, as with many classes, ends at the same one of them.
    monkeypatch.setattr(classifier, "MOST_LOGITS", 1)
    done.clear()
    path = fit_probe(features[:40], labels, features[40:], labels, 2, lambda *numbers: done.append(numbers))
    assert path.held_out == probe.held_out
    assert path.regularisation == probe.regularisation
    assert [number for number, _ in done] == list(range(1, len(done) + 1))
    # Both are as near to the minimum as is said.
    torch.testing.assert_close(path.logits(features).softmax(1), probe.logits(features).softmax(1), atol=0.05, rtol=0)


def test_a_head_that_is_no_linear_layer_on_the_features_is_refused() -> None:
    with pytest.raises(ValueError, match="use mode=full"):
        set_head(Tiny(num_classes=3), Probe(torch.zeros(3, 17), torch.zeros(3), 0.1, None))


@pytest.mark.parametrize(
    ("name", "stem", "last"),
    [
        ("light_resnet", "stem.0.weight", "stages.1.1.conv.weight"),
        ("resnet18_small", "conv1.weight", "layer4.1.conv2.weight"),
        ("vit_tiny_patch16_224", "patch_embed.proj.weight", "blocks.11.mlp.fc2.weight"),
    ],
)
def test_each_layer_moves_at_its_share_of_the_rate_and_blocks_are_counted_from_the_head(
    name: str, stem: str, last: str
) -> None:
    model = timm.create_model(name, num_classes=0)
    set_classes(model, 7)
    optimiser = create_optimiser(model, rate=0.1, weight_decay=0.05, layer_decay=0.5)
    peaks = {id(parameter): group["peak_rate"] for group in optimiser.param_groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert len(peaks) == len(named)
    head = model.get_classifier()
    assert peaks[id(head.weight)] == peaks[id(head.bias)] == 0.1
    assert peaks[id(named[last])] == pytest.approx(0.05)
    assert peaks[id(named[stem])] == min(peaks.values()) < 0.01
    decays = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert all((decays[id(p)] == 0) == (p.ndim <= 1 or key in {"pos_embed", "cls_token"}) for key, p in named.items())
    freeze(model, 1)
    moving = {key for key, parameter in named.items() if parameter.requires_grad}
    assert last in moving
    assert stem not in moving
    assert {key for key in named if named[key] is head.weight} <= moving
    freeze(model, 0)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(head.weight), id(head.bias)}
    with pytest.raises(ValueError, match="layers below its head"):
        freeze(model, 99)


def test_what_is_frozen_stays_as_it_was_statistics_included(tmp_path: Path, run: Path) -> None:
    folder = finetune(str(run), settings(tmp_path / "last", "mode=last_blocks", "blocks=1", "rate=0.1", "ema=0"))
    before, after = load_file(run / "backbone" / "model.safetensors"), content(folder)
    same = {key for key, value in before.items() if torch.equal(value, after[f"model.{key}"])}
    moved = {key for key in before if key.startswith("stages.1.1.")}
    assert before.keys() - same == moved
    model = timm.create_model("light_resnet", num_classes=3)
    freeze(model, 1)
    train_mode(model)
    assert not model.stem[1].training
    assert model.stages[1][1].norm.training


def test_what_is_measured_is_the_average_and_without_one_the_weights(tmp_path: Path, run: Path) -> None:
    averaged = content(finetune(str(run), settings(tmp_path / "averaged", "ema=0.9")))
    plainly = content(finetune(str(run), settings(tmp_path / "plain", "ema=0")))
    names = [key.removeprefix("model.") for key in plainly if key.startswith("model.")]
    assert all(torch.equal(plainly[f"model.{name}"], plainly[f"average.{name}"]) for name in names)
    assert not torch.equal(averaged["model.head.weight"], averaged["average.head.weight"])
    assert not torch.equal(averaged["model.stem.1.running_mean"], averaged["average.stem.1.running_mean"])


def test_training_and_measuring_show_a_timm_model_the_same_input(images: Path) -> None:
    from manyviews.train.finetune.task import model_input
    from manyviews.views import ViewsSettings

    opened = open_model(TINY, pretrained=False)
    pixels = Folder(path=str(images), channels=1, size=20).build().train.read(torch.arange(4))
    still = ViewsSettings(num_views=1, flip=0, crop_scale=(1, 1), crop_ratio=(1, 1), brightness=0, contrast=0, gamma=0)
    views = still.build(size=20, channels=1, seed=0)(pixels, torch.arange(4), 0)[0][0]
    torch.testing.assert_close(model_input(opened, views), opened.view(Pictures((pixels,))), rtol=1e-4, atol=1e-4)


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mode=linear_then_ful"], "linear_then_full"),
        (["blocks=3"], "blocks=3 is for mode=last_blocks"),
        (["mode=last_blocks", "blocks=30"], "layers below its head"),
        (["fraction=0"], "fraction=0"),
        (["pretrained=true"], "leave it out"),
        (["data=/no/such/place"], "/no/such/place"),
        (["rate=1e30", "label_smoothing=0", "min_steps=40", "checks=1"], "with a lower rate or precision=fp32"),
        (["rate=1e30", "label_smoothing=0"], "the backbone has diverged"),
    ],
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = {word.split("=")[0] for word in words}
    kept = [word for word in SHORT if word.split("=")[0] not in given]
    assert cli.finetune([str(run), *kept, *words, f"output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert (tmp_path / "out").exists() == ("rate=1e30" in words)


def test_images_without_labels_of_one_class_or_in_colour_are_refused(tmp_path: Path, run: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for index in range(4):
        Image.fromarray(np.full((20, 20), 60 * index, np.uint8)).save(flat / f"{index}.png")
    grey = [f"data={flat}", "data.channels=1", "data.size=20"]
    with pytest.raises(ValueError, match=r"no labels.*data.labels=labels.csv"):
        finetune(str(run), settings(tmp_path / "out", *grey))
    table = tmp_path / "labels.csv"
    table.write_text("name,label\n0.png,cat\n1.png,cat\n2.png,cat\n")
    with pytest.raises(ValueError, match="of one class, cat"):
        finetune(str(run), settings(tmp_path / "out", *grey, f"data.labels={table}"))
    with pytest.raises(ValueError, match=r"3 channels.*data.channels=1"):
        finetune(str(run), settings(tmp_path / "out", f"data={flat}", "data.size=20"))
    with pytest.raises(ValueError, match="pretrained=true"):
        finetune("resnet18", settings(tmp_path / "out", *grey))
    assert not (tmp_path / "out").exists()


def test_labels_of_a_table_train_a_classifier_with_their_names(tmp_path: Path, run: Path, images: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    lines = ["name,label"]
    for index, name in enumerate(("light", "dark") * 10):
        shutil.copy(images / name / f"{index // 2}.png", flat / f"{index}.png")
        lines += [f"{index}.png,{'day' if name == 'light' else 'night'}"] if index < 16 else []
    (flat / "labels.csv").write_text("\n".join(lines))
    words = [f"data={flat}", f"data.labels={flat / 'labels.csv'}", "data.channels=1", "data.size=20", "batch_size=8"]
    found = result(finetune(str(run), settings(tmp_path / "out", *words)))
    assert found["classes"] == ["day", "night"]
    assert found["images"] == {"labelled": 14, "trained": 12, "held_out": 2, "test": 2}


# Numbers and pictures


def test_confusion_counts_and_the_worst_mistakes_are_what_scikit_learn_and_a_loop_find() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 5, generator=generator), torch.randint(5, (200,), generator=generator)
    predictions = logits.argmax(1)
    assert confusion(labels, predictions, 6).tolist() == confusion_matrix(labels, predictions, labels=range(6)).tolist()
    places, sure = worst(logits, labels, 7)
    slow = sorted((-logits[i].softmax(0).max().item(), i) for i in range(200) if predictions[i] != labels[i])[:7]
    assert places.tolist() == [place for _, place in slow]
    assert sure.tolist() == pytest.approx([-probability for probability, _ in slow])


@pytest.mark.parametrize("classes", [2, 30, 100])
def test_pictures_are_drawn_for_any_number_of_classes_and_any_names(classes: int) -> None:
    names = [f"$name_{number} with a long tail of words" for number in range(classes)]
    picture = confusion_picture(torch.eye(classes, dtype=torch.int64), names)
    assert picture.shape[0] == 3
    assert picture.float().std() > 0
    for count, channels in ((0, 1), (1, 3), (7, 1)):
        drawn = mistakes_picture(torch.zeros(count, channels, 8, 8, dtype=torch.uint8), [(names[0], names[1])] * count)
        assert drawn.dtype == torch.uint8


def test_the_classifier_is_measured_in_full_precision_whatever_it_was_trained_in(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[nn.Module] = []
    monkeypatch.setattr(loop, "measure", lambda model, *_: seen.append(model))
    short = [word for word in SHORT if not word.startswith("precision")]
    words = [f"data={images}", "data.size=20", "data.channels=1", "views.size=20", "pretrained=false", *short]
    finetune(TINY, load(FinetuneSettings, None, [*words, "precision=bf16", f"output={tmp_path / 'bf16'}"]))
    inputs = torch.rand(4, 1, 20, 20)
    with torch.inference_mode():
        measured = seen[0](inputs)
    again = tiny_without_batch_norm(in_chans=1, num_classes=3).eval()
    again.load_state_dict(seen[0].state_dict())
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured, again(inputs), atol=1e-5, rtol=0)


def test_with_a_budget_in_minutes_the_last_weights_are_looked_at_too(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(folder_module, "accuracy_of", lambda model, task: looked.append(len(looked)) or 0.5)
    # The budget ends between two steps, and no share of it is reached at the end of one.
    words = [f"data={images}", "data.size=20", "data.channels=1", "views.size=20", "pretrained=false", *SHORT]
    words = [word for word in words if not word.startswith(("epochs", "min_steps", "checks"))]
    words += ["mode=full", "minutes=0.01", "checks=1", f"output={tmp_path / 'short'}"]
    finetune(TINY, load(FinetuneSettings, None, words))
    metadata = json.loads((tmp_path / "short" / "result.json").read_text())
    assert looked
    assert metadata["best_step"] == metadata["step"]


def test_a_folder_whose_fine_tuning_was_interrupted_is_no_run(images: Path, tmp_path: Path) -> None:
    words = [f"data={images}", "data.size=20", "data.channels=1", "views.size=20", "pretrained=false", *SHORT]
    finetune(TINY, load(FinetuneSettings, None, [*words, f"output={tmp_path / 'begun'}"]))
    for file in (tmp_path / "begun" / "classifier").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="is a fine-tuned classifier, not a run"):
        open_run(tmp_path / "begun")
