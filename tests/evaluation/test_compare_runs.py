"""Several runs in one table: what is measured anew, what is refused, and what the table is made of."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manyviews import cli
from manyviews.config import load
from manyviews.evaluation import EvaluateSettings
from manyviews.evaluation.compare_runs import Shared, compare_runs, measured_before
from manyviews.evaluators.geometry import neighbourhood_overlap
from manyviews.features.backbone import open_run
from small_run import photographs, small_run

GRID = ["protocol.knn.neighbours=[1, 5]", "protocol.linear.regularisations=[0.1]", "report=false"]
QUICK = [*GRID, "tasks=knn,geometry,retrieval"]


def pretend(folder: Path, seed: int, *args: str) -> Path:
    """A run whose weights are its own."""
    small_run(folder, f"seed={seed}", f"output={folder}", "data.size=28", "data.channels=1", "data.holdout=0.4", *args)
    (folder / "done").touch()
    file = folder / "backbone" / "model.safetensors"
    generator, weights = torch.Generator().manual_seed(zlib.crc32(folder.name.encode())), load_file(file)
    moved = {
        name: value + 0.1 * value.std() * torch.randn(value.shape, generator=generator) if value.dim() == 4 else value
        for name, value in weights.items()
    }
    save_file(moved, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one method and one run of another, measured."""
    root = tmp_path_factory.mktemp("compared")
    data = f"data={photographs(root / 'photographs')}"
    runs = [pretend(root / f"batch-{seed}", seed, data, "objective.temperature=0.1") for seed in (0, 1)]
    runs.append(pretend(root / "queue", 0, data, "objective.temperature=0.5"))
    assert cli.evaluate([*map(str, runs), *QUICK]) == 0
    return runs


@pytest.fixture
def runs(made: list[Path], tmp_path: Path) -> list[Path]:
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in made]


def outcome(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "outcomes.safetensors")


def test_rows_are_methods_and_baselines_and_their_numbers_those_of_the_runs(runs: list[Path]) -> None:
    actual = compare_runs(runs, load(EvaluateSettings, None, QUICK))
    assert [row.name for row in actual.rows] == [
        "objective.temperature=0.1",
        "objective.temperature=0.5",
        "random weights",
        "raw pixels",
    ]
    first, second, random, pixels = actual.rows
    assert [row.seeds for row in actual.rows] == [(0, 1), (0,), (0, 1), (0,)]
    assert list(first.measured) == ["kNN", "Recall@1", "effective rank", "uniformity", "alignment"]
    for title, task in (("kNN", "knn"), ("Recall@1", "retrieval")):
        for row, folders in ((first, runs[:2]), (second, runs[2:])):
            expected = [(outcome(folder)[f"hits/{task}/learned"] == 1).double().mean().item() for folder in folders]
            assert row.values(title) == pytest.approx(expected)
    lying = (*random.measured["uniformity"], *pixels.measured["uniformity"])
    assert [own.features for own in lying] == ["random weights"] * 2 + ["raw pixels"]
    gaps = {(own.features, own.task): own for own in actual.differences}
    own = gaps["objective.temperature=0.5", "knn"]
    assert own.difference == pytest.approx(np.mean(second.values("kNN")) - np.mean(first.values("kNN")))
    assert own.low <= own.difference <= own.high
    assert len(gaps) == 6


def test_the_overlap_is_that_of_the_features_of_first_runs_and_of_two_seeds(runs: list[Path]) -> None:
    actual = compare_runs(runs, load(EvaluateSettings, None, QUICK))
    one, seed, other = (
        torch.from_numpy(np.load(next(path for path in sorted((folder / "features").rglob("*.npy")) if fits(path))))
        for folder in runs
    )
    assert [(own.first, own.second) for own in actual.overlaps] == [
        ("objective.temperature=0.1", "objective.temperature=0.1"),
        ("objective.temperature=0.1", "objective.temperature=0.5"),
    ]
    k = actual.neighbours
    assert k == 10
    assert [own.share for own in actual.overlaps] == [
        pytest.approx(neighbourhood_overlap(one, seed, k)),
        pytest.approx(neighbourhood_overlap(one, other, k)),
    ]


def fits(file: Path) -> bool:
    """Whether these are learned features of the test images, the fewer ones."""
    manifest = json.loads((file.parent / "manifest.json").read_text())
    return "untrained" not in manifest["weights"] and len(np.load(file, mmap_mode="r")) < 30


