"""What the benchmarks of objectives tell: trained and measured in small."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contrastive import command

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from benchmarks import harness, objectives, sampling

COLUMNS = ["Recall@1, backbone", "Recall@1, embedding", "MAP@R, backbone", "MAP@R, embedding"]
SMALL = "encoder.projector.dim=4 train.batch_size=20 data.size=12 data.channels=1"


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Ten classes of few small images, and runs of two steps in this process."""
    for number in range(10):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        for index in range(12):
            draw = np.random.default_rng((number, index))
            pixels = draw.normal(40 + 18 * number, 20, (12, 12)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / str(number) / f"{index}.png")

    def commands(_: int, *lines: Sequence[str]) -> None:
        for name, *words in lines:
            words += ["data.size=12", "data.channels=1", "data.holdout=0.5"] if name == "evaluate" else []
            assert getattr(command, name)(words) == 0

    class InTurn(contextlib.nullcontext[None]):
        """Signals are heard in the main thread alone."""

        def __enter__(self) -> "InTurn":
            return self

        map = staticmethod(map)

    monkeypatch.setattr(harness, "commands", commands)
    monkeypatch.setattr(objectives, "ThreadPoolExecutor", InTurn)
    parser = argparse.ArgumentParser()
    objectives.add_options(parser)
    data = str(tmp_path / "images")
    words = ["--epochs", "0.5", "--seeds", "1", "--data", data, "--gallery", data, "--keep", str(tmp_path / "runs")]
    return parser.parse_args(words)


def test_objectives_show_backbone_and_embedding_side_by_side(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "VIEWS", {"in_batch: NT-Xent": f"simclr data.holdout=0.5 {SMALL}"})
    small = f"facenet train.images_per_class=4 data.holdout=0.5 {SMALL}"
    monkeypatch.setattr(objectives, "LABELS", {"triplet, semi-hard": small})
    report = objectives.run(options)
    batch, triplet, random, pixels = report.rows
    assert [row["objective"] for row in report.rows[2:]] == ["random weights", "raw pixels"]
    assert (batch["judged by"], triplet["judged by"]) == ("backbone", "embedding")
    assert list(batch)[4:8] == COLUMNS
    for row, name in ((batch, "in-batch--NT-Xent--views--0"), (triplet, "triplet--semi-hard--labels--0")):
        kept = json.loads((options.keep / name / "evaluation.json").read_text())["figures"]
        for figures in kept:
            if figures["features"].startswith("learned"):
                value = row[f"Recall@1, {figures['layer']}"]
                assert isinstance(value, harness.Spread)
                assert value.median == pytest.approx(100 * figures["values"]["Recall@1"])
    assert not {"Recall@1, embedding", "epochs"} & {key for key, value in random.items() if value is not None}
    assert isinstance(pixels["MAP@R, backbone"], harness.Spread)
    harness.show(report)


def test_sampling_shows_what_was_published_beside_both_layers(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = (*f"facenet train.images_per_class=4 data.holdout=0.5 {SMALL}".split(),)
    monkeypatch.setattr(sampling, "LOSSES", {"triplet, squared distances": small})
    monkeypatch.setattr(sampling, "SAMPLERS", {"semi-hard": "semi_hard"})
    first, *_ = sampling.run(options).rows
    assert set(COLUMNS) <= first.keys()
    assert (first["judged by"], first["published"]) == ("embedding", 49.7)
