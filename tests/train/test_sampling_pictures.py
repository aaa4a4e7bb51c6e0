"""Pictures of the sampling in a run's folder and TensorBoard, alone and on several processes."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from manyviews.config import load
from manyviews.evaluators.sampling import OWN, sampling_figures
from manyviews.objectives import Loss
from manyviews.objectives.mining import DistanceWeighted
from manyviews.recipe import Recipe
from manyviews.report.sampling import read_sampling
from manyviews.run.checkpoints import Saver
from manyviews.run.folder import DONE, Run
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.launch import Stop
from manyviews.train import sampling_pictures
from manyviews.train.pretrain import pretrain
from manyviews.train.sampling_pictures import SamplingPictures
from manyviews.train.session import Session
from manyviews.train.step import StepResult
from processes import start
from small_run import photographs

WORDS = ("ids=labels", "train.batch_size=12", "train.epochs=1", "train.precision=fp32", "train.preview=0")
SMALL = (*WORDS, "train.threads=1", "train.monitor=2", "views.num_views=1", "encoder.projector.dim=8")


def recipe(output: Path, data: Path, *words: str) -> Recipe:
    given = {word.split("=")[0] for word in words}
    defaults = [word for word in SMALL if word.split("=")[0] not in given]
    return load(Recipe, None, [*defaults, f"output={output}", f"data={data}", *words])


def images_of(folder: Path) -> list[int]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return [own.step for own in events.Images("sampling")] if "sampling" in events.Tags()["images"] else []


def test_a_run_that_samples_has_pictures_and_another_one_has_none(tmp_path: Path) -> None:
    data = photographs(tmp_path / "images")
    run = pretrain(recipe(tmp_path / "run", data, "objective=triplet", "objective.sampling=within_margin"))
    found = read_sampling(run)
    assert found is not None
    assert (found.step, found.embeddings, found.dim, found.whole) == (4, 12, 8, True)
    assert found.own == "within_margin"
    assert sum(found.negatives) > sum(found.chosen[OWN])
    assert (run / "sampling.png").is_file()
    assert images_of(run) == [2, 4]
    other = pretrain(recipe(tmp_path / "other", data, "objective=supervised"))
    assert read_sampling(other) is None
    assert not list(other.glob("sampling*"))
    assert images_of(other) == []


def test_a_picture_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []

    def fail(*arguments: Any, **named: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(sampling_pictures, "sampling_figures", fail)
    monkeypatch.setattr(Console, "warn", lambda self, text: warnings.append(text))
    run = pretrain(recipe(tmp_path / "run", photographs(tmp_path / "images"), "objective=contrastive"))
    assert (run / DONE).is_file()
    assert [text for text in warnings if text.startswith("step 4: there is no picture of the sampling")]


def whole_batch() -> tuple[Tensor, Tensor]:
    """Embeddings of two views and a local one, unevenly many for two processes, and their ids."""
    return torch.randn(3, 11, 8, generator=torch.Generator().manual_seed(0)), torch.arange(11) // 3


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    embeddings, ids = whole_batch()
    own = distributed.share(11)
    run = Run(Path(folder) / "run") if rank == 0 else None
    session = Session(run, cast("Saver", None), Console(quiet=True), cast("Stop", None))
    made = recipe(Path(folder), Path(folder), "objective=margin", "views.local=1", "views.num_views=2")
    pictures = SamplingPictures(made, session, 0.0)
    assert pictures.due(1.0)
    loss = Loss(torch.zeros(()), {})
    pictures.add(3, 1.0, StepResult(loss, embeddings[:, own], ids[own], None))
    assert not pictures.due(1.0)
    dist.destroy_process_group()


def test_several_processes_draw_what_one_draws(tmp_path: Path) -> None:
    start(work, (str(tmp_path),), count=2)
    embeddings, ids = whole_batch()
    expected = sampling_figures(embeddings[:2], ids, DistanceWeighted(), normalized=True, seed=0, step=2)
    assert expected.whole
    assert read_sampling(tmp_path / "run") == expected.model_copy(update={"step": 3})


def test_given_relations_are_not_sampled(tmp_path: Path) -> None:
    session = Session(None, cast("Saver", None), Console(quiet=True), cast("Stop", None))
    words = ("objective=contrastive", "ids=images", "views.num_views=2")
    sampled = recipe(tmp_path, tmp_path, *words)
    related = recipe(tmp_path, tmp_path, *words, f"data.relations={tmp_path / 'pairs.csv'}")
    assert SamplingPictures(sampled, session, 0.0).due(1.0)
    assert not SamplingPictures(related, session, 0.0).due(1.0)
