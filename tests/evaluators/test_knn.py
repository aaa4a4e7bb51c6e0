import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from manyviews.evaluators.knn import KnnSettings, knn, monitor_knn, predict, weighted_vote
from manyviews.evaluators.splits import hold_out, num_classes


def clusters(num: int, classes: int, *, dim: int = 16, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num) % classes
    return centres[labels] + noise * torch.randn(num, dim, generator=generator), labels


def oracle(
    queries: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float, own: list[int] | None = None
) -> list[int]:
    predictions = []
    for number, query in enumerate(queries.double()):
        actual = []
        for index, row in enumerate(bank.double()):
            if labels[index] >= 0 and (own is None or own[number] != index):
                actual.append((-float(query @ row / query.norm() / row.norm()), index))
        votes = [0.0] * (int(labels.max()) + 1)
        for negative, index in sorted(actual)[:k]:
            votes[int(labels[index])] += math.exp(-negative / temperature)
        predictions.append(votes.index(max(votes)))
    return predictions


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (7, 1.0), (30, 0.2), (500, 0.1)])
def test_predictions_equal_a_double_loop_in_float64(k, temperature):
    bank, labels = clusters(60, 4, noise=2.0)
    queries, _ = clusters(25, 4, noise=2.0, seed=1)
    labels[::7] = -1
    grid = predict(queries, bank, labels, neighbours=(3, k), temperatures=(0.5, temperature), classes=4)
    assert grid[1, 1].tolist() == oracle(queries, bank, labels, k, temperature)
    assert grid[0, 0].tolist() == oracle(queries, bank, labels, 3, 0.5)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (90, 0.5), (400, 0.2)])
def test_predictions_equal_those_of_scikit_learn(k, temperature):
    bank, labels = clusters(300, 5, noise=2.5)
    queries, _ = clusters(150, 5, noise=2.5, seed=1)
    oracle = KNeighborsClassifier(
        min(k, 300), metric="cosine", weights=lambda distances: np.exp((1 - distances) / temperature)
    ).fit(bank.double().numpy(), labels.numpy())
    guesses = predict(queries, bank, labels, neighbours=(7, k), temperatures=(temperature, 2.0), classes=6)
    assert guesses[1, 0].tolist() == oracle.predict(queries.double().numpy()).tolist()


def test_a_class_that_only_the_test_images_have_is_predicted_by_none_and_counted_as_wrong():
    train, labels = clusters(120, 3, noise=0.1)
    test, truth = clusters(40, 4, noise=0.1, seed=1)
    result = knn(train, labels, test, num_classes(labels, truth), KnnSettings())
    assert num_classes(labels, truth) == 4
    assert set(result.predictions.tolist()) <= {0, 1, 2}
    known = truth < 3
    assert torch.equal(result.predictions[known], truth[known])


def test_no_more_neighbours_vote_than_the_bank_has():
    train, labels = clusters(50, 2, noise=0.1)
    result = knn(train, labels, train[:10] + 0.01, 2, KnnSettings(neighbours=(1000,)))
    assert result.chosen["neighbours"] == 50


def test_many_classes_and_many_queries_are_counted_part_by_part_with_the_same_result(monkeypatch):
    bank, labels = clusters(200, 30, noise=1.5)
    queries, _ = clusters(70, 30, noise=1.5, seed=1)
    options = {"neighbours": (1, 9, 40), "temperatures": (0.07, 0.2), "classes": 30}
    whole = predict(queries, bank, labels, **options)
    monkeypatch.setattr("manyviews.evaluators.knn.SCORES", 90)
    assert torch.equal(predict(queries, bank, labels, **options), whole)


def test_the_order_of_the_grid_does_not_change_the_votes():
    bank, labels = clusters(80, 5, noise=2.0)
    queries, _ = clusters(30, 5, noise=2.0, seed=1)
    rising = predict(queries, bank, labels, neighbours=(1, 9, 40), temperatures=(0.07,), classes=5)
    falling = predict(queries, bank, labels, neighbours=(40, 9, 1), temperatures=(0.07,), classes=5)
    assert torch.equal(rising, falling.flip(0))


