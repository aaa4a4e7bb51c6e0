"""The paired bootstrap against a loop with the same draws, and its intervals against the truth that was drawn from."""

import numpy as np
import pytest
import torch
from torch import Tensor

from manyviews.evaluators.results.intervals import bootstrap_differences, paired_difference, resampled


def hits(runs: int, images: int, share: float, seed: int) -> Tensor:
    """Images that are easy or hard for all runs alike, and runs that differ by chance."""
    generator = torch.Generator().manual_seed(seed)
    hard = torch.rand(images, generator=torch.Generator().manual_seed(99))
    return hard + 0.3 * torch.randn(runs, images, generator=generator) < share


def test_resampling_is_that_of_a_loop_over_images_and_runs_with_the_same_draws():
    methods = [hits(3, 40, 0.6, 0), hits(1, 40, 0.7, 1), hits(2, 40, 0.5, 2)]
    actual = resampled(methods, seed=5, resamples=30)
    generator = np.random.default_rng(5)
    patterns, counts = torch.cat(methods).unique(dim=1, return_counts=True)
    draws = [generator.multinomial(40, counts.numpy() / 40) for _ in range(30)]
    chosen = [[generator.integers(len(own), size=len(own) - 1) for _ in range(30)] for own in methods if len(own) > 1]
    chosen.insert(1, [np.array([0])] * 30)
    for number in range(30):
        first = 0
        for index, own in enumerate(methods):
            accuracies = []
            for run in chosen[index][number]:
                right = [
                    bool(patterns[first + run, pattern])
                    for pattern, times in enumerate(draws[number])
                    for _ in range(times)
                ]
                assert len(right) == 40
                accuracies.append(sum(right) / 40)
            assert actual[number, index].item() == pytest.approx(sum(accuracies) / len(accuracies))
            first += len(own)


def test_of_single_runs_the_interval_is_that_of_images_drawn_one_by_one_and_near_the_closed_one():
    one, other = hits(1, 500, 0.6, 0), hits(1, 500, 0.65, 1)
    ((difference, low, high),) = bootstrap_differences([one, other], seed=0)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(500, (5_000, 500), generator=generator)
    gaps = (other[0].double() - one[0].double())[drawn].mean(1)
    assert difference == pytest.approx(other.double().mean().item() - one.double().mean().item())
    assert low == pytest.approx(gaps.quantile(0.025).item(), abs=0.006)
    assert high == pytest.approx(gaps.quantile(0.975).item(), abs=0.006)
    closed = paired_difference(other[0], one[0])
    assert (low, high) == pytest.approx(closed[1:], abs=0.006)


def test_a_method_beside_itself_differs_by_nothing_and_the_seed_fixes_the_draws():
    own = hits(1, 100, 0.6, 0)
    assert bootstrap_differences([own, own], seed=0) == [(0.0, 0.0, 0.0)]
    methods = [hits(2, 100, 0.6, 0), hits(3, 100, 0.5, 1)]
    assert bootstrap_differences(methods, seed=0) == bootstrap_differences(methods, seed=0)
    assert bootstrap_differences(methods, seed=0) != bootstrap_differences(methods, seed=1)


def test_draws_in_several_parts_are_as_many_as_were_asked_for(monkeypatch: pytest.MonkeyPatch):
    methods = [hits(1, 50, 0.6, 0), hits(1, 50, 0.5, 1)]
    whole = resampled(methods, seed=0, resamples=100)
    monkeypatch.setattr("manyviews.evaluators.results.intervals.COUNTS", 64)
    assert torch.equal(resampled(methods, seed=0, resamples=100), whole)


@pytest.mark.parametrize(("spread", "runs"), [(0.0, 1), (0.0, 3), (0.05, 4)])
def test_intervals_hold_the_truth_as_often_as_they_say(spread: float, runs: int):
    """Two methods of one mean accuracy, whose seeds differ by `spread`, on images that are hard or easy for both."""
    generator, trials, images = np.random.default_rng(0), 150, 400
    held = 0
    for trial in range(trials):
        ease = generator.normal(size=images)
        methods = []
        for _ in range(2):
            skill = 0.5 + spread / 0.3 * generator.normal(size=(runs, 1))
            methods.append(torch.from_numpy(ease + 0.6 * generator.normal(size=(runs, images)) < skill))
        ((_, low, high),) = bootstrap_differences(methods, seed=trial, resamples=400)
        held += low <= 0 <= high
    assert held / trials > 0.9
