"""The paces that `--check` measures, and what it concludes from them."""

import re
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from manyviews import cli
from manyviews.config import load
from manyviews.data import Loader, Order
from manyviews.data.decoding.decode import Decoding
from manyviews.data.decoding.files import Files
from manyviews.data.images import Pictures
from manyviews.data.loader import PREFETCHED
from manyviews.data.sources.folder import Folder
from manyviews.recipe import Recipe
from manyviews.system.launch import start
from manyviews.train import pace
from manyviews.train.components import Components, build
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
    assert slow.rows(3)["bottleneck"] == "the encoder: 3 workers decode as fast"
    assert slow._replace(augmentation=60.0).rows(2)["bottleneck"] == "the augmentation: 2 workers decode as fast"
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


class SlowDecoding(Decoding):
    """Takes 80 ms for an image, and no core."""

    def crop(self, path: Path, crops: Sequence[tuple[Tensor, int]], **options: Any) -> list[Tensor]:
        time.sleep(0.08)
        return [torch.zeros(len(boxes), 3, side, side, dtype=torch.uint8) for boxes, side in crops]


# By the clock, of which a busy machine has less.
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "expected"), [(1, 12.5), (3, 30.0)])
def test_a_run_reaches_the_pace_that_was_foretold(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, workers: int, expected: float
) -> None:
    """The encoder takes 1/30 s for an image; neither it nor decoding needs a core."""

    def step(components: Components, images: Pictures, ids: Tensor, *arguments: int) -> None:
        time.sleep(len(ids) / 30)

    monkeypatch.setattr(pace, "train_step", step)
    monkeypatch.setattr(pace, "cores", lambda: 16)
    monkeypatch.setattr(pace, "SECONDS", 2.0)
    images = Folder(path=str(photographs), memory=0, holdout=0).build().train
    assert isinstance(images, Files)
    images = replace(images, decoding=SlowDecoding(3, 96, (0, 0, 0), 10**8))
    words = [*WORDS, f"data={photographs}", "views.size=32", "train.batch_size=8", "encoder.name=light_resnet"]
    components = build(load(Recipe, None, words), start(8, "fp32", 1), images)
    order = Order(len(images), 8, seed=0)
    foretold = pace.measure(components, images, order, 0).reached(workers)
    with closing(iter(Loader(images, order, components.views, workers=workers))) as batches:
        for _ in range(PREFETCHED * workers + 1):
            next(batches)
        began = time.monotonic()
        for batch in islice(batches, 8):
            step(components, *batch)
        reached = 8 * 8 / (time.monotonic() - began)
    assert foretold == pytest.approx(reached, rel=0.2)
    assert foretold <= expected
