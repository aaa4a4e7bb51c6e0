"""Which layer of a run is measured, by which distance, and what says so."""

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyviews import cli
from manyviews.encoder.encoder import Encoder
from manyviews.evaluation.settings import EvaluateSettings, measured_layers
from manyviews.features.backbone import open_run
from manyviews.objectives import LogRatio, Objective, Triplet
from manyviews.objectives.contrastive import Contrastive
from recorded import measured, recorded
from small_run import photographs as make_photographs
from small_run import small_run

QUICK = ["protocol.knn.neighbours=[1]", "protocol.linear.regularisations=[0.1]", "report=false", "maps=[]"]
KINDS = ["learned", "learned (embedding)", "random weights", "raw pixels"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("photographs") / "images", 30, step=6)


def made(folder: Path, photographs: Path, *args: str) -> Encoder:
    """A run with a projector onto few numbers of very different lengths, which ranks otherwise than the backbone."""
    data = [f"data={photographs}", "data.size=28", "data.channels=1", "data.holdout=0.5"]
    return small_run(folder, *data, "encoder.projector.layers=1", "encoder.projector.dim=3", *args)


def recall_at_1(rows: Tensor, labels: Tensor, distance: str) -> float:
    """By a loop over all pairs of images, in float64."""
    rows = rows.double()
    right = 0
    for query in range(len(rows)):
        nearest, best = -1, torch.inf
        for other in range(len(rows)):
            apart = (rows[query] - rows[other]).norm()
            if distance == "cosine":
                apart = 1 - rows[query] @ rows[other] / (rows[query].norm() * rows[other].norm())
            if other != query and apart < best:
                nearest, best = other, float(apart)
        right += int(labels[query] == labels[nearest])
    return right / len(rows)


@torch.no_grad()
def by_hand(folder: Path, encoder: Encoder) -> tuple[dict[str, Tensor], Tensor]:
    """What the encoder itself makes of the held-out images, layer by layer, and their labels."""
    recipe = open_run(folder).recipe
    assert recipe is not None
    test = recipe.data.build(workers=0).test
    assert test is not None
    assert test.labels is not None
    images = (test.read(torch.arange(len(test))).float() / 255 - 0.5) / 0.25
    embeddings = encoder.eval()(images[None]).embeddings[0]
    return {"backbone": encoder.backbone(images), "embedding": embeddings}, test.labels


def record(folder: Path, *args: str) -> dict[str, dict]:
    """The measurement of Recall@1 by kind of features."""
    assert cli.evaluate([str(folder), "tasks=retrieval", *QUICK, *args]) == 0
    return {row["features"]: row for row in measured(recorded(folder), "retrieval", metric="Recall@1")}


