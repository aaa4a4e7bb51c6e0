"""Pairs of a list and few-shot episodes by `evaluate`, and two images by `verify`."""

import json
import shutil
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import manyviews
from manyviews import cli
from manyviews.encoder.encoder import Encoder
from manyviews.evaluation import EvaluateSettings
from manyviews.evaluation.settings import planned_tasks
from manyviews.evaluation.verify import Verdict
from manyviews.features.backbone import open_run
from manyviews.recipe import Recipe
from recorded import measured, recorded, values
from small_run import photographs, small_run

QUICK = ["report=false", "maps=[]", "baselines=false", "protocol.verification.folds=3"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("photographs") / "images", 12, step=30)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, int]]:
    """All held-out and training images of the first four of each class, in pairs."""
    names = [f"{name}/{index}.png" for name in ("dark", "grey", "light") for index in range(4)]
    return [(one, two, int(one[:4] == two[:4])) for one, two in combinations(names, 2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> tuple[Path, Encoder]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    data = [f"data={images}", "data.size=28", "data.channels=1", "data.holdout=0.5"]
    options = ["objective=triplet", "objective.normalized=false", "objective.sampling.name=hard"]
    return folder, small_run(folder, *data, *options, "encoder.projector.layers=1", "encoder.projector.dim=4")


@pytest.fixture(scope="module")
def verified(
    made: tuple[Path, Encoder], pairs: list[tuple[str, str, int]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run after an evaluation of the list."""
    folder = shutil.copytree(made[0], tmp_path_factory.mktemp("verified") / "run")
    file = written(folder.parent, pairs)
    assert cli.evaluate([str(folder), f"pairs={file}", "tasks=verification", *QUICK]) == 0
    return folder


@pytest.fixture
def run(made: tuple[Path, Encoder], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "run")


def written(folder: Path, pairs: list[tuple[str, str, int]]) -> Path:
    file = folder / "pairs.csv"
    file.write_text("a,b,same\n" + "".join(f"{one},{two},{same}\n" for one, two, same in pairs))
    return file


@torch.no_grad()
def distances(encoder: Encoder, images: Path, pairs: list[tuple[str, str, int]]) -> Any:
    """What the encoder itself makes of the images, apart."""
    names = sorted({name for row in pairs for name in row[:2]})
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(images / name))) for name in names])
    rows = encoder.eval()(((pixels[:, None] / 255 - 0.5) / 0.25)[None]).embeddings[0].double()
    embedded = dict(zip(names, rows, strict=True))
    return np.array([float((embedded[one] - embedded[two]).norm()) for one, two, _ in pairs])


def threshold(folder: Path, kind: str = "learned (embedding)") -> dict[str, Any]:
    (row,) = [row for row in measured(recorded(folder), "verification", metric="threshold") if row["features"] == kind]
    return row


def test_a_list_is_verified_on_held_out_and_training_images_and_names_those_it_learned_from(
    made: tuple[Path, Encoder], verified: Path, images: Path, pairs: list[tuple[str, str, int]]
) -> None:
    record = recorded(verified)
    assert record["pairs"].startswith("pairs.csv sha256:")
    apart = distances(made[1], images, pairs)
    same = np.array([same for *_, same in pairs])
    auc = values(record, "verification", "AUC")["learned (embedding)"]
    assert auc == pytest.approx(roc_auc_score(same, -apart), abs=1e-6)
    own = threshold(verified)
    assert (own["distance"], own["n"], own["details"]["pairs"]) == ("euclidean", len(pairs), "pairs.csv")
    # In units of the distance: the best of all, half way between two.
    limits = [0.0, *((low + high) / 2 for low, high in pairwise(sorted(apart))), np.inf]
    right = [int(((apart < limit) == same).sum()) for limit in limits]
    assert ((apart < own["value"]) == same).sum() == max(right)
    assert own["low"] <= own["value"] <= own["high"]
    curve = own["details"]["curve"]
    for at, false, true in zip(curve["at"], curve["false_accepts"], curve["true_accepts"], strict=True):
        accepted = apart <= at + 1e-6
        assert (accepted[same == 0].mean(), accepted[same == 1].mean()) == pytest.approx((false, true), abs=1e-6)
    assert "images of the pairs are training images of the run" in " ".join(record["warnings"])


def test_a_list_needs_no_labels_and_is_measured_by_default(
    run: Path, images: Path, pairs: list[tuple[str, str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for one in {name for row in pairs for name in row[:2]}:
        shutil.copy(images / one, flat / one.replace("/", "_"))
    file = written(tmp_path, [(one.replace("/", "_"), two.replace("/", "_"), same) for one, two, same in pairs])
    args = [str(run), f"data={flat}", "data.size=28", "data.channels=1", f"pairs={file}"]
    assert cli.evaluate([*args, "protocol.verification.folds=3", "baselines=false", "maps=[]"]) == 0
    record = recorded(run)
    assert record["tasks"] == ["verification", "geometry"]
    assert set(values(record, "verification", "EER")) == {"learned (embedding)", "learned"}
    assert "Verification by cosine, the embedding by euclidean of 66 pairs of pairs.csv (%)" in " ".join(
        capsys.readouterr().out.split()
    )
    page = (run / "report.html").read_text()
    assert 'id="verification"' in page
    assert "of pairs.csv" in page


def test_drawn_pairs_and_those_of_each_list_are_kept_beside_each_other(
    run: Path, pairs: list[tuple[str, str, int]], tmp_path: Path
) -> None:
    args = [str(run), "tasks=verification", "layer=embedding", *QUICK]
    assert cli.evaluate(args) == 0
    drawn = threshold(run)
    for number, rows in enumerate((pairs, pairs[:-3]), 1):
        assert cli.evaluate([*args, f"pairs={written(tmp_path, rows)}"]) == 0
        assert threshold(run)["n"] == len(rows)
        assert len(recorded(run)["kept"]) == number
    assert drawn in recorded(run)["kept"][1]["measurements"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pairs=none.csv"], "pairs=none.csv does not exist"),
        (["tasks=geometry", "pairs=none.csv"], "pairs=none.csv is for tasks=verification, and tasks=geometry; add it"),
        (["tasks=few_shot", "protocol.few_shot.ways=2,20"], "20-way 1-shot episodes take 20 classes of 2 images"),
        (["tasks=few_shot", "protocol.few_shot.ways=1"], "protocol.few_shot.ways"),
        (["tasks=few_shots"], "did you mean few_shot?"),
        (["tasks=few_shot", "ways=5"], "did you mean protocol.few_shot.ways?"),
    ],
)
def test_a_mistake_is_told_before_anything_is_encoded(
    run: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert cli.evaluate([str(run), *args, *QUICK]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "encoding" not in captured.out
    assert not (run / "evaluation.json").exists()


def test_few_shot_episodes_are_measured_with_intervals_and_compared_in_pairs(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["tasks=few_shot", "protocol.few_shot.ways=2,3", "protocol.few_shot.shots=1,2", "report=false", "maps=[]"]
    assert cli.evaluate([str(run), *args, "protocol.few_shot.episodes=50"]) == 0
    record = recorded(run)
    rows = [row for row in measured(record, "few_shot") if row["features"] == "learned (embedding)"]
    assert [row["metric"] for row in rows] == ["2-way 1-shot", "2-way 2-shot", "3-way 1-shot", "3-way 2-shot"]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert {row["baseline"] for row in record["differences"]} == {"learned", "random weights", "raw pixels"}
    first, *others = (values(record, "few_shot", "2-way 1-shot")[kind] for kind in ("learned (embedding)", "learned"))
    lead = next(row for row in record["differences"] if row["baseline"] == "learned")
    assert lead["difference"] == pytest.approx(first - others[0])
    shown = capsys.readouterr().out
    assert f"{100 * rows[0]['value']:.1f} ± {50 * (rows[0]['high'] - rows[0]['low']):.1f}" in shown
    assert "by few-shot accuracy, learned (embedding) features" in " ".join(shown.split())


def test_pairs_add_verification_to_the_tasks_by_default() -> None:
    settings, recipe = EvaluateSettings(pairs="pairs.csv"), Recipe()
    assert planned_tasks(settings, recipe, labelled=False) == ("verification", "geometry")
    assert planned_tasks(settings, recipe, labelled=True) == ("knn", "linear", "fractions", "verification", "geometry")
    with pytest.raises(ValueError, match="verification of pairs=FILE need none"):
        planned_tasks(EvaluateSettings(tasks=("verification",)), recipe, labelled=False)


def test_two_images_are_judged_by_the_distance_and_the_threshold_of_the_evaluation(
    made: tuple[Path, Encoder],
    verified: Path,
    images: Path,
    pairs: list[tuple[str, str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, verdicts = threshold(verified), []
    apart = distances(made[1], images, pairs)
    same = np.array([kind for *_, kind in pairs])
    for index in (0, 10, 20, 65):
        verdict = manyviews.verify(verified, images / pairs[index][0], str(images / pairs[index][1]))
        assert verdict.value == pytest.approx(apart[index], abs=1e-6)
        assert (verdict.distance, verdict.layer) == ("euclidean", "embedding")
        assert verdict.same == bool(verdict) == (verdict.value < own["value"])
        assert verdict.threshold is not None
        assert verdict.threshold == (own["value"], own["low"], own["high"], len(pairs), "pairs.csv")
        expected = [(apart[same == kind] <= apart[index] + 1e-6).mean() for kind in (0, 1)]
        assert (verdict.false_accepts, verdict.true_accepts) == pytest.approx(tuple(expected), abs=1e-2)
        verdicts.append(verdict.same)
    assert set(verdicts) == {True, False}
    capsys.readouterr()
    assert cli.verify([str(verified), *(str(images / name) for name in pairs[65][:2])]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{verdict}\n"
    assert f"verdict     {'same' if verdicts[-1] else 'different'}" in captured.out
    assert not captured.err


def test_the_other_layer_has_its_own_threshold_and_pictures_in_memory_their_distance(
    verified: Path, images: Path
) -> None:
    one, two = images / "dark/0.png", images / "light/1.png"
    verdict = manyviews.Run(verified).verify(one, two, layer="backbone")
    assert (verdict.distance, verdict.layer) == ("cosine", "backbone")
    assert verdict.threshold is not None
    assert verdict.threshold.value == threshold(verified, "learned")["value"]
    assert verdict.same == (verdict.value > verdict.threshold.value)
    rows = manyviews.Run(verified).embed([one, two]).astype(float)
    cosine = rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    assert verdict.value == pytest.approx(cosine, abs=1e-6)
    pictures = [np.array(Image.open(file)) for file in (one, two)]
    assert manyviews.verify(verified, *pictures, layer="backbone").value == pytest.approx(cosine, abs=1e-5)
    assert manyviews.verify(verified, one, one, layer="backbone").value == pytest.approx(1)


@pytest.mark.slow
def test_without_a_fitting_threshold_the_distance_is_printed_with_the_command_that_makes_one(
    verified: Path, run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(run), str(images / "dark/0.png"), str(images / "light/1.png")]

    def told() -> str:
        capsys.readouterr()
        assert cli.verify(args) == 0
        captured = capsys.readouterr()
        assert captured.out.startswith("distance    ")
        assert "verdict" not in captured.out
        assert f"manyviews evaluate {run} tasks=verification makes one" in captured.err
        assert cli.verify([*args, f"evaluation={run}"]) == 2
        return captured.err

    assert "does not exist, so there is no threshold" in told()
    record = recorded(verified)
    rows = record["measurements"]
    for changed, message in (
        (record | {"measurements": []}, "has no threshold of verification"),
        (record | {"measurements": [row for row in rows if row["features"] == "learned"]}, "are of learned features;"),
        (record | {"measurements": [row | {"distance": "cosine"} for row in rows]}, "by the distance cosine"),
        (record | {"weights": {"sha256": "0" * 64}}, "they are of other weights, as of an earlier step;"),
    ):
        (run / "evaluation.json").write_text(json.dumps(changed))
        assert message in told()
    (run / "evaluation.json").write_text(json.dumps(record | {"measurements": [], "kept": [record]}))
    assert manyviews.verify(*args).same is not None


def test_a_threshold_is_read_from_another_folder_if_it_is_named(run: Path, images: Path, tmp_path: Path) -> None:
    assert cli.evaluate([str(run), "tasks=verification", f"output={tmp_path / 'measured'}", *QUICK]) == 0
    pair = images / "dark/0.png", images / "light/1.png"
    missing = manyviews.verify(run, *pair)
    assert missing.same is None
    assert not missing
    assert missing.missing
    verdict = manyviews.verify(run, *pair, evaluation=str(tmp_path / "measured"))
    assert verdict.same is not None
    assert not verdict.missing


def test_what_cannot_be_compared_is_told(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, cut, text = str(images / "dark/0.png"), tmp_path / "cut.png", tmp_path / "text.png"
    cut.write_bytes((images / "dark/0.png").read_bytes()[:300])
    text.write_text("no image")
    empty = small_run_without_weights(run, tmp_path)
    for args, message in (
        ([str(run), good], "a run folder and two images come first"),
        ([str(run), good, good, good], "a run folder and two images come first"),
        ([str(run), good, str(images / "dark/00.png")], "00.png does not exist; "),
        ([str(run), good, str(images)], "is a folder; name an image in it"),
        ([str(run), good, str(cut)], "cut.png cannot be read as an image: image file is truncated"),
        ([str(run), str(text), good], "text.png cannot be read as an image: "),
        ([str(run), good, good, "layers=backbone"], "did you mean layer?"),
        ([str(run), good, good, "layer=back"], "layer=back: it must be one of backbone, embedding"),
        ([str(tmp_path), good, good], "is no run folder"),
        ([str(empty), good, good], "has neither a backbone nor a checkpoint yet"),
    ):
        capsys.readouterr()
        assert cli.verify(args) == 2
        captured = capsys.readouterr()
        assert message in captured.err, args
        assert not captured.out
    with pytest.raises(ValueError, match=r"cannot be read as an image"):
        manyviews.verify(run, good, text)


def small_run_without_weights(run: Path, folder: Path) -> Path:
    (folder / "empty").mkdir()
    shutil.copy(run / "config.yaml", folder / "empty")
    return folder / "empty"


def test_a_damaged_record_is_told_and_the_embedding_needs_its_checkpoint(run: Path, images: Path) -> None:
    pair = images / "dark/0.png", images / "light/1.png"
    assert open_run(run).step is None
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation.json is damaged"):
        manyviews.verify(run, *pair)
    (run / "evaluation.json").unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint"):
        manyviews.verify(run, *pair, layer="embedding")
    # As in an evaluation, the backbone is then compared.
    verdict = manyviews.verify(run, *pair)
    assert isinstance(verdict, Verdict)
    assert verdict.layer == "backbone"
