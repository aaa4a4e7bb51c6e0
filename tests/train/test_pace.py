"""The paces that `--check` measures, and what it concludes from them."""

import re
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from manyviews import cli
from manyviews.train import pace
from manyviews.train.pace import Pace

WORDS = ["train.precision=fp32", "train.threads=1", "train.preview=2", "data.memory=0", "data.holdout=0"]


def test_a_run_is_as_fast_as_its_slowest_part() -> None:
    made = Pace(30.0, 900.0, 90.0, cores=16, threads=1)
    assert [made.reached(workers) for workers in (1, 2)] == [30, 60]
    assert made.reached(8) == made.learning == pytest.approx(1 / (1 / 900 + 1 / 90))
    assert made.reached(0) == pytest.approx(1 / (1 / 30 + 1 / made.learning))


def test_workers_and_encoder_share_the_cores() -> None:
    """Two cores for an image that takes one of them 40 ms to decode and both 20 ms to learn from."""
    made = Pace(25.0, 1e9, 50.0, cores=2, threads=2)
    assert made.reached(1) == pytest.approx(25)
    assert made.reached(4) == pytest.approx(2 / (0.04 + 2 * 0.02))


def test_the_workers_that_keep_an_encoder_busy_are_counted() -> None:
    assert Pace(30.0, 1e9, 90.0, cores=16, threads=1).needed() == 3
    assert Pace(100.0, 1e9, 90.0, cores=2, threads=1).needed() == 1
    assert Pace(30.0, 1e9, 90.0, cores=2, threads=1).needed() is None


def test_the_slowest_part_is_named_with_the_way_out() -> None:
    slow = Pace(30.0, 1e9, 90.0, cores=16, threads=1)
    assert slow.rows(1)["bottleneck"].startswith("decoding: 30 images/s of the 90")
    assert slow.rows(1)["bottleneck"].endswith("train.workers=3 keeps the encoder busy")
    assert slow.rows(3)["bottleneck"] == "the encoder: 3 workers keep it busy"
    assert slow._replace(augmentation=60.0).rows(2)["bottleneck"] == "the augmentation: 2 workers keep it busy"
    few = slow._replace(cores=2).rows(1)["bottleneck"]
    assert "the 2 cores reach 45 at most, with train.workers=2; smaller files or data.cache" in few


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    (tmp_path / "photographs").mkdir()
    image = Image.fromarray(load_sample_image("china.jpg")).resize((1600, 1200), Image.Resampling.BICUBIC)
    for index in range(16):
        image.save(tmp_path / "photographs" / f"{index}.jpg", quality=90)
    return tmp_path / "photographs"


def test_a_check_tells_the_pace_of_each_part_for_files_that_are_decoded_as_needed(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pace, "SECONDS", 0.0)
    words = [*WORDS, f"data={photographs}", "data.size=32", "train.batch_size=8", "train.workers=1"]
    assert cli.pretrain(["quickstart", "--check", *words, "train.monitor=0", f"output={tmp_path / 'run'}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    shown = re.sub(r"\W+", " ", shown.replace(",", ""))
    for row in (r"decoding \d+ images s by one worker", r"augmentation \d+ images s", r"encoder \d+ images s"):
        assert re.search(row, shown)
    assert re.search(r"bottleneck (decoding|the encoder|the augmentation)", shown)
