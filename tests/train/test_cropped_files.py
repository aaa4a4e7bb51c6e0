"""Runs on files that are cropped as needed: the same with any number of workers, and after SIGKILL."""

import os
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyviews.config import load
from manyviews.data import Batch, Images, Loader, Order
from manyviews.recipe import Recipe
from manyviews.train import pretrain as loop
from manyviews.train.pretrain import pretrain
from manyviews.views import Views, ViewsSettings
from processes import free_port, launched, start, world
from stopped_runs import content, differing

STEPS, KILLED = 6, 4
SMALL = (
    *("data.name=folder", "data.memory=0", "data.holdout=0", "views.size=16", "views.local=2", "views.local_size=8"),
    *("views.rotation=10", "objective=queue", "objective.size=40"),
    *("encoder.projector.hidden=16", "encoder.projector.dim=8", "train.batch_size=8", "train.precision=fp32"),
    *("train.threads=1", "train.preview=2", "train.log_every=1", "train.monitor=0", f"train.epochs={STEPS * 8 / 24}"),
    # Each step is saved.
    "train.save_minutes=1e-9",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of as many shapes as there are."""
    root: Path = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        draw = np.random.default_rng(number)
        small = draw.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize((60 + 5 * number, 180 - 6 * number)).save(root / f"{number}.jpg")
    return root


def recipe(images: Path, output: Path, *more: str) -> Recipe:
    return load(Recipe, None, [*SMALL, f"data.path={images}", f"output={output}", *more])


def run(images: Path, output: Path, *more: str) -> None:
    pretrain(recipe(images, output, *more))


def killed(rank: int, size: int, port: int, images: Path, output: Path) -> None:
    """A run of which every process is killed at a step."""
    os.environ |= world(rank, size, port)
    step, taken = loop.train_step, [0]

    def counted(*args: object) -> object:
        if taken[0] == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        taken[0] += 1
        return step(*args)

    loop.train_step = counted
    run(images, output)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_any_number_of_workers_and_a_run_that_was_killed_learn_the_same_bits(
    tmp_path: Path, folder: Path, processes: int
) -> None:
    launched(run, folder, tmp_path / "straight", "train.workers=0", count=processes)
    launched(run, folder, tmp_path / "workers", "train.workers=4", count=processes)
    with pytest.raises(Exception, match="SIGKILL"):
        start(killed, (processes, free_port(), folder, tmp_path / "killed"), count=processes)
    assert not (tmp_path / "killed" / "done").exists()
    launched(run, folder, tmp_path / "killed", "resume=true", "train.workers=1", count=processes)
    straight = content(tmp_path / "straight")
    assert differing(straight, content(tmp_path / "workers")) == []
    assert differing(straight, content(tmp_path / "killed")) == []
    assert (tmp_path / "killed" / "views.png").is_file()


def first(images: Images, views: Views, rank: int, size: int) -> list[Batch]:
    """The batches of an epoch."""
    return [*islice(Loader(images, Order(24, 8, seed=0), views, rank=rank, size=size), 3)]


def test_two_processes_see_the_crops_of_one(folder: Path) -> None:
    images = recipe(folder, Path("unused")).data.build().train
    views = ViewsSettings(size=16, local=2).build(size=96, channels=3, seed=1)
    one, *halves = (first(images, views, rank, size) for rank, size in ((0, 1), (0, 2), (1, 2)))
    for step, batch in enumerate(one):
        parts = [half[step] for half in halves]
        assert torch.equal(batch.ids, torch.cat([part.ids for part in parts]))
        for group, square in enumerate(batch.images.squares):
            assert torch.equal(square, torch.cat([part.images.squares[group] for part in parts], 1))
