"""Every benchmark in small: it measures what its columns say, beside rivals where they are installed."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from manyviews import cli
from manyviews.data import InMemory, Sample, Split, read_relations, select
from small_run import small_run

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark
from benchmarks import (
    bank,
    decode,
    distances,
    distances_on_sphere,
    extract,
    finetune,
    harness,
    infonce,
    knn,
    linear,
    mining,
    negatives,
    objectives,
    pipeline,
    recipes,
    relations,
    sampling,
)

COLUMNS = ["Recall@1, backbone", "Recall@1, embedding", "MAP@R, backbone", "MAP@R, embedding"]
IMAGES = ("data.size=12", "data.channels=1", "data.holdout=0.5")
TRAINED = ("encoder.projector.dim=4", "train.batch_size=20", "optim.warmup=0", "train.preview=0")

QUICK = ("maps=[]", "few.draws=2", "few.shots=[]")


class InTurn(Executor):
    """Runs at once what is submitted: signals are heard in the main thread alone."""

    def __init__(self, _: int) -> None:
        pass

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **named))
        return future


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten classes of few small images."""
    for number in range(10):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        for index in range(12):
            draw = np.random.default_rng((number, index))
            pixels = draw.normal(40 + 18 * number, 20, (12, 12)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / str(number) / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands on small images and memory's measurements in this process: others would take seconds to start."""

    def commands(_: int, *lines: Sequence[str]) -> None:
        for name, *overrides in lines:
            small = (*IMAGES, *(TRAINED if name == "pretrain" else ()))
            wanted = any(word.startswith("data=") for word in overrides)
            given = {word.partition("=")[0] for word in overrides}
            overrides += QUICK if name == "evaluate" else ()
            overrides += [word for word in small if wanted and word.partition("=")[0] not in given]
            assert getattr(cli, name)(overrides) == 0

    def peak(prepare: Callable[..., harness.Work], *arguments: object) -> float:
        prepare(*arguments)()
        return 1.0

    monkeypatch.setattr(harness, "commands", commands)
    monkeypatch.setattr(harness, "peak_mebibytes", peak)
    for module in (finetune, negatives, objectives, recipes):
        monkeypatch.setattr(module, "ThreadPoolExecutor", InTurn)


def rows_of(name: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """What a benchmark writes as JSON."""
    benchmark.main([name, *overrides, "--repetitions", "1", "--json", str(folder / "figures.json")])
    report = json.loads((folder / "figures.json").read_text())
    assert {"title", "command", "machine", "notes"} < report.keys()
    rows: list[dict[str, Any]] = report["rows"]
    return rows


def seconds_of(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, float]:
    """The medians by name; a rival that is not installed says so in their place."""
    seconds = {row[column]: row["seconds"] for row in rows}
    assert all("pip install" in value for value in seconds.values() if isinstance(value, str))
    return {
        name: value["median"] if isinstance(value, dict) else value
        for name, value in seconds.items()
        if not isinstance(value, str)
    }


def test_every_benchmark_is_tested_here_or_in_a_file_of_its_own() -> None:
    elsewhere = {"fuzz"}
    names = {file.stem for file in benchmark.FOLDER.glob("*.py")} - {"harness"}
    content = Path(__file__).read_text()
    tested = {name for name in names if f'rows_of("{name}"' in content or f"{name}.run(options)" in content}
    assert names - tested == elsewhere


@pytest.mark.slow
def test_bank_compares_steps_of_the_bank_with_the_original_and_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "QUERIES", 16)
    rows = rows_of("bank", tmp_path, "--sizes", "5000")
    assert seconds_of(rows, "step").keys() == {*bank.OURS, bank.ORIGINAL, bank.PLAIN, "limit"}
    ratios = {row["step"]: row["of the original NCE"] for row in rows}
    assert ratios[bank.ORIGINAL] == 1
    memory = {row["step"]: row.get("bank (MiB)") for row in rows}
    assert memory["exact softmax, float32 bank"] == 5000 * 128 * 4 / 2**20
    assert memory["exact softmax, bfloat16 bank"] == 5000 * 128 * 2 / 2**20


@pytest.mark.slow
def test_checkpointing_times_the_steps_beside_a_checkpoint_and_the_growth_of_memory(tmp_path: Path) -> None:
    overrides = ("--minutes", "0.3", "--every", "2", "--steps", "300", "--threads", "1", "--place", str(tmp_path))
    *costs, growth = rows_of("checkpointing", tmp_path, *overrides)
    assert [row["run"] for row in costs] == ["quickstart", "wide projector"]
    assert all(row["checkpoints"] > 0 and row["one step (ms)"] > 0 for row in costs)
    assert growth["resident, at the end (MiB)"] > 0


@pytest.mark.slow
def test_chunks_give_the_gradient_of_the_whole_batch_where_no_batch_norm_sees_them(tmp_path: Path) -> None:
    rows = rows_of("chunk", tmp_path, "--batch", "16", "--chunk", "8", "--encoders", "test_vit")
    chunks = {row["batch"]: row for row in rows}
    assert chunks["16 in chunks"]["relative difference"] < 1e-4
    assert chunks["16 in chunks, views kept"]["relative difference"] < 1e-4
    assert chunks["16 in one piece"]["over one piece"] == 1


def test_decode_stands_beside_the_loaders_that_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SIZES", {500: (60, 45, 4)})
    monkeypatch.setattr(decode, "VIEW", 16)
    rows = rows_of("decode", tmp_path, "--sizes", "500", "--seconds", "0.1")
    assert [row["loader"] for row in rows] == list(decode.LOADERS)
    measured = {row["loader"]: row for row in rows if not isinstance(row["1 worker"], str)}
    assert measured.keys() >= {decode.OURS, decode.THEIRS, "torchvision v2, tensors"}
    assert measured[decode.THEIRS]["of torchvision's"] == 1
    assert all(row["1 worker"]["median"] > 0 and row["per core"]["median"] > 0 for row in measured.values())
    assert all("pip install" in row["1 worker"] for row in rows if row["loader"] not in measured)


def test_distances_are_fitted_beside_the_rival_in_an_environment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metric_learn.py").write_text(
        "import numpy, time\n"
        "class LMNN:\n"
        "    def __init__(self, pause=0): self.pause = pause\n"
        "    def fit(self, x, y): print('1 step', flush=True); time.sleep(self.pause)\n"
        "    components_ = numpy.eye(128)\n"
        "MMC_Supervised = LMNN\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(distances, "environment", lambda folder: Path(sys.executable))
    monkeypatch.setattr(distances, "PACKAGES", ("numpy",))
    theirs = {"metric-learn LMNN": "LMNN()", "metric-learn MMC": "MMC_Supervised(60)"}
    monkeypatch.setattr(distances, "THEIRS", theirs)
    rows = {row["metric"]: row for row in rows_of("distances", tmp_path, "--sizes", "200", "--limit", "3")}
    assert rows.keys() == {"Euclidean", *distances.OURS, *theirs}
    # The stand-in's map is the identity.
    assert rows["metric-learn LMNN"]["accuracy"] == rows["Euclidean"]["accuracy"] > 0.5
    assert rows["metric-learn LMNN"]["times ours"] > 0
    assert rows["metric-learn MMC"]["seconds"] == "over 3"
    assert rows["MMC, prior=0 (the paper's)"]["within"] < rows["Euclidean"]["within"]


def test_distances_on_the_sphere_are_drawn_and_pass_the_test_for_their_own_dimension_alone(tmp_path: Path) -> None:
    picture = tmp_path / "sphere.png"
    rows = rows_of("distances_on_sphere", tmp_path, "--dims", "3", "16", "--pairs", "2000", "--picture", str(picture))
    assert [row["pairs"] for row in rows] == [2000, 2000]
    assert all(row["p"] > distances_on_sphere.LEAST and abs(row["mean"] - row["mean of q(d)"]) < 0.05 for row in rows)
    with Image.open(picture) as drawn:
        assert drawn.width > 400
    drawn_distances = distances_on_sphere.random_distances(16, 20_000)
    assert distances_on_sphere.fit_of(drawn_distances, 16).p > distances_on_sphere.LEAST
    assert distances_on_sphere.fit_of(drawn_distances, 18).p < distances_on_sphere.LEAST


def test_points_that_contradict_the_density_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = np.full(2000, 1.2)
    monkeypatch.setattr(distances_on_sphere, "random_distances", lambda dim, pairs: near)
    with pytest.raises(RuntimeError, match=r"random, n = 3: .* the distances are not those of q\(d\)"):
        rows_of("distances_on_sphere", tmp_path, "--dims", "3", "--picture", str(tmp_path / "sphere.png"))


def test_distances_of_a_runs_embeddings_stand_beside_the_density_of_their_dimension(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tmp_path / "run", *IMAGES, f"data={images}", "encoder.projector.dim=4", size=12)
    overrides = ("--run", str(tmp_path / "run"), "--picture", str(tmp_path / "run.png"))
    (row,) = rows_of("distances_on_sphere", tmp_path, *overrides)
    assert row["points"] == "embeddings of run"
    assert row["pairs"] == 30
    assert row["mean of q(d)"] == pytest.approx(distances_on_sphere.mean_distance(4))
    assert (tmp_path / "run.png").is_file()
    for wrong in (("--picture", "sphere.jpg"), ("--dims", "1"), ("--pairs", "20")):
        with pytest.raises(SystemExit, match=wrong[0]):
            rows_of("distances_on_sphere", tmp_path, *wrong)


@pytest.mark.slow
def test_extract_is_compared_with_the_backbone_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "BATCH", 16)
    overrides = ("--data", "sample", "--sizes", "28", "--share", "0.001", "--threads", "1", "--folder", str(tmp_path))
    rows = [row for row in rows_of("extract", tmp_path, *overrides) if row["precision"] == "fp32"]
    assert [row["loop"] for row in rows] == ["backbone alone", "to files", "in memory"]
    assert rows[0]["of the backbone alone"] == 1


