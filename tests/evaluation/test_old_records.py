"""An evaluation.json that has a list for each kind of result, as was once written: merged into, shown and compared."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from manyviews import cli
from manyviews.config import load
from manyviews.evaluation import EvaluateSettings
from manyviews.evaluation.compare_runs import Shared, measured_before
from manyviews.evaluation.method_rows import rows_of
from manyviews.evaluation.old_records import converted
from manyviews.evaluation.record import evaluation_of, key_of, records_in
from manyviews.evaluators.results.tables import sheets
from manyviews.features.backbone import open_run
from recorded import measured, recorded
from small_run import photographs, small_run

OLD = json.loads((Path(__file__).parent / "evaluation_of_lists.json").read_text())
GRID = ["protocol.knn.neighbours=[1,5]", "protocol.linear.regularisations=[0.1,1]", "protocol.augmented.epochs=1"]
GRID += ["protocol.verification.pairs=60", "protocol.verification.folds=3", "few.draws=2", "few.shares=[0.5]"]
GRID += ["few.shots=[2]", "few.regularisations=[0.1]", "maps=[]", "cache=false"]


def numbers(record: dict, *key: str) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in record["measurements"] if (row["task"], row["features"]) == key}


def test_every_key_of_the_lists_is_a_measurement() -> None:
    record = converted(OLD)
    rows = {(row["task"], row["features"], row["metric"]): row for row in record["measurements"]}
    left = set(rows)
    for score in OLD["scores"]:
        row = rows[score["method"], score["features"], "accuracy"]
        assert [row["value"], row["low"], row["high"]] == [score["accuracy"], score["low"], score["high"]]
        assert (row["n"], row["dim"], row["layer"]) == (score["num_test"], score["dim"], score["layer"])
        chosen = {name: score[name] for name in ("neighbours", "temperature", "regularisation", "rate", "decay")}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        assert row["details"] == {"validation": score["validation"], "num_train": score["num_train"], **chosen}
        assert rows[score["method"], score["features"], "balanced accuracy"]["value"] == score["balanced"]
        left -= {(score["method"], score["features"], name) for name in ("accuracy", "balanced accuracy")}
    for figures in OLD["figures"]:
        for name, value in figures["values"].items():
            row = rows[figures["task"], figures["features"], name]
            assert (row["value"], row["deviation"]) == (value, figures["deviations"].get(name))
            assert [row["low"], row["high"]] == figures["intervals"].get(name, [None, None])
            assert (row["n"], row["distance"]) == (next(iter(figures["counts"].values())), figures["metric"])
            left.remove((figures["task"], figures["features"], name))
    for kind, results in OLD["fractions"].items():
        for result in results:
            row = rows["fractions", kind, result["name"]]
            assert row["details"] == {name: result[name] for name in ("accuracies", "regularisations")}
            assert row["value"] == pytest.approx(sum(result["accuracies"]) / 2)
            left.remove(("fractions", kind, result["name"]))
    for lies in OLD["geometry"]:
        kind, names = lies["features"], ("effective rank", "uniformity", "alignment")
        assert numbers(record, "geometry", kind) == {name: lies[name.replace(" ", "_")] for name in names}
        left -= {("geometry", kind, name) for name in names}
    stale = OLD["staleness"]
    assert numbers(record, "staleness", "memory bank") == {"mean": stale["mean"], **stale["quantiles"]}
    left -= {("staleness", "memory bank", name) for name in ("mean", *stale["quantiles"])}
    assert not left
    assert evaluation_of(record).verdict() == OLD["verdict"]
    assert converted(record) == record


def test_every_table_is_made_of_an_old_record_and_its_kept_ones() -> None:
    (newest, _), (kept, _) = records_in(OLD)
    titles = [sheet.title.split()[0] for sheet in sheets(evaluation_of(newest))]
    probes = ["Accuracy", "Balanced"] * 2
    assert titles == [*probes, "Retrieval", "Clustering", "Verification", "Linear", "Geometry", "Staleness"]
    assert [sheet.title.split()[0] for sheet in sheets(evaluation_of(kept))] == ["Accuracy", "Balanced", "Linear"]
    # New settings of the protocol are those by default, and nothing else changes that results depend on.
    assert key_of(newest | {"protocol": OLD["protocol"]}) == key_of(OLD)
    for name, settings in OLD["protocol"].items():
        own = newest["protocol"][name]
        assert own == settings or own.items() > settings.items(), name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was measured by kNN, of which the record is then as old as can be."""
    root = tmp_path_factory.mktemp("old")
    data = f"data={photographs(root / 'own')}"
    small_run(root / "run", data, "data.size=28", "data.channels=1", "data.holdout=0.4")
    (root / "run" / "done").touch()
    assert cli.evaluate([str(root / "run"), *GRID, "tasks=knn", "layer=backbone", "report=false"]) == 0
    new = recorded(root / "run")
    same = {name: new[name] for name in ("weights", "images", "classes", "precision", "protocol", "metric", "few")}
    assert key_of(converted(OLD | {"weights": new["weights"], "images": new["images"]})) == key_of(new)
    outcomes = hashlib.sha256((root / "run" / "outcomes.safetensors").read_bytes()).hexdigest()
    kept = [record | {"weights": new["weights"], "images": new["images"]} for record in OLD["kept"]]
    old = OLD | same | {"outcomes": outcomes, "kept": kept}
    (root / "run" / "evaluation.json").write_text(json.dumps(old, indent=1))
    return root / "run"


def test_new_results_are_merged_into_an_old_file_and_the_report_shows_both(made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made, tmp_path / "run")
    assert cli.evaluate([str(run), *GRID, "tasks=linear", "layer=backbone", "baselines=false"]) == 0
    record, before = recorded(run), converted(OLD)
    fresh = measured(record, "linear")[0]
    assert fresh["n"] == len(load_file(run / "outcomes.safetensors")["labels"])
    others = [row for row in before["measurements"] if (row["task"], row["features"]) != ("linear", "learned")]
    assert all(row in record["measurements"] for row in others)
    assert record["tasks"] == OLD["tasks"]
    assert record["kept"][0]["measurements"] == converted(OLD["kept"][0])["measurements"]
    page = (run / "report.html").read_text()
    assert f"{100 * fresh['value']:.1f}" in page
    for title in ("Clustering by cosine", "Staleness of the bank", "With protocol.seed=1: Accuracy on"):
        assert title in page


def test_an_old_file_holds_all_that_a_comparison_asks_for(made: Path) -> None:
    settings = load(EvaluateSettings, None, [*GRID, "tasks=knn,retrieval,fractions,geometry", "layer=backbone"])
    opened, record = open_run(made), recorded(made)
    assert opened.recipe is not None
    test = opened.recipe.data.build(workers=0).test
    assert test is not None
    images = Shared(test, record["images"], labelled=True)
    before = measured_before(opened, images, settings)
    assert before is not None
    rows, _ = rows_of([before, before], settings.tasks, baselines=True)
    assert [row.name for row in rows[1:]] == ["random weights", "raw pixels"]
    recall = next(own for own in OLD["figures"] if own["task"] == "retrieval" and own["features"] == "learned")
    assert rows[0].values("Recall@1") == [recall["values"]["Recall@1"]] * 2
    assert rows[0].hits["knn"].shape == (2, len(test))
    assert measured_before(opened, images, settings.model_copy(update={"precision": "bf16"})) is None
