"""The budget of a run, by a clock that the tests set."""

import time

import pytest
import torch

from manyviews.data import Order
from manyviews.objectives import Loss
from manyviews.train.budget import Budget, MetricAverager
from manyviews.train.recorder import pace


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds; set it."""
    time_of_day = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: time_of_day[0])
    return time_of_day


def test_time_within_a_pause_is_no_training_and_takes_nothing_from_the_budget(now: list[float]) -> None:
    running = Budget(steps=40, minutes=1.0)
    now[0] += 15
    assert (running.seconds(), running.progress(3)) == (15, 0.25)
    with running.paused():
        now[0] += 1000
    assert (running.seconds(), running.progress(3)) == (15, 0.25)
    now[0] += 15
    assert (running.seconds(), running.progress(3)) == (30, 0.5)


def test_what_was_spent_before_a_resume_counts(now: list[float]) -> None:
    resumed = Budget(steps=40, minutes=1.0, spent=45.0)
    now[0] += 3
    assert (resumed.seconds(), resumed.progress(0)) == (48, 0.8)
    now[0] += 60
    assert resumed.progress(0) == 1


def test_epochs_are_counted_by_steps_whatever_the_time(now: list[float]) -> None:
    running = Budget(steps=40, minutes=None)
    now[0] += 1e6
    assert [running.progress(step) for step in (0, 10, 40, 50)] == [0, 0.25, 1, 1]


def test_a_save_is_due_after_minutes_of_training_since_the_last_one(now: list[float]) -> None:
    running = Budget(steps=40, minutes=None)
    now[0] += 50
    assert not running.save_is_due(1.0)
    with running.saving():
        now[0] += 1000
    now[0] += 60
    assert not running.save_is_due(1.0)
    now[0] += 1
    assert running.save_is_due(1.0)


def loss(value: float, **terms: float) -> Loss:
    return Loss(torch.tensor(value), {name: torch.tensor(term) for name, term in terms.items()})


def test_a_line_holds_the_means_since_the_last_one() -> None:
    averager = MetricAverager()
    for step, value in enumerate((1.0, 2.0, 6.0), 1):
        averager.add(loss(value, negatives=10 * value))
        assert len(averager) == step
    assert averager.take().means() == {"loss": 3, "negatives": 30}
    assert len(averager) == 0
    averager.add(loss(8.0, negatives=1.0))
    assert averager.take().means() == {"loss": 8, "negatives": 1}


def test_a_line_goes_on_with_the_losses_of_before_a_resume() -> None:
    averager = MetricAverager({"loss": [1.0, 2.0]})
    averager.add(loss(6.0))
    kept = averager.steps()
    averager.add(loss(7.0))
    assert kept == {"loss": [1, 2, 6]}
    assert averager.take().means() == {"loss": 4}


def test_the_pace_is_that_since_the_last_line() -> None:
    line = pace(Order(1000, 100, 0), (2, 2.0), (4, 6.0))
    assert line == {"images_per_second": 50, "epoch": 0.4, "seconds": 6}
