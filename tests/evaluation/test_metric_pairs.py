"""`manyviews evaluate metric=mmc metric.relations=FILE`: the metric is fitted on the pairs of the file."""

from pathlib import Path

import pytest
import torch

from manyviews import cli
from manyviews.data import Split
from manyviews.features.backbone import open_run
from manyviews.features.encoding import EncodeSettings, extract, images_of
from manyviews.features.layers import EMBEDDING, OneLayer, layers_of
from manyviews.linear_metrics import MMC, LinearMetric
from manyviews.system.console import Console
from recorded import measured, recorded
from small_run import photographs, small_run

BARE = ["tasks=knn", "layer=embedding", "baselines=false", "maps=[]", "report=false", "cache=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    data = photographs(root / "images")
    small_run(root / "run", f"data={data}", "data.channels=1", "data.holdout=0.4")
    (root / "run" / "done").touch()
    return root / "run"


def split_of(run: Path) -> Split:
    return images_of(open_run(run), EncodeSettings(), Console(quiet=True))


def written(file: Path, pairs: list[tuple[str, str]], same: list[float]) -> Path:
    rows = [f"{first},{second},{value}" for (first, second), value in zip(pairs, same, strict=True)]
    file.write_text("\n".join(["a,b,same", *rows]))
    return file


def test_the_metric_is_that_of_the_pairs_of_training_images_that_may_be_seen(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = split_of(run)
    train, labels = split.train, split.train.labels
    assert labels is not None
    assert split.test is not None
    pairs = torch.combinations(torch.arange(len(train)))[::7]
    same = (labels[pairs[:, 0]] == labels[pairs[:, 1]]).double() * 0.75
    names = [(train.names[first], train.names[second]) for first, second in pairs.tolist()]
    file = written(tmp_path / "pairs.csv", [*names, (names[0][0], split.test.names[0])], [*same.tolist(), 1.0])
    args = [str(run), *BARE, "metric=mmc", f"metric.relations={file}", f"output={tmp_path / 'out'}", "classes=light"]
    assert cli.evaluate(args) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert f"left out 1 of {len(names) + 1} relations" in output
    kept = (labels[pairs] != train.classes.index("light")).all(1)
    assert f"{int((~kept).sum())} pairs of classes that are to stay unseen left out" in output
    opened = open_run(run)
    features = extract(OneLayer(layers_of(opened, (EMBEDDING,))[0]), train, view=opened.view)
    expected = MMC().fit_pairs(features, pairs[kept], same[kept])
    actual = LinearMetric.load(tmp_path / "out" / "metrics" / "mmc" / "learned_embedding.safetensors")
    torch.testing.assert_close(actual.weights, expected.weights, rtol=1e-3, atol=1e-3)
    assert actual.figures["pairs"] == int(kept.sum())
    for row in measured(recorded(tmp_path / "out"), "knn"):
        assert row["distance"] == "mmc"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; "),
        ("anchor,positive,negative\n{0},{1},{2}", "holds no pairs: metric=mmc is fitted on pairs of images"),
        ("a,b,same\n{0},{1},1\n{0},{2},1", "none of the 2 pairs is dissimilar"),
        ("a,b,same\n{0},{1},1\n{0},nobody.png,0", "line 3: 'nobody.png' is not among the"),
    ],
)
def test_what_is_no_file_of_pairs_is_refused_before_anything_is_encoded(
    content: str | None, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.csv"
    if content is not None:
        file.write_text(content.format(*split_of(run).train.names))
    assert cli.evaluate([str(run), *BARE, "metric=mmc", f"metric.relations={file}"]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "encod" not in captured.out


def test_other_metrics_have_no_relations(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lmnn", "mahalanobis"):
        assert cli.evaluate([str(run), *BARE, f"metric={name}", "metric.relations=pairs.csv"]) == 2
        assert "there is no key metric.relations: it belongs to metric=mmc" in capsys.readouterr().err
