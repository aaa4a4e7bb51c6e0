"""Few-shot episodes: how they are drawn, and what a loop over their queries says."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from manyviews.evaluators.distance import Nearness
from manyviews.evaluators.few_shot import (
    Episodes,
    FewShotSettings,
    accuracies,
    classify_episodes,
    draw_episodes,
    measure_episodes,
    refuse_episodes,
)
from manyviews.evaluators.results.intervals import student_interval, weighted_difference

FEW = FewShotSettings(queries=4, episodes=40)


def classes(sizes: tuple[int, ...], *, noise: float = 1.0, dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = 2 * torch.randn(len(sizes), dim, generator=generator)
    return centres[labels] + noise * torch.randn(len(labels), dim, generator=generator) + 3, labels


def images_of(episodes: Episodes, episode: int, way: int) -> tuple[list[int], list[int]]:
    asked = episodes.asked[episode, way]
    return episodes.examples[episode, way].tolist(), episodes.queries[episode, way][asked].tolist()


@pytest.mark.parametrize("shots", [1, 3])
def test_examples_and_queries_are_different_images_of_different_classes(shots: int) -> None:
    _, labels = classes((9, 4, 2, 20, 5, 8))
    labels[::7] = -1
    sizes = Counter(labels[labels >= 0].tolist())
    episodes = draw_episodes(labels, 3, shots, FEW)
    for episode in range(40):
        named = []
        for way in range(3):
            examples, queries = images_of(episodes, episode, way)
            (own,) = set(labels[examples + queries].tolist())
            named.append(own)
            assert len(examples) == shots
            assert len(set(examples + queries)) == len(examples + queries)
            assert len(queries) == min(4, sizes[own] - shots) > 0
        assert len(set(named)) == 3
        assert -1 not in named


def test_every_class_and_every_image_of_a_class_is_an_example_as_often() -> None:
    labels = torch.arange(5).repeat_interleave(torch.tensor([3, 4, 5, 6, 30]))
    settings = FewShotSettings(queries=2, episodes=6000)
    episodes = draw_episodes(labels, 2, 1, settings)
    for part, each in ((episodes.examples, 1), (episodes.queries, 2)):
        counts = part.flatten().bincount(minlength=48).double()
        for own in range(5):
            # Two of the five classes in each episode.
            chosen = counts[labels == own]
            expected = 6000 * 2 / 5 * each / len(chosen)
            assert (chosen - expected).abs().max() < 5 * math.sqrt(expected)


def test_an_episode_is_a_pure_function_of_labels_and_seed_however_many_there_are() -> None:
    _, labels = classes((9, 7, 6, 20))
    few, more = (
        draw_episodes(labels, 3, 2, FewShotSettings(queries=4, episodes=number), seed=1) for number in (10, 25)
    )
    for one, other in zip(few, more, strict=True):
        assert torch.equal(one, other[:10])
    other = draw_episodes(labels, 3, 2, FewShotSettings(queries=4, episodes=10), seed=2)
    assert not torch.equal(few.examples, other.examples)


def accuracy(features: Tensor, episodes: Episodes, nearness: Nearness = "cosine") -> Tensor:
    return accuracies(classify_episodes(features, episodes, nearness=nearness), episodes)


def by_loops(features: Tensor, episodes: Episodes, nearness: str) -> list[float]:
    rows = features.double()
    shares = []
    for episode in range(len(episodes.examples)):
        right = asked = 0
        prototypes = []
        for way in range(episodes.examples.shape[1]):
            own = [rows[image] for image in images_of(episodes, episode, way)[0]]
            own = [row / row.norm() for row in own] if nearness == "cosine" else own
            prototypes.append(sum(own) / len(own))
        for way in range(len(prototypes)):
            for query in images_of(episodes, episode, way)[1]:
                row, nearest, best = rows[query], -1, -math.inf
                for other, prototype in enumerate(prototypes):
                    alike = float(row @ prototype / prototype.norm())
                    alike = -float((row - prototype).norm()) if nearness == "euclidean" else alike
                    if alike > best:
                        nearest, best = other, alike
                right, asked = right + (nearest == way), asked + 1
        shares.append(right / asked)
    return shares


@pytest.mark.parametrize("nearness", ["cosine", "euclidean"])
@pytest.mark.parametrize(("ways", "shots"), [(2, 1), (4, 1), (4, 3)])
def test_accuracies_equal_a_loop_over_every_query(
    nearness: str, ways: int, shots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = classes((9, 4, 7, 20, 5, 8), noise=3.0)
    episodes = draw_episodes(labels, ways, shots, FEW)
    expected = by_loops(features, episodes, nearness)
    assert 0.2 < sum(expected) / len(expected) < 0.95, "a rule that is always right or wrong would show nothing"
    assert accuracy(features, episodes, nearness=nearness).tolist() == pytest.approx(expected, abs=1e-15)
    monkeypatch.setattr("manyviews.evaluators.few_shot.HELD", 100)
    assert accuracy(features, episodes, nearness=nearness).tolist() == pytest.approx(expected, abs=1e-15)


def test_equal_features_are_right_by_chance_and_far_classes_always() -> None:
    far, labels = classes((20, 20, 20, 20, 20), noise=1e-3)
    episodes = draw_episodes(labels, 5, 1, FEW)
    assert accuracy(far, episodes).tolist() == [1.0] * 40
    assert accuracy(torch.ones(100, 3), episodes).mean().item() == pytest.approx(0.2)


def test_ways_and_shots_are_each_measured_on_the_same_episodes_for_every_kind() -> None:
    features, labels = classes((9, 9, 9, 2, 9))
    settings = FewShotSettings(ways=(2, 4), shots=(1, 5), queries=4, episodes=40)
    how = {"nearness": "cosine", "distance": "cosine", "seed": 3}
    measured, shares = measure_episodes("learned", features, labels, settings, **how)
    assert [own.metric for own in measured] == ["2-way 1-shot", "2-way 5-shot", "4-way 1-shot", "4-way 5-shot"]
    assert [(own.details["classes"], own.details["left_out"]) for own in measured] == [(5, 0), (4, 1)] * 2
    assert shares.sum(1).tolist() == pytest.approx([measured[0].value, 1])
    assert (shares[0] <= shares[1] + 1e-15).all()
    for own in measured:
        ways, shots = (int(part.partition("-")[0]) for part in own.metric.split())
        values = accuracy(features, draw_episodes(labels, ways, shots, settings, seed=3))
        assert (own.low, own.high) == student_interval(values)
        assert (own.n, own.deviation) == (40, values.std().item())


def test_fewer_classes_than_ways_are_refused_with_the_numbers() -> None:
    labels = torch.arange(4).repeat_interleave(torch.tensor([9, 9, 5, 9]))
    refuse_episodes(labels, FewShotSettings(ways=(4,), shots=(1,)))
    message = r"4-way 5-shot episodes take 4 classes of 6 images or more, .* 3 classes have as many; use smaller"
    with pytest.raises(ValueError, match=message):
        refuse_episodes(labels, FewShotSettings(ways=(2, 4), shots=(1, 5)))
    with pytest.raises(ValueError, match=r"5-way 1-shot"):
        draw_episodes(labels, 5, 1)


def test_intervals_over_episodes_cover_the_mean_of_all_episodes() -> None:
    features, labels = classes((12, 9, 12, 20, 10, 15), noise=2.0)
    truth = accuracy(features, draw_episodes(labels, 3, 1, FewShotSettings(queries=5, episodes=5_000))).mean()
    covered = 0
    for seed in range(1, 101):
        few = FewShotSettings(queries=5, episodes=20)
        low, high = student_interval(accuracy(features, draw_episodes(labels, 3, 1, few, seed=seed)))
        covered += low <= truth.item() <= high
    # 95 on average; the binomial spread is 2.2.
    assert 88 <= covered <= 99


def test_a_difference_is_that_of_the_accuracies_and_its_interval_covers_equal_features_over_images() -> None:
    settings = FewShotSettings(ways=(3,), shots=(1,), queries=4, episodes=400)
    covered = 0
    for seed in range(40):
        # Two kinds of features that are equally good, of few images: over episodes alone one would seem better.
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(60) % 6
        centres = torch.randn(6, 8, generator=generator)
        kinds = [centres[labels] + torch.randn(60, 8, generator=generator) for _ in range(2)]
        how = {"nearness": "cosine", "distance": "cosine", "seed": 0}
        (one, first), (two, second) = (measure_episodes("x", kind, labels, settings, **how) for kind in kinds)
        difference, low, high = weighted_difference(first[0], second[0], first[1])
        assert difference == pytest.approx(one[0].value - two[0].value)
        assert low <= difference <= high
        covered += low <= 0 <= high
    # Examples are drawn too, which images as queries alone do not show: not quite 95 %.
    assert covered >= 30