@pytest.mark.slow
def test_finetune_stands_beside_the_probe_and_training_from_scratch(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"EPOCHS": 1, "STEPS": 1, "RATES": (0.01,)}.items():
        monkeypatch.setattr(finetune, name, value)
    small_run(tmp_path / "run", *IMAGES, f"data={images}", size=12)
    overrides = ("--run", str(tmp_path / "run"), "--data", str(images), "--fractions", "0.5")
    overrides += ("--seeds", "1", "--longer", "2", "--keep", str(tmp_path / "runs"))
    rows = rows_of("finetune", tmp_path, *overrides)
    scratch = [f"from scratch, {times} × the budget, rate 0.01" for times in (1, 2)]
    assert [row["method"] for row in rows] == ["linear probe on frozen features", "fine-tuned", *scratch]
    assert all(0 <= float(row["mean"]) <= 100 for row in rows)


@pytest.mark.slow
def test_infonce_stands_beside_the_rivals_and_the_limit(tmp_path: Path) -> None:
    rows = rows_of("infonce", tmp_path, "--sizes", "64")
    assert seconds_of(rows, "loss").keys() >= {"manyviews", "limit"}
    assert [row["loss"] for row in rows] == ["manyviews", *infonce.RIVALS, "limit"]


@pytest.mark.slow
def test_knn_stands_beside_the_rivals_and_the_limits(tmp_path: Path) -> None:
    rows = rows_of("knn", tmp_path, "--sizes", "600x50", "--dims", "16", "--neighbours", "5", "--features", "classes")
    assert seconds_of(rows, "by").keys() >= {knn.OURS, knn.PLAIN, knn.VOTE, *knn.LIMITS}
    assert all(row.get("agreement", "1.000000") == "1.000000" for row in rows)


