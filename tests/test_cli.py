"""The command lines, as a person types them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from manyviews import cli
from manyviews.data import Sample
from manyviews.data.images import Pictures
from manyviews.linear_metrics import LinearMetric
from manyviews.views import StandardView
from recorded import measured, recorded, values

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHORT = [
    "train.batch_size=32",
    "train.epochs=0.0064",
    "train.precision=fp32",
    "train.preview=2",
    "train.monitor=0",
    "train.threads=1",
]
# One regularisation, one map and few labels once, so that all of it costs seconds.
QUICK = [
    "protocol.linear.regularisations=[0.1]",
    "protocol.knn.neighbours=[10]",
    "few.shares=[0.01]",
    "few.shots=[]",
    "few.draws=2",
    "maps=pca",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "short"
    assert cli.pretrain(["quickstart", *SHORT, f"output={folder}"]) == 0
    return folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A folder of two classes that anyone can tell apart."""
    folder = tmp_path / "photographs"
    for name, brightness in (("dark", 40), ("light", 200)):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            pixels = np.random.default_rng(index).integers(brightness, brightness + 40, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def test_help_lists_every_key_once_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.pretrain(["--help"]) == 0
    shown = capsys.readouterr().out
    for key in ("output", "seed", "resume", "train.epochs", "train.minutes", "train.batch_size", "encoder.name"):
        assert shown.count(f"  {key} ") == 1, key
    assert "quickstart, or a path" in shown or "quickstart" in shown
    assert "Images per step over all processes together." in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["simclrr"], "neither a recipe"),
        (["train.epoch=3"], "did you mean train.epochs?"),
        (["lr=0.1"], "did you mean optim.rate?"),
        (["objective=NT-Xent"], "NT-Xent (InfoNCE) is objective=in_batch, as in recipe simclr"),
        (["objective.alpha=0.1"], "objective.margin belongs to objective=contrastive or triplet or margin"),
        (["objective=bank", "objective.normaliser=z"], "it must be exact | first_batch | ema | float > 0"),
        (["unseen=Sneaker,Bagg"], "did you mean Bag?"),
        (["objective=moko"], "none of in_batch, cpc, queue, bank"),
        (["train.batch_size=20000"], "10,000 images are fewer than a batch of 20000"),
        (["encoder.name=resnet18_smal"], "resnet18_small"),
        (["data=/no/such/place"], "/no/such/place"),
        (["views.hue=0.1"], "no colours"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert cli.pretrain([*args, f"output={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_while_images_are_read_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = signal.Signals[name]

    def interrupted(*arguments: object, **options: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(Sample, "build", interrupted)
    assert cli.pretrain(["quickstart", f"output={tmp_path / 'run'}"]) == 128 + number
    said = capsys.readouterr().err
    assert said.startswith(f"stopped by {name}")
    assert said.endswith("re-run the same command with resume=true to continue\n")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_place_that_may_not_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.pretrain([*SHORT, f"output={tmp_path / 'file' / 'run'}"]) == 2
    assert "file" in capsys.readouterr().err


def test_an_empty_folder_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.pretrain([f"data={tmp_path / 'empty'}", f"output={tmp_path / 'run'}"]) == 2
    assert "no image" in capsys.readouterr().err.lower()


def test_a_folder_of_photographs_with_broken_ones_just_works(
    tmp_path: Path, classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (classes / "dark" / "broken.jpg").write_bytes(b"no image")
    args = [f"data={classes}", "data.size=32", "train.epochs=2", *(word for word in SHORT if "epochs" not in word)]
    assert cli.pretrain([*args, "data.max_bad=0.1", f"output={tmp_path / 'run'}"]) == 0
    assert "broken.jpg" in (tmp_path / "run" / "unreadable.txt").read_text()
    assert cli.evaluate([str(tmp_path / "run")]) == 0
    assert "learned" in capsys.readouterr().out
    report = recorded(tmp_path / "run")
    assert report["tasks"] == ["knn", "linear", "fractions", "geometry"]
    assert cli.pretrain([*args, f"output={tmp_path / 'other'}"]) == 2
    assert "broken.jpg" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.fixture
def unseen(run: Path, tmp_path: Path) -> Path:
    """A run whose recipe says that it left three classes out of training."""
    folder = shutil.copytree(run, tmp_path / "unseen")
    text = (folder / "config.yaml").read_text()
    assert "unseen: []" in text
    (folder / "config.yaml").write_text(text.replace("unseen: []", "unseen: [Sandal, 7, Bag]"))
    return folder


def test_a_run_is_measured_beside_its_baselines_and_by_retrieval_among_unseen_classes(
    unseen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.evaluate([str(unseen), *QUICK, "layer=backbone"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    report = recorded(unseen)
    scores = measured(report, "knn", "linear")
    assert {score["features"] for score in scores} == {"learned", "random weights", "raw pixels"}
    assert {score["task"] for score in scores} == {"knn", "linear"}
    for score in scores:
        assert 0.5 < score["low"] < score["value"] < score["high"] < 1
        assert f"{100 * score['value']:.1f}" in shown
    assert "Retrieval by cosine among 600 test images of 3 classes never seen in training" in shown
    assert "by Recall@1, learned features" in shown
    assert report["gallery"]["names"] == ["Sandal", "Sneaker", "Bag"]
    assert {score["n"] for score in scores} == {2000}
    found = values(report, "retrieval", "MAP@R")
    assert list(found) == ["learned", "random weights", "raw pixels"]
    assert all(f"{100 * value:.1f}" in shown for value in found.values())


def test_tasks_classes_and_a_metric_are_chosen_by_name(unseen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "tasks=clustering,retrieval",
        "layer=backbone",
        "classes=[Sandal, 0, 1]",
        "metric=mahalanobis",
        "data.name=sample",
        "maps=[]",
        "protocol.clustering.restarts=1",
    ]
    assert cli.evaluate([str(unseen), *args, "baselines=false"]) == 0
    report = recorded(unseen)
    assert report["metric"]["name"] == "mahalanobis"
    assert report["tasks"] == ["retrieval", "clustering"]
    assert report["gallery"]["origin"] == "some of them seen in training"
    metric = LinearMetric.load(unseen / "metrics" / "mahalanobis" / "learned.safetensors")
    assert metric.settings["name"] == "mahalanobis"
    assert metric.weights.shape[1] == report["measurements"][0]["dim"]
    assert cli.evaluate([str(unseen), "tasks=clustering", "baselines=false", "classes=null", *args[-2:]]) == 0
    assert "of 3 classes never seen in training" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tasks=retreival"], "did you mean retrieval?"),
        (["tasks=[knn, lineal]"], "did you mean linear?"),
        (["task=knn"], "did you mean tasks?"),
        (["metric=mahalanobs"], "did you mean mahalanobis?"),
        (["tasks=retrieval", "classes=Sneker"], "did you mean Sneaker?"),
        (["tasks=retrieval", "classes=12"], "class 12 is not one of the 10 classes"),
        (["tasks=retrieval", "classes=7"], "name 2 classes or more"),
        (["tasks=verification", "protocol.verification.folds=4000"], "pairs of the same class"),
        (["tasks=retrieval", "metric=mahalanobis", "classes=[0,1,2,3,4,5,6,7,8]"], "leave more classes to it"),
    ],
)
def test_a_mistake_in_what_is_measured_is_one_sentence_before_any_image_is_encoded(
    run: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert cli.evaluate([str(run), *args]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert "encoding" not in shown.out


@pytest.mark.slow
def test_a_run_that_has_not_finished_is_measured_by_its_newest_checkpoint(
    run: Path, tmp_path: Path, classes: Path
) -> None:
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "backbone")
    (unfinished / "done").unlink()
    args = [f"data={classes}", "data.size=28", "data.channels=1"]
    assert cli.evaluate([str(unfinished), *args]) == 0
    assert "checkpoints/step-" in json.loads((unfinished / "evaluation.json").read_text())["weights"]["file"]


def test_images_with_other_channels_than_the_run_are_refused_in_words(
    run: Path, classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.evaluate([str(run), f"data={classes}"]) == 2
    assert "data.channels=1" in capsys.readouterr().err


def test_extracted_features_are_those_of_plain_timm(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "features"
    assert cli.extract([str(run), f"output={output}", "split=test"]) == 0
    features, labels = np.load(output / "backbone.npy"), np.load(output / "labels.npy")
    manifest = json.loads((output / "manifest.json").read_text())
    test = Sample().build().test
    assert test is not None
    assert test.labels is not None
    assert labels.tolist() == test.labels.tolist()
    assert [entry[2] for entry in manifest["images"]] == list(test.names)
    backbone = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True).eval()
    with torch.inference_mode():
        expected = backbone(StandardView(28, 1)(Pictures((test.read(torch.arange(16)),))))
    torch.testing.assert_close(torch.from_numpy(features[:16]), expected, rtol=1e-4, atol=1e-5)
    assert cli.extract([str(run), f"output={output}"]) == 2


def test_features_of_a_folder_without_labels_have_names(run: Path, tmp_path: Path, classes: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (classes / "dark").iterdir():
        shutil.copy(file, flat)
    output = tmp_path / "features"
    args = [str(run), f"data={flat}", "data.size=28", "data.channels=1", f"output={output}"]
    assert cli.extract(args) == 0
    assert np.load(output / "backbone.npy").shape[0] == 20
    assert not (output / "labels.npy").exists()
    assert json.loads((output / "manifest.json").read_text())["images"][2] == ["train", 2, "2.png"]


@pytest.mark.slow
def test_a_run_started_from_the_scripts_folder_stops_at_a_signal_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    args = [word for word in SHORT if "epochs" not in word]
    args = ["quickstart", *args, "train.epochs=3", "train.log_every=1", f"output={folder}"]
    with subprocess.Popen(
        [sys.executable, "pretrain.py", *args],
        cwd=SCRIPTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, shown
    assert "resume=true" in shown
    assert list((folder / "checkpoints").glob("step-*"))
    assert not (folder / "done").exists()
    before = len((folder / "metrics.jsonl").read_text().splitlines())
    shorter = [f"output={folder}", f"train.epochs={(before + 2) / 312}"]
    assert cli.pretrain(["resume=true", *shorter]) == 2
    assert cli.pretrain(["resume=true", "extend=true", *shorter]) == 0
    assert (folder / "done").exists()


def test_the_documented_launch_of_two_cpu_processes_is_two_processes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command_line = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", str(SCRIPTS / "pretrain.py")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*command_line, *SHORT, f"output={folder}"], capture_output=True, text=True, check=False, env=environment
    )
    assert (folder / "done").exists(), done.stderr
    assert "batch 32 (16 on each)" in done.stdout
    assert "2 × cpu" in done.stdout


def test_a_limit_of_threads_is_told_in_a_sentence(
    run: Path,
    tmp_path: Path,
    classes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def limited(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", limited)
    assert cli.extract([str(run), f"data={classes}", "data.channels=1", f"output={tmp_path / 'features'}"]) == 2
    assert capsys.readouterr().err.startswith("error: the system starts no more threads (ulimit -u")


@pytest.mark.parametrize("name", ["lr=0.1", "step=1", "a=b=c,d", "=x"])
def test_a_run_folder_may_have_an_equals_sign_in_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    called: list[object] = []
    monkeypatch.setattr(cli, "check_measured", lambda *_: None)

    def call(given: object, settings: object, **_: object) -> Path:
        called.append(given)
        return tmp_path

    for work in ("evaluate_run", "compare_runs", "extract_features", "finetune_model"):
        monkeypatch.setattr(cli, work, call)
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    for given in (name, f"./{name}", str(tmp_path / name), f"runs/{name}"):
        assert cli.evaluate([given, "tasks=knn"]) == 0
        assert cli.evaluate([given, name, "tasks=knn"]) == 0
        assert cli.extract([given, f"output=features={name}"]) == 0
        assert cli.finetune([given, "epochs=1"]) == 0
        assert called == [Path(given), [Path(given), Path(name)], given, given]
        called.clear()


def test_images_and_a_recipe_may_have_an_equals_sign_in_their_path(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, recipe = shutil.copytree(classes, tmp_path / "k=v"), tmp_path / "lr=0.1.yaml"
    recipe.write_text("objective: {name: in_batch}\n")
    given = [word for word in SHORT if "epochs" not in word and "batch" not in word]
    args = [str(recipe), f"data={data}", "data.size=16", "train.batch_size=8", "train.epochs=1", *given]
    assert cli.pretrain([*args, f"output={tmp_path / 'runs' / 'a=b'}"]) == 0
    assert (tmp_path / "runs" / "a=b" / "done").is_file()
    few = ["epochs=0.5", "min_steps=1", "batch_size=8", "views.size=16", f"output={tmp_path / 'x=y'}"]
    assert cli.finetune([str(tmp_path / "runs" / "a=b"), *few]) == 0
    assert (tmp_path / "x=y" / "done").is_file()
    for mistyped, answer in (
        ([str(tmp_path / "runs" / "a=c")], "a=c is no run folder"),
        (["tasks=knn"], "a run folder comes first"),
        ([str(tmp_path / "runs" / "a=b"), "task=knn"], "did you mean tasks?"),
    ):
        assert cli.evaluate(mistyped) == 2
        assert answer in capsys.readouterr().err


def test_a_setting_is_one_although_a_folder_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("batch_size=64").mkdir()
    assert cli.evaluate(["batch_size=64"]) == 2
    assert "./batch_size=64 names the folder" in capsys.readouterr().err
    assert cli.evaluate(["./batch_size=64"]) == 2
    assert "is no run folder" in capsys.readouterr().err
