"""Every recipe, stopped within an epoch, at its end and at once again, ends bitwise as if it never had been."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from manyviews.config import load
from manyviews.data import Batch, Loader
from manyviews.recipe import Recipe, find, names
from manyviews.run.folder import read_metrics
from manyviews.system import distributed
from manyviews.train.pretrain import pretrain
from processes import launched
from stopped_runs import differing, newest, tensors

CLASSES, IMAGES = 4, 26
STEPS = 12
"""Two epochs of six steps; each leaves 8 of the 104 images out."""
STOPS = (4, 6, 6)
"""Within the first epoch, at its end, and there again before a step was taken."""
LOG_EVERY = 4
"""Steps between two lines of metrics, which tell the means since the last one: a stop is between two lines."""
SMALL = (
    *("data.name=folder", "data.size=16", "data.channels=1", "data.holdout=0", "views.size=16"),
    *("encoder.projector.hidden=16", "encoder.projector.dim=8"),
    *("train.epochs=2", "train.batch_size=16", "train.precision=fp32", "train.threads=1", "train.workers=0"),
    *(f"train.log_every={LOG_EVERY}", "train.monitor=2", "train.preview=2"),
)
FEWER = {
    "moco": ["objective.size=40"],
    "nnclr": ["objective.size=40"],
    "instance_discrimination_nce": ["objective.negatives=20"],
    "noise_contrastive": ["objective.negatives=20"],
}
CLOCKED = {"images_per_second", "seconds"}
"""What depends on the time of day."""
LOCAL = ("moco views.local=2", "nnclr views.local=2")
"""Recipes with local views too: a queue and a twin, neighbours and a predictor."""
BY_TWO = ("arcface_instances", "instance_discrimination", "moco", LOCAL[0])
"""The recipes that two processes try first: rows of weights, of a bank and of a queue, each spread over them."""


DEFAULT = ("quickstart", "moco", "nnclr", "instance_discrimination_nce", "noise_contrastive", "arcface", "facenet")
"""The recipes that one process tries by default: without state, and with each kind of it."""


def recipe(name: str, images: Path, output: Path, *words: str) -> Recipe:
    """The recipe in small."""
    name, *more = name.split()
    few = ["train.images_per_class=4"] if load(Recipe, find(name)).train.images_per_class else []
    small = [*SMALL, *few, *FEWER.get(name, []), f"data.path={images}", f"output={output}"]
    return load(Recipe, find(name), [*small, *more, *words])


@contextmanager
def signalled(step: int) -> Iterator[None]:
    """Before the step the last process, and no other, gets SIGTERM."""
    batches = Loader.__iter__

    def counted(self: Loader) -> Iterator[Batch]:
        for number, batch in enumerate(batches(self), self.start):
            if number == step and distributed.rank() == distributed.world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with patch.object(Loader, "__iter__", counted):
        yield


def straight_and_stopped(name: str, images: Path, folder: Path) -> None:
    """Runs a recipe to its end without a stop, and again with all of them."""
    pretrain(recipe(name, images, folder / "straight"))
    for number, step in enumerate(STOPS):
        with signalled(step), pytest.raises(SystemExit) as ended:
            pretrain(recipe(name, images, folder / "stopped", *(["resume=true"] if number else [])))
        assert ended.value.code == 128 + signal.SIGTERM
    pretrain(recipe(name, images, folder / "stopped", "resume=true"))


def weights(run: Path) -> dict[str, Tensor]:
    """All tensors that a run leaves: the newest checkpoint's, with what the optimiser keeps, and the backbone's."""
    found = newest(run)
    assert found.step == STEPS
    return tensors(found) | {
        f"exported.{key}": value for key, value in load_file(run / "backbone" / "model.safetensors").items()
    }


def lines(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in read_metrics(run)]


def points(run: Path) -> list[tuple[str, int, object]]:
    """What TensorBoard shows, as (tag, step, value), but for what depends on the time of day."""
    shown = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    shown.Reload()
    tags = shown.Tags()
    found = [(tag, seen.step, repr(seen.value)) for tag in tags["scalars"] for seen in shown.Scalars(tag)]
    found += [(tag, seen.step, seen.histogram_value) for tag in tags["histograms"] for seen in shown.Histograms(tag)]
    found += [(tag, seen.step, seen.encoded_image_string) for tag in tags["images"] for seen in shown.Images(tag)]
    return [point for point in found if point[0] not in CLOCKED]


def check(folder: Path) -> None:
    straight, stopped = folder / "straight", folder / "stopped"
    assert differing(weights(straight), weights(stopped)) == []
    assert lines(straight) == lines(stopped)
    steps = [line["step"] for line in lines(straight) if "loss" in line]
    assert steps == [1, *range(LOG_EVERY, STEPS + 1, LOG_EVERY)]
    assert sum("knn" in line for line in lines(straight)) == 2
    assert points(straight) == points(stopped)
    assert [step for tag, step, _ in points(stopped) if tag == "loss"] == steps
    described = [json.loads((run / "backbone" / "config.json").read_text()) for run in (straight, stopped)]
    assert described[0] == described[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(CLASSES * IMAGES):
        place = folder / "abcd"[index % CLASSES]
        place.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16), np.uint8) // (1 + index % CLASSES)
        Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in names()), *LOCAL],
)
def test_a_recipe_that_was_stopped_three_times_ends_as_one_that_never_was(
    images: Path, tmp_path: Path, name: str
) -> None:
    straight_and_stopped(name, images, tmp_path)
    check(tmp_path)


def pair(chosen: Sequence[str], images: Path, folder: Path) -> None:
    """One of two processes, which stay together through all recipes: starting them takes longer than the runs."""
    for name in chosen:
        straight_and_stopped(name, images, folder / name)
    distributed.barrier()


@pytest.fixture(scope="module")
def few(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    launched(pair, BY_TWO, images, folder)
    return folder


@pytest.fixture(scope="module")
def others(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    launched(pair, [name for name in names() if name not in BY_TWO], images, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_TWO)
def test_two_processes_that_were_stopped_three_times_end_as_two_that_never_were(few: Path, name: str) -> None:
    check(few / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names() if name not in BY_TWO])
def test_so_do_two_processes_with_every_other_recipe(others: Path, name: str) -> None:
    check(others / name)