def test_linear_stands_beside_scikit_learn_on_the_same_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Sample().build(workers=0, report=None)

    def some(images: Any, count: int) -> InMemory:
        ids = torch.arange(count)
        return InMemory(images.read(ids), [str(index) for index in range(count)], images.labels[ids], (), "some")

    few = SimpleNamespace(
        build=lambda workers: SimpleNamespace(train=some(split.train, 300), test=some(split.test, 100))
    )
    monkeypatch.setattr(linear, "Sample", lambda: few)
    small_run(tmp_path / "run")
    overrides = ("--run", str(tmp_path / "run"), "--epochs", "1", "--workers", "0", "--plain")
    ours, theirs, lightly = rows_of("linear", tmp_path, *overrides)
    assert abs(ours["accuracy %"] - theirs["accuracy %"]) <= 5
    assert ours["times ours"] == 1
    assert "accuracy %" in lightly or "pip install" in lightly["seconds"]


@pytest.mark.slow
def test_mining_stands_beside_the_rival(tmp_path: Path) -> None:
    rows = rows_of("mining", tmp_path, "--sizes", "32")
    assert [row["loss"] for row in rows if row["by"] == mining.OURS] == list(mining.CASES)
    assert all(row["times ours"] == 1 for row in rows if row["by"] == mining.OURS)


