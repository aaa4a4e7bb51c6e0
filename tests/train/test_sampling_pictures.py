"""Pictures of the sampling in a run's folder and TensorBoard, alone and on several processes."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manyviews.config import load
from manyviews.evaluators.sampling import OWN
from manyviews.recipe import Recipe
from manyviews.report.sampling import read_sampling
from manyviews.run.folder import DONE
from manyviews.system.console import Console
from manyviews.train import sampling_pictures
from manyviews.train.pretrain import pretrain
from processes import launched
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


def test_several_processes_draw_what_one_draws(tmp_path: Path) -> None:
    words = (photographs(tmp_path / "images"), "objective=margin", "views.local=2", "train.epochs=0.25")
    alone = pretrain(recipe(tmp_path / "alone", *words))
    launched(pretrain, recipe(tmp_path / "together", *words))
    first, second = (read_sampling(run) for run in (alone, tmp_path / "together"))
    assert first is not None
    assert second is not None
    assert (second.embeddings, second.step, second.whole) == (first.embeddings, first.step, True) == (12, 1, True)
    # A rounding error moves a distance over the edge of a bin.
    for own, other in ((first.negatives, second.negatives), (first.chosen[OWN], second.chosen[OWN])):
        assert sum(own) == sum(other) > 0
        assert sum(abs(here - there) for here, there in zip(own, other, strict=True)) <= 0.1 * sum(own)
