"""A run is measured: what is written, from what, and by how many processes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

from manyviews import cli
from manyviews.data.images import Pictures
from manyviews.evaluators.geometry import Pixels, two_views
from manyviews.evaluators.splits import hold_out
from manyviews.views import StandardView, ViewsSettings
from processes import launched
from recorded import measured, recorded, values
from small_run import photographs as make_photographs
from small_run import small_run

SCRIPTS = Path(__file__).parents[2] / "scripts"
FEW = ["few.draws=2", "few.shares=[0.5]", "few.shots=[2]", "maps=pca"]
SMALL = ["data.size=28", "data.channels=1", "protocol.knn.neighbours=[1, 5]", *FEW]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "short"
    args = ["train.batch_size=32", "train.epochs=0.0064", "train.precision=fp32", "train.preview=2", "train.monitor=0"]
    bank = ["objective=bank", "views.num_views=1"]
    assert cli.pretrain(["quickstart", *args, *bank, "train.threads=1", f"output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ little, so that some images are mistaken."""
    return make_photographs(tmp_path_factory.mktemp("photographs") / "images", 30)


def test_what_was_predicted_is_kept_image_by_image_and_makes_the_scores(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    assert cli.evaluate([str(folder), f"data={photographs}", *SMALL, "tasks=knn,linear,retrieval"]) == 0
    record, kept = recorded(folder), load_file(folder / "outcomes.safetensors")
    labels = kept["labels"]
    for score in measured(record, "knn", "linear", metric="accuracy"):
        name = f"{score['task']}/{score['features']}"
        assert score["value"] == pytest.approx((kept[f"predictions/{name}"] == labels).double().mean().item())
        assert torch.equal(kept[f"hits/{name}"], (kept[f"predictions/{name}"] == labels).long())
    for kind, value in values(record, "retrieval", "Recall@1").items():
        hits = kept[f"hits/retrieval/{kind}"]
        assert value == pytest.approx(hits[hits >= 0].double().mean().item())
    assert "of other data than the run's" in " ".join(capsys.readouterr().out.split())


def test_the_numbers_are_those_of_scikit_learn_on_the_features_that_extract_writes(
    run: Path, photographs: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    strength = 0.1
    args = [f"data={photographs}", *SMALL[:2]]
    grid = [f"protocol.linear.regularisations=[{strength}]", "protocol.knn.neighbours=[5]"]
    alone = ["protocol.knn.temperatures=[0.07]", "tasks=knn,linear", "baselines=false"]
    assert cli.evaluate([str(folder), *args, *grid, *alone]) == 0
    assert cli.extract([str(folder), *args, f"output={tmp_path / 'features'}"]) == 0
    rows, labels = np.load(tmp_path / "features" / "backbone.npy"), np.load(tmp_path / "features" / "labels.npy")
    manifest = json.loads((tmp_path / "features" / "manifest.json").read_text())
    held = np.array([entry[0] == "test" for entry in manifest["images"]])
    actual = {score["task"]: score for score in measured(recorded(folder), "knn", "linear", metric="accuracy")}

    unit = normalize(rows.astype(np.float64))
    voters = KNeighborsClassifier(5, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    voters.fit(unit[~held], labels[~held])
    assert actual["knn"]["value"] == pytest.approx(voters.score(unit[held], labels[held]))
    kept, apart = hold_out(torch.from_numpy(labels[~held]), share=0.2, seed=0)
    voters.fit(unit[~held][kept], labels[~held][kept])
    assert actual["knn"]["details"]["validation"] == pytest.approx(
        voters.score(unit[~held][apart], labels[~held][apart])
    )

    scaler = StandardScaler().fit(rows[~held].astype(np.float64))
    model = LogisticRegression(C=1 / (strength * (~held).sum()), max_iter=2000, tol=1e-8)
    model.fit(scaler.transform(rows[~held]), labels[~held])
    assert actual["linear"]["value"] == pytest.approx(model.score(scaler.transform(rows[held]), labels[held]))


def test_images_without_labels_are_told_by_their_geometry(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, flat = shutil.copytree(run, tmp_path / "run"), tmp_path / "flat"
    flat.mkdir()
    for file in photographs.rglob("*.png"):
        shutil.copy(file, flat / f"{file.parent.name}{file.name}")
    args = [str(folder), f"data={flat}", *SMALL]
    assert cli.evaluate(args) == 0
    assert list(values(recorded(folder), "geometry", "uniformity")) == ["learned", "random weights", "raw pixels"]
    assert recorded(folder)["tasks"] == ["geometry"]
    assert (folder / "report.html").is_file()
    assert "effective rank" in " ".join(capsys.readouterr().out.split())
    assert cli.evaluate([*args, "tasks=knn"]) == 2
    assert "takes labels" in capsys.readouterr().err


def test_a_banks_rows_are_compared_with_fresh_embeddings_of_the_runs_own_images(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    assert cli.evaluate([str(folder), "tasks=geometry", "baselines=false", "report=false", "cache=false"]) == 0
    stale = {row["metric"]: row["value"] for row in measured(recorded(folder), "staleness") if row["n"] == 2000}
    # After two steps of 32 images nearly all rows are those that the run began with: unrelated directions.
    assert abs(stale["mean"]) < 0.2
    assert stale["5 %"] < stale["95 %"]
    assert not (folder / "report.html").exists()


def test_a_second_look_takes_features_from_the_cache_and_says_the_same(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, args = shutil.copytree(run, tmp_path / "run"), [f"data={photographs}", *SMALL, "tasks=knn,geometry"]
    records = []
    for _ in range(2):
        assert cli.evaluate([str(folder), *args]) == 0
        records.append(recorded(folder))
    assert records[0] == records[1]
    # Once for each split and each of two kinds.
    assert len(re.findall(r"encoding \d+ images", capsys.readouterr().out)) == 4
    for cached in (folder / "features").rglob("*.npy"):
        np.save(cached, np.zeros_like(np.load(cached)))
    assert cli.evaluate([str(folder), *args, "cache=false"]) == 0
    assert recorded(folder) == records[0]


def test_two_processes_measure_what_one_does(photographs: Path, tmp_path: Path) -> None:
    records, outcomes = [], []
    own = [f"data={photographs}", *SMALL[:2], "train.batch_size=32", "train.epochs=1", "train.precision=fp32"]
    bank = ["objective=bank", "views.num_views=1", "train.monitor=0", f"output={tmp_path / 'run'}"]
    assert cli.pretrain(["quickstart", *own, *bank]) == 0
    for processes in (1, 2):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"run-{processes}")
        args = [str(folder), *SMALL[2:], "tasks=knn,linear,retrieval,clustering,geometry,fractions"]
        args += ["protocol.linear.regularisations=[0.1, 1]", "few.regularisations=[0.1]"]
        launched(cli.evaluate, [*args, "batch_size=16"], count=processes)
        records.append(recorded(folder))
        outcomes.append(load_file(folder / "outcomes.safetensors"))
    # Sums over pairs are added up in another order, and distances to centres are rounded otherwise.
    shapes = [
        [row for row in record["measurements"] if row["task"] == "geometry" or row["metric"] == "silhouette"]
        for record in records
    ]
    for record in records:
        record["measurements"] = [
            row for row in record["measurements"] if row["task"] != "geometry" and row["metric"] != "silhouette"
        ]
        del record["outcomes"]
        assert {row["n"] for row in measured(record, "staleness")} == {81}
    assert records[0] == records[1]
    for one, two in zip(*shapes, strict=True):
        # Near 0 it is a small difference of sums of float32 distances, rounded otherwise in batches of another size.
        near = 1e-6 if one["metric"] == "uniformity" else 0
        assert one.pop("value") == pytest.approx(two.pop("value"), rel=1e-6, abs=near)
        assert one == two
    assert outcomes[0].keys() == outcomes[1].keys()
    for name, outcome in outcomes[0].items():
        rounding = 1e-5 if outcome.is_floating_point() else 0
        torch.testing.assert_close(outcome, outcomes[1][name], rtol=rounding, atol=rounding, equal_nan=True)


class Noise:
    """Five images."""

    names, labels, classes = tuple("abcde"), None, ()
    channels, size, aspects, fingerprint = 1, 16, None, "0" * 64

    def __len__(self) -> int:
        return 5

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        images = torch.randint(256, (5, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return images[ids]


def test_two_views_are_those_that_a_run_would_see_whatever_the_batch() -> None:
    views = ViewsSettings(num_views=2).build(size=16, channels=1, seed=3)
    ids = torch.tensor([4, 0, 2])
    (made,) = views(Noise().read(ids), ids, 0)
    for size in (1, 2, 8):
        first, second = two_views(Pixels(), views, Noise(), ids, channels=1, batch_size=size)
        torch.testing.assert_close(first, (made[0] * 0.25 + 0.5).flatten(1))
        torch.testing.assert_close(second, (made[1] * 0.25 + 0.5).flatten(1))


def test_pixels_of_the_plain_view_are_the_images_own() -> None:
    images = Noise().read(torch.arange(5))
    torch.testing.assert_close(Pixels()(StandardView(16, 1)(Pictures((images,)))), images.flatten(1) / 255)


def test_a_run_that_has_learned_from_colour_is_measured_on_grey_images(photographs: Path, tmp_path: Path) -> None:
    small_run(tmp_path / "run", "views.saturation=0.4", "views.greyscale=0.2", channels=3)
    args = [str(tmp_path / "run"), f"data={photographs}", *SMALL, "tasks=geometry", "report=false"]
    assert cli.evaluate(args) == 0
    aligned = values(recorded(tmp_path / "run"), "geometry", "alignment")
    assert len(aligned) == 3
    assert all(value >= 0 for value in aligned.values())


def test_a_bank_whose_projector_is_lost_is_measured_without_its_rows(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    weights = load_file(folder / "backbone" / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "backbone" / "model.safetensors")
    assert cli.evaluate([str(folder), "tasks=geometry", "baselines=false", "report=false", "cache=false"]) == 0
    assert measured(recorded(folder), "staleness") == []
    assert "has other weights than" in " ".join(capsys.readouterr().out.split())