@pytest.mark.slow
def test_negatives_are_counted_beside_the_accuracy_and_verdicts_name_the_order(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negatives, "QUEUES", (8, 16))
    overrides = ("--parts", "queue", "--epochs", "0.2", "--seeds", "1", "--data", str(images), "--keep", str(tmp_path))
    rows = rows_of("negatives", tmp_path, *overrides)
    assert [row["negatives"] for row in rows if row["part"] == "queue"] == [8, 16]
    assert [row["case"] for row in rows if row["part"] == "baseline"] == ["random weights", "raw pixels"]
    assert "queue: " in json.loads((tmp_path / "figures.json").read_text())["notes"][-1]


@pytest.mark.slow
def test_pipeline_is_compared_with_the_encoder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = pipeline.CASES[28]._replace(batch_size=8, steps=2)
    monkeypatch.setattr(pipeline, "CASES", {28: case})
    rows = {row["loop"]: row for row in rows_of("pipeline", tmp_path, "--sizes", "28")}
    assert rows.keys() == {"encoder alone", "manyviews", "lightly"}
    assert rows["encoder alone"]["of the encoder alone"] == 1
    assert rows["manyviews"]["images/s"]["median"] > 0


def test_ranks_hold_equal_shares_of_the_rows_and_one_process_receives_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One process is this one; more are the slow test's.
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda work, args, nprocs: work(0, *args))
    rows = rows_of("ranks", tmp_path, "--processes", "1", "--rows", "500", "--batch", "8")
    exact, nce, *queues = (row["negatives"] for row in rows)
    assert exact == 499
    assert nce <= 500
    assert queues == [500, 500]
    assert all(row["received (MiB)"] == 0 for row in rows)
    assert rows[0]["rows each (MiB)"] >= 500 * 128 * 4 / 2**20


@pytest.mark.slow
def test_ranks_of_two_processes_hold_half_of_the_rows_each(tmp_path: Path) -> None:
    rows = rows_of("ranks", tmp_path, "--processes", "1", "2", "--rows", "500", "--batch", "8")
    exact = {row["processes"]: row for row in rows if row["objective"] == "exact bank"}
    assert exact[2]["rows each (MiB)"] == pytest.approx(exact[1]["rows each (MiB)"] / 2, rel=0.02)
    assert exact[2]["negatives"] == exact[1]["negatives"] == 499
    assert exact[2]["received (MiB)"] > 0


@pytest.mark.slow
def test_recipes_are_measured_beside_random_weights_and_pixels(tmp_path: Path, images: Path) -> None:
    overrides = (
        "--minutes",
        "0.002",
        "--seeds",
        "1",
        "--data",
        str(images),
        "--recipes",
        "simclr",
        "--keep",
        str(tmp_path),
    )
    rows = rows_of("recipes", tmp_path, *overrides)
    assert [row["recipe"] for row in rows] == ["simclr", "random weights", "raw pixels"]
    assert all(0 <= row[name]["median"] <= 100 for row in rows for name in ("knn", "linear"))


def test_relations_are_judged_beside_the_untrained_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Sample().build()
    assert split.test is not None
    few = Split(select(split.train, torch.arange(400)), select(split.test, torch.arange(200)))
    monkeypatch.setattr(relations, "Sample", lambda: SimpleNamespace(build=lambda: few))
    monkeypatch.setattr(relations, "UNSEEN", 100)
    monkeypatch.setattr(relations, "SEEN", 60)
    (row,) = rows_of("relations", tmp_path, "--images", "120", "--seeds", "1", "--only", "triplet")
    assert row["lead"] == pytest.approx(row["embedding"]["median"] - row["untrained"]["median"], abs=0.01)
    assert all(0 < row[name]["median"] <= 100 for name in ("embedding", "backbone", "untrained"))