@pytest.mark.parametrize(
    ("args", "distance"),
    [
        (["objective=triplet"], "cosine"),
        (["objective=triplet", "objective.normalized=false", "objective.sampling.name=hard"], "euclidean"),
        (["objective=contrastive", "objective.normalized=false"], "euclidean"),
        (["objective=log_ratio", "values=pixels"], "euclidean"),
        (["objective=margin_softmax", "objective.preset=sphereface"], "cosine"),
        (["objective=triplet", "encoder.name=resnet18_small"], "cosine"),
        (["objective=triplet", "encoder.predictor.layers=2"], "cosine"),
        (["objective=in_batch"], "cosine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_each_layer_has_the_recall_of_what_the_encoder_makes_by_the_distance_that_is_trained(
    photographs: Path, tmp_path: Path, args: list[str], distance: str
) -> None:
    encoder = made(tmp_path / "run", photographs, *args)
    rows, labels = by_hand(tmp_path / "run", encoder)
    expected = {
        "learned": recall_at_1(rows["backbone"], labels, "cosine"),
        "learned (embedding)": recall_at_1(rows["embedding"], labels, distance),
    }
    assert len(set(expected.values())) == 2, "a mistaken layer would not be seen"
    if distance == "euclidean":
        assert recall_at_1(rows["embedding"], labels, "cosine") != expected["learned (embedding)"]
    actual = record(tmp_path / "run", "baselines=false")
    assert {kind: row["value"] for kind, row in actual.items()} == pytest.approx(expected)
    assert {kind: (row["layer"], row["distance"]) for kind, row in actual.items()} == {
        "learned": ("backbone", "cosine"),
        "learned (embedding)": ("embedding", distance),
    }
    leads = "learned" if args == ["objective=in_batch"] else "learned (embedding)"
    assert next(iter(actual)) == leads


def test_a_metric_that_is_asked_for_is_that_of_every_layer(photographs: Path, tmp_path: Path) -> None:
    encoder = made(tmp_path / "run", photographs, "objective=log_ratio", "values=pixels")
    rows, labels = by_hand(tmp_path / "run", encoder)
    for metric in ("cosine", "euclidean"):
        actual = record(tmp_path / "run", "baselines=false", f"metric={metric}")
        for row in actual.values():
            assert row["distance"] == metric
            assert row["value"] == pytest.approx(recall_at_1(rows[row["layer"]], labels, metric))


def test_every_objective_says_whether_it_compares_embeddings_and_by_what() -> None:
    settings = {member.model_fields["name"].default: member for member in get_args(get_args(Objective)[0])}
    compares = {name for name, member in settings.items() if member().traits.compares_embeddings}
    assert settings.keys() - compares == {
        *("in_batch", "cpc", "queue", "bank", "nearest_neighbours", "noise_contrastive")
    }
    assert {name for name, member in settings.items() if member().traits.distance == "euclidean"} == {"log_ratio"}
    assert LogRatio().traits.distance == "euclidean"
    for member in (Triplet, Contrastive):
        assert member(normalized=False, sampling={"name": "all"}).traits.distance == "euclidean"


def test_layer_chooses_and_the_default_follows_from_objective_and_tasks(photographs: Path, tmp_path: Path) -> None:
    learned, embedded = KINDS[:2]
    made(tmp_path / "triplet", photographs, "objective=triplet")
    made(tmp_path / "batch", photographs)
    for name, task, layer, kinds in [
        ("triplet", "knn", None, (embedded, learned)),
        ("triplet", "retrieval", None, (embedded, learned)),
        ("triplet", "retrieval", "both", (embedded, learned)),
        ("triplet", "retrieval", "backbone", (learned,)),
        ("triplet", "retrieval", "embedding", (embedded,)),
        ("batch", "knn", None, (learned,)),
        ("batch", "clustering", None, (learned, embedded)),
        ("batch", "knn", "both", (learned, embedded)),
        ("batch", "knn", "embedding", (embedded,)),
    ]:
        actual = measured_layers(open_run(tmp_path / name), EvaluateSettings(layer=layer), (task,))
        assert actual.kinds == kinds
        assert bool(actual.reason) == (len(kinds) == 2)


def test_probes_are_judged_by_the_backbone_and_comparisons_by_the_embedding_of_a_metric_learner(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "run", photographs, "objective=triplet")
    args = ["tasks=knn,linear,fractions,retrieval,clustering,verification,geometry", "few.draws=2", "few.shots=[2]"]
    args += ["few.shares=[0.5]", "protocol.verification.pairs=200", "maps=pca"]
    assert cli.evaluate([str(tmp_path / "run"), *args, *QUICK[:2]]) == 0
    actual = recorded(tmp_path / "run")
    judged = {(one["task"], one["features"], one["baseline"]) for one in actual["differences"]}
    by = {"knn": KINDS[:2], "linear": KINDS[:2], "retrieval": KINDS[1::-1], "verification": KINDS[1::-1]}
    assert judged == {(task, first, other) for task, (first, second) in by.items() for other in (second, *KINDS[2:])}
    layers = dict(zip(KINDS, ("backbone", "embedding", "backbone", None), strict=True))
    assert actual["layers"] == layers
    for row in actual["measurements"]:
        assert row["layer"] == layers[row["features"]]
    for task, first in (("knn", "learned"), ("retrieval", "learned (embedding)"), ("geometry", "learned")):
        assert measured(actual, task)[0]["features"] == first
    said = " ".join(capsys.readouterr().out.split())
    assert "Images are compared by the embedding, because objective=triplet trains it to be compared" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "by the cosine of their features, learned (embedding)," in page
    assert "objective=triplet trains it to be compared" in page
    assert "learned (backbone)" in page


def test_layers_alone_say_nothing_of_baselines(photographs: Path, tmp_path: Path) -> None:
    made(tmp_path / "run", photographs, "objective=triplet")
    record(tmp_path / "run", "baselines=false")
    actual = recorded(tmp_path / "run")["verdict"]
    assert actual.startswith("There is no baseline to compare with: by Recall@1, learned (embedding) features ")


def test_a_layer_measured_later_stands_beside_the_one_measured_before_and_each_has_its_own_sentence(
    photographs: Path, tmp_path: Path
) -> None:
    made(tmp_path / "run", photographs, "objective=triplet")
    record(tmp_path / "run", "layer=embedding")
    first = [row for row in recorded(tmp_path / "run")["measurements"] if row["features"] == "learned (embedding)"]
    assert set(record(tmp_path / "run", "layer=backbone")) == set(KINDS)
    assert all(row in recorded(tmp_path / "run")["measurements"] for row in first)
    verdict = recorded(tmp_path / "run")["verdict"]
    for kind in ("learned (backbone)", "learned (embedding)"):
        (sentence,) = (part for part in verdict.split("; ") if f"by Recall@1, {kind} features " in part)
        assert "random weights" in sentence
        assert "raw pixels" in sentence


def test_a_run_that_has_not_finished_is_measured_by_the_embedding_of_its_newest_checkpoint(
    photographs: Path, tmp_path: Path
) -> None:
    encoder = made(tmp_path / "run", photographs, "objective=triplet")
    shutil.rmtree(tmp_path / "run" / "backbone")
    opened = open_run(tmp_path / "run")
    rows, labels = by_hand(tmp_path / "run", encoder)
    actual = record(tmp_path / "run", "layer=embedding", "baselines=false")
    assert actual.keys() == {"learned (embedding)"}
    expected = recall_at_1(rows["embedding"], labels, "cosine")
    assert actual["learned (embedding)"]["value"] == pytest.approx(expected)
    # A live run may replace its checkpoints: the embedding is still that of the backbone that was opened.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert torch.equal(opened.head("embedding").module[0][0].weight, encoder.projector[0].weight)
    assert opened.head("embedding").origin == opened.origin


def test_an_embedding_that_is_lost_is_said_and_the_backbone_measured_and_asked_for_it_is_refused(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "run", photographs, "objective=triplet")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert record(tmp_path / "run", "baselines=false").keys() == {"learned"}
    said = " ".join(capsys.readouterr().out.split())
    assert "Only the backbone is measured, and not the embedding" in said
    assert "keep RUN/checkpoints beside RUN/backbone" in said
    for layer in ("embedding", "both"):
        assert cli.evaluate([str(tmp_path / "run"), "tasks=retrieval", f"layer={layer}"]) == 2
        assert "the only file with the embedding; use the backbone" in " ".join(capsys.readouterr().err.split())


def test_a_timm_model_has_no_embedding_to_extract(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["resnet18_small", "pretrained=false", f"data={photographs}", f"output={tmp_path / 'features'}"]
    assert cli.extract([*args, "layers=embedding", "size=28"]) == 2
    assert "has no embedding; only a run has one: use backbone" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "features").exists()


def test_extract_writes_the_embedding_that_evaluate_measures(photographs: Path, tmp_path: Path) -> None:
    encoder = made(tmp_path / "run", photographs, "objective=triplet", "encoder.predictor.layers=2")
    args = [str(tmp_path / "run"), "split=test", "layers=embedding,projector", f"output={tmp_path / 'features'}"]
    assert cli.extract(args) == 0
    rows, _ = by_hand(tmp_path / "run", encoder)
    for name in ("embedding", "projector"):
        actual = torch.from_numpy(np.load(tmp_path / "features" / f"{name}.npy"))
        assert torch.allclose(actual, rows["embedding"], atol=1e-5) == (name == "embedding")


def test_features_of_each_layer_are_kept_apart_and_used_again(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "run", photographs, "objective=triplet")
    first = record(tmp_path / "run")
    folders = {folder.name.rpartition("-")[0] for folder in (tmp_path / "run" / "features").iterdir()}
    assert folders == {"backbone", "embedding", "backbone-untrained"}
    capsys.readouterr()
    assert record(tmp_path / "run") == first
    assert "encoding" not in capsys.readouterr().out


def test_several_runs_are_compared_each_by_the_layer_that_its_objective_trains(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {name: tmp_path / name for name in ("triplet", "batch")}
    made(folders["triplet"], photographs, "objective=triplet", f"output={folders['triplet']}")
    made(folders["batch"], photographs, f"output={folders['batch']}")
    # Of another backbone, so that it is no copy, and without an embedding.
    shutil.rmtree(folders["batch"] / "checkpoints")
    weights = load_file(folders["batch"] / "backbone" / "model.safetensors")
    moved = {name: value * 1.01 if value.dim() == 4 else value for name, value in weights.items()}
    save_file(moved, folders["batch"] / "backbone" / "model.safetensors")
    out = tmp_path / "table.json"
    args = [str(folders["triplet"]), str(folders["batch"]), "tasks=retrieval,knn", *QUICK, f"comparison={out}"]
    assert cli.evaluate(args) == 0
    rows = json.loads(out.read_text())["rows"]
    own = {row["name"]: row["layers"] for row in rows}
    assert list(own.values()) == [
        {"kNN": "backbone", "Recall@1": "embedding"},
        {"kNN": "backbone", "Recall@1": "backbone"},
        {},
        {},
    ]
    kept = measured(recorded(folders["triplet"]), "retrieval", metric="Recall@1")
    assert rows[0]["values"]["Recall@1"] == [kept[0]["value"]]
    assert kept[0]["layer"] == "embedding"
    said = capsys.readouterr().out
    assert "(embedding)" in said
    assert said.count("measuring ") > 1
    # The backbone alone is in the records already.
    assert cli.evaluate([*args, "layer=backbone"]) == 0
    assert "measuring " not in capsys.readouterr().out
    assert all(set(row["layers"].values()) <= {"backbone"} for row in json.loads(out.read_text())["rows"])
