"""Rankings judged by classes, values and files, and clusters as output, from the command line."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score

from manyviews import cli
from manyviews.config import load
from manyviews.data import Images
from manyviews.evaluation.settings import EvaluateSettings, planned_tasks
from manyviews.recipe import Recipe
from recorded import measured, recorded, values
from small_run import photographs as make_photographs
from small_run import small_run

BARE = ["baselines=false", "report=false", "maps=[]"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("photographs") / "images", 14, step=25)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """A run by the values of its images."""
    folder = tmp_path_factory.mktemp("runs") / "by-values"
    data = [f"data={photographs}", "data.size=28", "data.channels=1", "data.holdout=0.5"]
    small_run(folder, *data, "objective=log_ratio", "values=pixels", "encoder.projector.dim=3")
    return folder


def held_out(run: Path) -> Images:
    """The images that a run holds out."""
    test = load(Recipe, run / "config.yaml").data.build(workers=0).test
    assert test is not None
    return test


def test_a_run_by_values_is_judged_by_them_and_by_its_embeddings_distance_without_being_asked(
    run: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    quick = ["protocol.knn.neighbours=[1]", "protocol.linear.regularisations=[0.1]", "few.shares=[0.5]", "few.shots=[]"]
    assert cli.evaluate([str(own), *BARE, *quick, "few.draws=2"]) == 0
    record = recorded(own)
    ranked = measured(record, "ranking", metric="NDCG@10")
    assert [(row["features"], row["distance"]) for row in ranked] == [
        ("learned (embedding)", "euclidean"),
        ("learned", "cosine"),
    ]
    assert ranked[0]["details"]["by"] == "1 / (1 + distance of values=pixels)"
    assert ranked[0]["low"] < ranked[0]["value"] < ranked[0]["high"]
    by_query = load_file(own / "outcomes.safetensors")["values/ranking/learned (embedding)"]
    assert ranked[0]["value"] == pytest.approx(by_query.nanmean().item(), rel=1e-6)
    (lead,) = [row for row in record["differences"] if row["task"] == "ranking"]
    assert (lead["features"], lead["baseline"]) == ("learned (embedding)", "learned")
    assert lead["difference"] == pytest.approx(ranked[0]["value"] - ranked[1]["value"])


def test_tasks_follow_from_values_relations_and_labels() -> None:
    by_values, plain = Recipe(objective={"name": "log_ratio"}, values="pixels"), Recipe()
    assert planned_tasks(EvaluateSettings(), by_values, labelled=False) == ("ranking", "geometry")
    assert "ranking" in planned_tasks(EvaluateSettings(), by_values, labelled=True)
    assert "ranking" not in planned_tasks(EvaluateSettings(), plain, labelled=True)
    assert "ranking" in planned_tasks(EvaluateSettings(relations="x.csv"), plain, labelled=False)
    with pytest.raises(ValueError, match=r"relations=x\.csv is for tasks=ranking, and tasks=geometry; add it"):
        planned_tasks(EvaluateSettings(relations="x.csv", tasks="geometry"), plain, labelled=False)


def test_lists_and_triplets_of_a_file_are_judged_as_by_hand(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    images = held_out(own)
    names = list(images.names)
    lists = ["query,item,relevance", *(f"{names[0]},{name},{number % 4}" for number, name in enumerate(names[1:]))]
    (tmp_path / "lists.csv").write_text("\n".join(lists))
    args = ["tasks=ranking", "maps=[]", "report=false", "layer=backbone"]
    assert cli.evaluate([str(own), *args, f"relations={tmp_path / 'lists.csv'}"]) == 0
    rows = images.read(torch.arange(len(names))).flatten(1).double().numpy()
    cosines = rows[1:] @ rows[0] / np.linalg.norm(rows[1:], axis=1) / np.linalg.norm(rows[0])
    relevances = np.arange(len(names) - 1) % 4
    record = recorded(own)
    assert values(record, "ranking", "NDCG@10")["raw pixels"] == pytest.approx(
        ndcg_score(relevances[None], cosines[None], k=10), rel=1e-5
    )
    assert values(record, "ranking", "Kendall τ-b")["raw pixels"] == pytest.approx(
        kendalltau(relevances, cosines).statistic, rel=1e-5
    )
    assert record["relations"].startswith("lists.csv sha256:")
    triplets = ["anchor,positive,negative", *(f"{names[a]},{names[a + 1]},{names[a + 2]}" for a in range(12))]
    (tmp_path / "triplets.csv").write_text("\n".join(triplets))
    assert cli.evaluate([str(own), *args, f"relations={tmp_path / 'triplets.csv'}"]) == 0
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    right = sum(unit[a] @ unit[a + 1] > unit[a] @ unit[a + 2] for a in range(12))
    assert values(recorded(own), "ranking", "right order")["raw pixels"] == pytest.approx(right / 12)
    # Results by another file are kept beside.
    assert values(recorded(own)["kept"][0], "ranking", "NDCG@10").keys() >= {"raw pixels"}


@pytest.mark.parametrize(
    ("lines", "args", "message"),
    [
        (
            ["a,b,same", "{0},{1},1"],
            [],
            "has pairs, which put no images into an order; judge pairs by tasks=verification",
        ),
        (["query,item,relevance", "{0},{1},1", "{0},nowhere.png,1"], [], "line 3: 'nowhere.png' is not among the"),
        (["anchor,positive,negative", "{0},{1}"], [], "line 2: 2 columns, where the header has 3"),
        (None, ["relations=missing.csv"], "relations=missing.csv does not exist"),
        (None, ["protocol.ranking.by=clas"], "neither class, pixels nor labels .* did you mean class"),
    ],
)
def test_a_file_that_orders_nothing_or_names_no_image_is_refused_before_the_work(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lines: list[str] | None,
    args: list[str],
    message: str,
) -> None:
    if lines is not None:
        (tmp_path / "file.csv").write_text("\n".join(lines).format(*held_out(run).names))
        args = [f"relations={tmp_path / 'file.csv'}"]
    assert cli.evaluate([str(run), "tasks=ranking", *args, *BARE]) == 2
    captured = capsys.readouterr()
    assert "encoding" not in captured.out
    assert re.search(message, " ".join(captured.err.split())), captured.err


def test_clusters_are_written_with_names_and_distances_the_largest_first(run: Path, tmp_path: Path) -> None:
    args = ["tasks=clustering", "baselines=false", "maps=[]", f"output={tmp_path / 'out'}"]
    assert cli.evaluate([str(run), *args]) == 0
    with (tmp_path / "out" / "clusters.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(held_out(run).names)
    assert sorted(row["name"] for row in rows) == sorted(names)
    clusters, distances = [int(row["cluster"]) for row in rows], [float(row["distance"]) for row in rows]
    assert sorted(zip(clusters, distances, strict=True)) == list(zip(clusters, distances, strict=True))
    sizes = np.bincount(clusters).tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 3
    kept = load_file(tmp_path / "out" / "outcomes.safetensors")["predictions/clustering/learned (embedding)"]
    assert {row["name"]: int(row["cluster"]) for row in rows} == dict(zip(names, kept.tolist(), strict=True))
    assert values(recorded(tmp_path / "out"), "clustering", "purity").keys() == {"learned (embedding)", "learned"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<section id="clusters"' in page
    assert "All, the purest first" in page


def test_without_labels_images_are_clustered_and_ranked_by_their_pixels(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in photographs.rglob("*.png"):
        shutil.copy(file, flat / f"{file.parent.name}-{file.name}")
    args = [
        f"data={flat}",
        "data.size=28",
        "data.channels=1",
        "maps=[]",
        f"output={tmp_path / 'out'}",
        "baselines=false",
    ]
    assert cli.evaluate([str(run), *args, "tasks=clustering,ranking", "protocol.clustering.largest_k=5"]) == 0
    record = recorded(tmp_path / "out")
    metrics = {row["metric"] for row in measured(record, "clustering")}
    assert metrics == {"silhouette", "clusters", "largest"}
    (own,) = measured(record, "clustering", metric="clusters")[:1]
    tried = {int(k): value for k, value in own["details"]["silhouettes"].items()}
    assert own["value"] == max(tried, key=lambda k: tried[k])
    assert measured(record, "ranking", metric="NDCG@10")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "All, by size" in page
    assert '<section id="ranking"' in page
    assert "the number of clusters chosen by silhouette among 2 to 5" in " ".join(capsys.readouterr().out.split())
    # The class of an image takes labels.
    assert cli.evaluate([str(run), *args, "tasks=ranking", "protocol.ranking.by=class"]) == 2
    assert "ranking by class takes images of 2 classes or more, and these have 0" in capsys.readouterr().err


def test_identities_are_clustered_by_the_threshold_of_an_earlier_verification(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    args = [str(own), "tasks=clustering", "protocol.clustering.k=threshold", *BARE]
    assert cli.evaluate(args) == 2
    assert "measure it by tasks=verification first" in capsys.readouterr().err
    assert cli.evaluate([str(own), "tasks=verification", "protocol.verification.pairs=60", *BARE]) == 0
    threshold = values(recorded(own), "verification", "threshold")["learned (embedding)"]
    assert cli.evaluate([*args, "layer=embedding"]) == 0
    (clusters,) = measured(recorded(own), "clustering", metric="clusters")
    assert clusters["details"]["threshold"] == threshold
    assert clusters["details"]["linkage"] == "average"


def test_values_of_training_images_alone_do_not_rank_those_held_out(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "values.npy", np.arange(21.0))
    data = [f"data={photographs}", "data.size=28", "data.channels=1", "data.holdout=0.5"]
    small_run(tmp_path / "run", *data, "objective=log_ratio", f"values={tmp_path / 'values.npy'}")
    assert cli.evaluate([str(tmp_path / "run"), "tasks=ranking", *BARE]) == 2
    assert "none for those held out; name a .csv with theirs by protocol.ranking.by=FILE" in capsys.readouterr().err
    names = held_out(tmp_path / "run").names
    (tmp_path / "held.csv").write_text("name,x\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names)))
    args = ["tasks=ranking", f"protocol.ranking.by={tmp_path / 'held.csv'}"]
    assert cli.evaluate([str(tmp_path / "run"), *args, *BARE]) == 0
    assert measured(recorded(tmp_path / "run"), "ranking", metric="Kendall τ-b")