@pytest.mark.parametrize("kind", ["pairs", "triplets", "ranked"])
def test_relations_of_the_benchmark_follow_its_rule(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Sample().build().train
    monkeypatch.setattr(relations, "SEEN", 60)
    relations.write(tmp_path / "relations.csv", kind, train, np.random.default_rng(0))
    table = read_relations(tmp_path / "relations.csv", train.names)
    assert (table.kind, table.notes) == (kind, ())
    assert train.labels is not None
    first, *others = train.labels[table.ids].unbind(1)
    kinds = torch.tensor(relations.KINDS)
    if kind == "pairs":
        assert torch.equal(table.numbers, (first == others[0]).double())
    elif kind == "triplets":
        assert torch.equal(first, others[0])
        assert bool((first != others[1]).all())
    else:
        grades = (first == others[0]).double() + (kinds[first] == kinds[others[0]])
        assert torch.equal(table.numbers, grades)


@pytest.mark.slow
def test_relations_alone_beat_the_untrained_encoder_on_relations_not_seen(tmp_path: Path) -> None:
    rows = rows_of("relations", tmp_path, "--images", "6000", "--seeds", "3")
    assert [row["objective"] for row in rows] == list(relations.CASES)
    # The paired interval over the seeds is above 0.
    assert all(row["lead"] > row["±"] > 0 for row in rows)


@pytest.mark.slow
def test_soak_ends_bitwise_as_if_nothing_had_happened(tmp_path: Path) -> None:
    rows = rows_of("soak", tmp_path, "--share", "0.02", "--place", str(tmp_path))
    notes = json.loads((tmp_path / "figures.json").read_text())["notes"]
    assert [row["equal at the end"] for row in rows] == ["yes"] * len(rows)
    assert {row["fault"] for row in rows} >= {"kill −9", "SIGTERM"}
    assert not [note for note in notes if note.startswith(("NOT EQUAL", "PROBLEM"))]


@pytest.fixture
def options(tmp_path: Path, images: Path) -> argparse.Namespace:
    """Runs of a few steps."""
    parser = argparse.ArgumentParser()
    objectives.add_options(parser)
    overrides = ["--epochs", "0.5", "--seeds", "1", "--data", str(images), "--gallery", str(images)]
    return parser.parse_args([*overrides, "--keep", str(tmp_path / "runs")])


def test_objectives_show_backbone_and_embedding_side_by_side(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "VIEWS", {"in_batch: NT-Xent": "simclr"})
    monkeypatch.setattr(objectives, "LABELS", {"triplet, semi-hard": "facenet train.images_per_class=4"})
    report = objectives.run(options)
    batch, triplet, random, pixels = report.rows
    assert [row["objective"] for row in report.rows[2:]] == ["random weights", "raw pixels"]
    assert (batch["judged by"], triplet["judged by"]) == ("backbone", "embedding")
    assert list(batch)[4:8] == COLUMNS
    for row, name in ((batch, "in_batch-NT-Xent-views-0"), (triplet, "triplet-semi-hard-labels-0")):
        kept = json.loads((options.keep / name / "evaluation.json").read_text())["measurements"]
        for own in kept:
            if own["features"].startswith("learned") and own["metric"] == "Recall@1":
                value = row[f"Recall@1, {own['layer']}"]
                assert isinstance(value, harness.Spread)
                assert value.median == pytest.approx(100 * own["value"])
    assert not {"Recall@1, embedding", "epochs"} & {key for key, value in random.items() if value is not None}
    assert isinstance(pixels["MAP@R, backbone"], harness.Spread)
    harness.show(report)


@pytest.mark.slow
def test_objectives_by_values_are_ranked_in_grades_on_the_held_out_images(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "GRADED", {"log_ratio": "log_ratio values={values}"})
    options.graded = "pixels"
    own, *others = objectives.run(options).rows
    assert (own["positives"], own["judged by"]) == ("values", "embedding")
    assert list(own)[4:] == [
        *("NDCG@10, backbone", "NDCG@10, embedding", "Kendall τ-b, backbone", "Kendall τ-b, embedding"),
        "seeds",
    ]
    assert [row["objective"] for row in others] == ["random weights", "raw pixels"]


def test_sampling_shows_what_was_published_beside_both_layers(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("facenet", "train.images_per_class=4")
    monkeypatch.setattr(sampling, "LOSSES", {"triplet, squared distances": small})
    monkeypatch.setattr(sampling, "SAMPLERS", {"semi-hard": "semi_hard"})
    first, *_ = sampling.run(options).rows
    assert set(COLUMNS) <= first.keys()
    assert (first["judged by"], first["published"]) == ("embedding", 49.7)