def test_only_what_is_not_measured_yet_or_has_other_weights_is_measured(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*args: str) -> list[str]:
        assert cli.evaluate([*map(str, runs), *QUICK, *args]) == 0
        return [line.split()[1].strip(",") for line in capsys.readouterr().out.splitlines() if "measuring" in line]

    before = [(folder / "evaluation.json").read_text() for folder in runs]
    assert measured() == []
    assert measured("baselines=false") == []
    assert [(folder / "evaluation.json").read_text() for folder in runs] == before
    (runs[0] / "outcomes.safetensors").unlink()
    file = runs[2] / "backbone" / "model.safetensors"
    weights = load_file(file)
    save_file({name: 1.5 * value if value.dim() == 4 else value for name, value in weights.items()}, file)
    assert measured() == [str(runs[0]), str(runs[2])]


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        ([], True),
        (["tasks=retrieval", "maps=[]", "batch_size=7"], True),
        (["tasks=knn", "classes=dark,light"], True),
        (["tasks=retrieval", "classes=dark,light"], False),
        (["tasks=knn,linear"], False),
        (["tasks=knn", "protocol.seed=1"], False),
        (["tasks=knn", "metric=euclidean"], False),
        (["tasks=knn", "precision=bf16"], False),
    ],
)
def test_what_was_measured_stands_for_all_that_follows_from_it_alone(
    made: list[Path], args: list[str], *, kept: bool
) -> None:
    asked = [*QUICK[:-1], *(args if any("tasks" in word for word in args) else [*args, QUICK[-1]])]
    settings, opened = load(EvaluateSettings, None, asked), open_run(made[0])
    record = json.loads((made[0] / "evaluation.json").read_text())
    images = Shared(opened.recipe.data.build().test, record["images"], labelled=True)
    assert (measured_before(opened, images, settings) is not None) is kept
    changed = images._replace(fingerprints=["another", record["images"][1]])
    assert measured_before(opened, changed, settings) is None


def test_the_comparison_goes_to_a_file_and_nothing_else_into_the_runs(runs: list[Path], tmp_path: Path) -> None:
    before = sorted(path for folder in runs for path in folder.rglob("*"))
    file = tmp_path / "comparison.json"
    assert cli.evaluate([*map(str, runs), *QUICK, f"comparison={file}"]) == 0
    record = json.loads(file.read_text())
    assert [row["name"] for row in record["rows"]][-2:] == ["random weights", "raw pixels"]
    assert record["images"] == len(outcome(runs[0])["labels"])
    assert sorted(path for folder in runs for path in folder.rglob("*")) == before


def test_seeds_of_one_method_are_called_by_what_their_folders_have_in_common(runs: list[Path]) -> None:
    actual = compare_runs(runs[:2], load(EvaluateSettings, None, [*QUICK, "baselines=false"]))
    assert [(row.name, row.runs) for row in actual.rows] == [("batch", tuple(map(str, runs[:2])))]
    assert actual.differences == ()


def test_figures_that_not_all_runs_have_are_left_out_with_a_word(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs[2] / "config.yaml"
    config.write_text(config.read_text().replace("unseen: []", "unseen: [dark, light]"))
    args = [str(runs[0]), str(runs[2]), *GRID, "baselines=false"]
    (runs[2] / "evaluation.json").unlink()
    assert cli.evaluate([*args, "few.shares=[0.5]", "few.shots=[2]", "few.draws=2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Recall@1: left out, because not all runs have it" in shown
    assert "linear" in shown
    assert cli.evaluate([*args, "tasks=retrieval"]) == 2
    assert "the runs were measured on different classes" in " ".join(capsys.readouterr().err.split())


def test_mistakes_are_one_sentence(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, same, other = map(str, runs)
    foreign = str(pretend(tmp_path / "foreign", 5, f"data={photographs(tmp_path / 'others', 19)}"))
    copied = str(shutil.copytree(runs[0], tmp_path / "copied"))
    for args, message in (
        ([one, str(tmp_path / "nowhere")], "nowhere is no run folder"),
        ([one, other, f"{one}/"], "is named twice"),
        ([one, copied], f"{copied} has the same weights as {one}"),
        ([one, same, foreign], f"are not the same: {one}, {same} | {foreign}"),
        ([one, other, f"comparison={tmp_path}"], "cannot be written"),
        ([one, f"comparison={tmp_path / 'x.json'}"], "for several runs, and there is one"),
        ([one, other, "tasks=knm"], "did you mean knn?"),
        ([one, "tasks=knn", other], "is not of the form key=value"),
    ):
        assert cli.evaluate([*args, *GRID]) == 2, args
        assert message in capsys.readouterr().err