def test_a_vote_is_the_sum_of_exponentials_and_a_tie_goes_to_the_lowest_class():
    similarities = torch.tensor([[0.9, 0.5, 0.5]])
    scores = weighted_vote(similarities, torch.tensor([[2, 1, 1]]), 0.5, 4)
    assert scores.tolist()[0] == pytest.approx([0.0, 2 * math.exp(1), math.exp(1.8), 0.0], rel=1e-6)
    bank = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    tied = predict(
        torch.tensor([[1.0, 0.0]]), bank, torch.tensor([3, 1]), neighbours=(2,), temperatures=(0.1,), classes=4
    )
    assert tied.item() == 1


def test_a_tiny_temperature_neither_overflows_nor_loses_the_nearest():
    bank, labels = clusters(50, 5)
    queries, _ = clusters(20, 5, seed=1)
    grid = predict(queries, bank, labels, neighbours=(1, 50), temperatures=(1e-5,), classes=5)
    assert torch.equal(grid[0, 0], grid[1, 0])


def test_random_features_score_at_chance_when_each_image_is_left_out_of_its_own_bank():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(2000, 32, generator=generator), torch.arange(2000) % 10
    options = {"neighbours": (1, 20), "temperatures": (0.07,), "classes": 10}
    ids = torch.arange(2000)
    guesses = predict(features, features, labels, query_ids=ids, bank_ids=ids, **options)
    assert ((guesses == labels).float().mean(-1) - 0.1).abs().max() < 0.03
    with pytest.raises(ValueError, match="find itself"):
        predict(features, features, labels, **options)


def test_leaving_one_out_equals_the_double_loop():
    features, labels = clusters(40, 4, noise=2.0)
    ids = torch.arange(40)
    options = {"neighbours": (5,), "temperatures": (0.1,), "classes": 4}
    guesses = predict(features, features, labels, query_ids=ids, bank_ids=ids, **options)
    assert guesses[0, 0].tolist() == oracle(features, features, labels, 5, 0.1, own=list(range(40)))


def test_the_choice_is_the_best_of_the_grid_on_the_held_out_part():
    train, labels = clusters(160, 4, noise=2.5)
    test, _ = clusters(25, 4, noise=2.5, seed=1)
    settings = KnnSettings(neighbours=(1, 8, 40), temperatures=(0.07, 0.5))
    result = knn(train, labels, test, 4, settings, share=0.25, seed=3)
    kept, held = hold_out(labels, share=0.25, seed=3)
    accuracies = {
        (k, t): sum(
            guess == label
            for guess, label in zip(
                oracle(train[held], train[kept], labels[kept], k, t), labels[held].tolist(), strict=True
            )
        )
        / len(held)
        for k in settings.neighbours
        for t in settings.temperatures
    }
    assert tuple(result.chosen.values()) == max(accuracies, key=accuracies.__getitem__)
    assert result.validation == pytest.approx(max(accuracies.values()))
    assert result.predictions.tolist() == oracle(test, train, labels, *result.chosen.values())


def test_the_part_held_out_is_balanced_disjoint_and_follows_the_seed_alone():
    labels = torch.arange(1000) % 10
    labels[:100] = -1
    before = torch.random.get_rng_state()
    kept, held = hold_out(labels, share=0.2, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(100, 1000))
    assert labels[held].bincount().tolist() == [18] * 10
    again, other = hold_out(labels, share=0.2, seed=0)[1], hold_out(labels, share=0.2, seed=1)[1]
    assert torch.equal(held, again)
    assert not torch.equal(held, other)
    assert len(hold_out(labels, share=0.2, seed=0, most=90)[1]) == 90
    with pytest.raises(ValueError, match="more labelled images"):
        hold_out(torch.tensor([0, 1, -1]), share=0.2, seed=0)


def test_the_monitor_sees_what_is_learned_and_repeats_itself():
    features, labels = clusters(1000, 10, noise=0.3)
    noise = torch.randn(1000, 16, generator=torch.Generator().manual_seed(5))
    assert monitor_knn(features, labels, seed=1) > 0.95
    assert monitor_knn(noise, labels, seed=1) < 0.25
    assert monitor_knn(noise, labels, seed=1, most=300) == monitor_knn(noise, labels, seed=1, most=300)


def test_where_no_class_has_a_second_image_the_nearest_decides():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(count, 6, generator=generator) for count in (20, 30))
    actual = knn(train, torch.arange(20), test, 20, KnnSettings())
    cosines = torch.nn.functional.normalize(test) @ torch.nn.functional.normalize(train).T
    assert actual.predictions.tolist() == cosines.argmax(1).tolist()
    assert actual.validation is None
