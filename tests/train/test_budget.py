"""The budget of a run, by a clock that the tests set."""

import time

import pytest
import torch

from manyviews.config import load
from manyviews.data import Order
from manyviews.objectives import Loss
from manyviews.recipe import Recipe
from manyviews.train.budget import Clock, MetricAverager


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds; set it."""
    time_of_day = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: time_of_day[0])
    return time_of_day


def clock(*words: str, spent: float = 0.0) -> Clock:
    return Clock(load(Recipe, None, list(words)), Order(1000, 100, 0), spent)


def test_time_within_a_pause_is_no_training_and_takes_nothing_from_the_budget(now: list[float]) -> None:
    running = clock("train.minutes=1")
    now[0] += 15
    assert (running.seconds(), running.progress(3)) == (15, 0.25)
    with running.paused():
        now[0] += 1000
    assert (running.seconds(), running.progress(3)) == (15, 0.25)
    now[0] += 15
    assert (running.seconds(), running.progress(3)) == (30, 0.5)


def test_what_was_spent_before_a_resume_counts(now: list[float]) -> None:
    resumed = clock("train.minutes=1", spent=45.0)
    now[0] += 3
    assert (resumed.seconds(), resumed.progress(0)) == (48, 0.8)
    now[0] += 60
    assert resumed.progress(0) == 1


def test_epochs_are_counted_by_steps_whatever_the_time(now: list[float]) -> None:
    running = clock("train.epochs=4")
    now[0] += 1e6
    assert [running.progress(step) for step in (0, 10, 40, 50)] == [0, 0.25, 1, 1]


def test_a_line_holds_the_means_since_the_last_one_and_the_pace(now: list[float]) -> None:
    record = MetricAverager(clock("train.epochs=4"), 0, {})
    for step, value in enumerate((1.0, 2.0, 6.0), 1):
        record.add(Loss(torch.tensor(value), {"negatives": torch.tensor(10 * value)}))
        assert len(record) == step
    now[0] += 4
    line = record.take(3, 0.5)
    assert (line["loss"], line["negatives"]) == (3, 30)
    assert (line["images_per_second"], line["seconds"], line["epoch"]) == (75, 4, 0.3)
    assert (line["rate"], line["skipped"], len(record)) == (0.5, 0, 0)
    record.add(Loss(torch.tensor(8.0), {"negatives": torch.tensor(1.0)}))
    now[0] += 1
    # Of what came since: one step, in a second.
    later = record.take(4, 0.5)
    assert (later["loss"], later["images_per_second"], later["seconds"]) == (8, 100, 5)


def test_a_line_goes_on_with_the_losses_of_before_a_resume(now: list[float]) -> None:
    metadata = {"losses": {"loss": [1.0, 2.0]}, "skipped": 3}
    record = MetricAverager(clock("train.epochs=4", spent=2.0), 2, metadata)
    record.add(Loss(torch.tensor(6.0), {}))
    now[0] += 2
    assert record.metadata()["losses"] == {"loss": [1, 2, 6]}
    line = record.take(3, 0.5)
    assert (line["loss"], line["skipped"], line["seconds"], line["images_per_second"]) == (3, 3, 4, 50)
