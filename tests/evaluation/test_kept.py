"""What evaluations leave in a folder: results are kept beside each other, and shown whatever becomes of files."""

import resource
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyviews import cli
from manyviews.config import load
from manyviews.evaluation import EvaluateSettings, evaluate
from manyviews.evaluation.record import MOST_KEPT, key_of, merge, records_in, tasks_of
from manyviews.evaluation.writing import read, unwritable, write
from manyviews.features.backbone import open_run
from recorded import measured, recorded
from report_findings import findings
from small_run import small_run

GRID = ["protocol.knn.neighbours=[1]", "protocol.linear.regularisations=[0.1]", "layer=backbone"]
QUICK = [*GRID, "baselines=false", "maps=[]"]
BARE = [*QUICK, "report=false", "cache=false"]


def photographs(folder: Path, count: int, classes: int = 3) -> Path:
    """Classes that differ little, so that some images are mistaken."""
    for number in range(classes):
        (folder / f"class_{number}").mkdir(parents=True)
        for index in range(count):
            draw = np.random.default_rng((number, index, count))
            pixels = draw.normal(100 + 12 * number, 60, (28, 28)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class_{number}" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kept")
    small_run(root / "run", f"data={photographs(root / 'own', 12)}", "data.channels=1", "data.holdout=0.4")
    (root / "run" / "done").touch()
    photographs(root / "other", 10)
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "run", tmp_path / "run")


def test_fewer_tasks_other_images_and_another_protocol_keep_what_was_measured(run: Path, made: Path) -> None:
    def evaluated(*args: str) -> dict:
        assert cli.evaluate([str(run), *BARE, *args]) == 0
        return recorded(run)

    first = evaluated("tasks=linear,knn")
    both = evaluated("tasks=retrieval")
    assert both["measurements"][: len(first["measurements"])] == first["measurements"]
    assert both["tasks"] == ["knn", "linear", "retrieval"]
    assert evaluated("tasks=knn")["measurements"] == both["measurements"]
    other = evaluated(f"data={made / 'other'}", "data.channels=1", "data.size=28", "tasks=knn")
    assert other["images"] != first["images"]
    assert other["kept"][0]["measurements"] == both["measurements"]
    seed = evaluated("tasks=linear", "protocol.seed=1")
    assert [tasks_of(record) for record, _ in records_in(seed)] == [["linear"], ["knn"], ["knn", "linear", "retrieval"]]
    back = evaluated("tasks=clustering")
    assert back["tasks"] == ["knn", "linear", "retrieval", "clustering"]
    assert len(back["kept"]) == 2
    whole, outcomes = read(run)
    for record, prefix in records_in(whole):
        for score in measured(record, "knn", "linear", metric="accuracy"):
            name = f"{prefix}predictions/{score['task']}/learned"
            assert score["value"] == pytest.approx(
                (outcomes[name] == outcomes[f"{prefix}labels"]).double().mean().item()
            )


def test_the_report_shows_all_that_is_kept_of_these_images(run: Path, made: Path) -> None:
    args = [word for word in BARE if word != "report=false"]
    assert cli.evaluate([str(run), *args, "tasks=linear"]) == 0
    assert cli.evaluate([str(run), *args, "tasks=linear", "protocol.seed=1"]) == 0
    other = [f"data={made / 'other'}", "data.channels=1", "data.size=28"]
    assert cli.evaluate([str(run), *args, *other, "tasks=geometry"]) == 0
    assert "linear probe" not in (run / "report.html").read_text()
    assert cli.evaluate([str(run), *args, "tasks=knn"]) == 0
    page = (run / "report.html").read_text()
    assert "linear probe" in page
    assert "With protocol.seed=1: Accuracy on" in page


def test_results_of_weights_that_have_gone_on_stay_with_their_step_and_lose_their_images(tmp_path: Path) -> None:
    new = {"weights": {"file": "checkpoints/step-000000020/encoder.safetensors"}, "images": ["a"]}
    new |= {"measurements": []}
    old = {"weights": {"file": "checkpoints/step-000000010/encoder.safetensors"}, "images": ["a"], "measurements": [1]}
    merged, outcomes, dropped = merge(new, {"labels": torch.ones(1)}, old, {"labels": torch.zeros(1)})
    assert merged["kept"] == [old]
    assert (list(outcomes), dropped) == (["labels"], 0)
    kept = [{"weights": new["weights"], "images": [str(number)]} for number in range(MOST_KEPT + 3)]
    before = {f"{key_of(record)}/labels": torch.ones(1) for record in kept}
    merged, outcomes, dropped = merge(new, {}, {**old, "kept": kept}, before)
    assert dropped == 4
    assert merged["kept"] == [old, *kept[: MOST_KEPT - 1]]
    assert len(outcomes) == MOST_KEPT - 1


def test_a_damaged_record_is_set_aside_and_not_lost(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = '{"weights": {}, "scores": [{"method": "knn"}]}'
    for damage in ('{"scores": 1', lists, '{"kept": 7}', '{"weights": {}, "kept": [[]]}'):
        (run / "evaluation.json").write_text(damage)
        assert cli.evaluate([str(run), *BARE, "tasks=knn"]) == 0
        assert "was damaged and has been renamed to evaluation.damaged.json" in " ".join(
            capsys.readouterr().out.split()
        )
        assert (run / "evaluation.damaged.json").read_text() == damage
        assert recorded(run)["tasks"] == ["knn"]


def test_evaluations_at_once_all_keep_their_results(run: Path) -> None:
    settings = load(EvaluateSettings, None, BARE)
    actual = findings(run.parent / "pretended")
    base = {"weights": {"sha256": "0"}, "images": ["0"], "protocol": settings.protocol.model_dump(mode="json")}
    base |= {"metric": {"name": "cosine"}}

    def one(number: int) -> None:
        row = {"task": "geometry", "features": f"kind {number}", "metric": "effective rank", "value": 1.0}
        record = base | {"measurements": [row]}
        outcomes = {f"hits/knn/kind {number}": torch.full((50_000,), number)}
        write(actual, record, outcomes, run, warnings.append, page=False)

    warnings: list[str] = []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(24)))
    whole, outcomes = read(run)
    assert warnings == []
    assert {row["features"] for row in whole["measurements"]} == {f"kind {number}" for number in range(24)}
    assert len(outcomes) == 24
    assert not list(run.glob(".*.partial"))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_found_before_the_work_and_the_numbers_are_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*QUICK, "tasks=knn,geometry"]
    before = {path for path in run.rglob("*") if path.is_file()}
    with largest_file(1000):
        assert cli.evaluate([str(run), *args]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "results will only be printed; output=FOLDER writes them elsewhere" in shown
    assert shown.index("results will only be printed") < shown.index("encoding") < shown.index("Accuracy on")
    assert shown.index("Accuracy on") < shown.index("evaluation.json could not be written")
    assert shown.count("there is no report") == 1
    assert {path.name for path in run.rglob("*") if path.is_file()} <= {path.name for path in before} | {
        ".evaluation.lock"
    }
    assert cli.evaluate([str(run), *args, f"output={tmp_path / 'new' / 'elsewhere'}"]) == 0
    elsewhere = tmp_path / "new" / "elsewhere"
    assert {path.name for path in elsewhere.iterdir()} >= {"evaluation.json", "report.html", "features", "tensorboard"}
    assert not (run / "evaluation.json").exists()


def test_a_run_folder_that_takes_no_file_still_gives_its_features(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*QUICK, "tasks=geometry", "report=false"]
    assert cli.evaluate([str(run), *args]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys.modules["manyviews.evaluation.evaluate"], "unwritable", lambda _: "read-only file system")
    monkeypatch.setattr("manyviews.evaluation.writing.FileLock", refused)
    assert cli.evaluate([str(run), *args]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "encoding" not in shown
    assert "nothing was written" in shown
    assert "Geometry of the features" in shown


def refused(*_: object, **__: object) -> None:
    raise OSError(30, "Read-only file system")


def test_each_file_that_cannot_be_written_is_one_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    for name in ("features", "metrics", "tensorboard"):
        (run / name).write_text("a file in the place of a folder")
    (run / "report.html" / "inside").mkdir(parents=True)
    args = [word for word in QUICK if "maps" not in word]
    assert cli.evaluate([str(run), *args, "tasks=knn,retrieval", "metric=mahalanobis", "maps=pca"]) == 0
    captured = capsys.readouterr()
    shown = " ".join(captured.out.split())
    assert "Accuracy on" in shown
    assert "Traceback" not in captured.out + captured.err
    for warning in (
        "features are not kept",
        "learned.safetensors could not be written",
        "there is no report",
    ):
        assert shown.count(warning) == 1 + (warning == "features are not kept"), warning
    (run / "report.html" / "inside").rmdir()
    (run / "report.html").rmdir()
    assert cli.evaluate([str(run), *args, "tasks=knn", "cache=false", "maps=pca"]) == 0
    assert "pictures for TensorBoard could not be written" in " ".join(capsys.readouterr().out.split())
    assert (run / "report.html").is_file()


def test_an_output_that_is_a_file_or_another_run_is_refused_before_the_work(
    run: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.evaluate([str(run), *BARE, f"output={tmp_path / 'file' / 'x'}"]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    assert cli.evaluate([str(run), *BARE, f"output={made / 'run'}"]) == 2
    assert "is another run's folder" in capsys.readouterr().err
    assert unwritable(tmp_path / "made") == ""
    assert list((tmp_path / "made").iterdir()) == []


def test_a_task_fails_alone_and_the_others_are_shown_and_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError("17 GiB")

    monkeypatch.setattr("manyviews.evaluators.one_task.measure_clusters", out_of_memory)
    assert cli.evaluate([str(run), *BARE, "tasks=clustering,retrieval,knn,geometry"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: clustering could not be measured: MemoryError: 17 GiB\n"
    for title in ("Accuracy on", "Retrieval by cosine", "Geometry of the features"):
        assert title in " ".join(captured.out.split())
    assert recorded(run)["tasks"] == ["knn", "retrieval", "geometry"]
    assert recorded(run)["failures"] == [{"task": "clustering", "features": "learned", "reason": "MemoryError: 17 GiB"}]
    monkeypatch.undo()
    assert cli.evaluate([str(run), *BARE, "tasks=clustering"]) == 0
    assert recorded(run)["failures"] == []


def test_what_the_labels_rule_out_is_said_and_the_rest_is_measured(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["tasks=verification,knn", "protocol.verification.folds=4000"]
    assert cli.evaluate([str(run), *BARE, *args]) == 2
    captured = capsys.readouterr()
    assert "Accuracy on" in captured.out
    assert captured.err.startswith("error: verification could not be measured: ")
    assert cli.evaluate([str(run), *BARE, args[1], "tasks=verification"]) == 2
    captured = capsys.readouterr()
    assert "encoding" not in captured.out
    assert "pairs of the same class" in captured.err


@pytest.mark.parametrize("count", [3, 2])
def test_classes_of_two_training_images_and_of_one_are_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """Of three images of each class one is held out as a test image; of two, too."""
    data = photographs(tmp_path / "few", count, classes=8)
    args = [f"data={data}", "data.channels=1", "data.size=28", "few.draws=2", "data.holdout=0.4"]
    several = "protocol.linear.regularisations=[0.01, 0.1, 1]"
    grid = ["protocol.knn.neighbours=[1, 5]", several, "baselines=false", "maps=[]", "report=false", "cache=false"]
    assert cli.evaluate([str(run), *args, *grid]) == 0
    record = recorded(run)
    assert record["tasks"] == ["knn", "linear", "fractions", "geometry"]
    shown = " ".join(capsys.readouterr().out.split())
    scores = measured(record, "knn", "linear", metric="accuracy")
    if count == 3:
        assert "were chosen on one image of each class" in shown
        assert all(score["details"]["validation"] is not None for score in scores)
    else:
        assert "No class has two labelled training images" in shown
        assert all(score["details"]["validation"] is None for score in scores)
        assert scores[1]["details"]["regularisation"] == 0.1


def test_a_baseline_that_cannot_be_had_is_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = type(open_run(run))

    def lost(_: object) -> None:
        raise ValueError("the run began with weights that are not there")

    monkeypatch.setattr(opened, "untrained", lost)
    settings = load(EvaluateSettings, None, [word for word in BARE if "baselines" not in word] + ["tasks=knn,geometry"])
    actual = evaluate(run, settings, quiet=True)
    assert [score.features for score in actual.evaluation.of("knn")] == ["learned", "raw pixels"]
    assert [(own.task, own.features) for own in actual.failures] == [("features", "random weights")]


def test_outcomes_that_cannot_be_written_leave_the_numbers(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.evaluate([str(run), *BARE, "tasks=linear"]) == 0
    first = recorded(run)
    monkeypatch.setattr("manyviews.evaluation.writing.save_file", refused)
    assert cli.evaluate([str(run), *BARE, "tasks=knn"]) == 0
    assert "outcomes.safetensors could not be written" in " ".join(capsys.readouterr().out.split())
    assert recorded(run)["tasks"] == ["knn", "linear"]
    assert recorded(run)["outcomes"] is None
    monkeypatch.undo()
    assert cli.evaluate([str(run), *BARE, "tasks=knn"]) == 0
    assert measured(recorded(run), "linear") == measured(first, "linear")
    assert set(read(run)[1]) == {"predictions/knn/learned", "hits/knn/learned", "labels"}


@pytest.mark.parametrize(("most", "task", "warned"), [(2, "linear", True), (2, "knn", False), (3, "linear", False)])
def test_a_probe_that_is_cut_off_for_its_many_classes_is_warned_of(
    run: Path, monkeypatch: pytest.MonkeyPatch, most: int, task: str, warned: bool
) -> None:
    monkeypatch.setattr("manyviews.evaluators.logistic.MOST_CLASSES_SOLVED", most)
    assert cli.evaluate([str(run), *BARE, f"tasks={task}"]) == 0
    sentence = "With 3 classes each fit of the probe ends after 20 steps"
    assert any(line.startswith(sentence) for line in recorded(run)["warnings"]) == warned
