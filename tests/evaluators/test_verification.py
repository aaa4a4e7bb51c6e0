import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from manyviews.evaluators.verification import (
    VerificationSettings,
    best_threshold,
    draw_pairs,
    threshold_at,
    verify,
)

SMALL = VerificationSettings(pairs=400, folds=5, false_accept_rates=(0.3, 0.1, 0.01, 0.001))


def faces(num: int, classes: int, noise: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % classes
    centres = torch.randn(classes, 8, generator=generator)
    return centres[labels] + noise * torch.randn(num, 8, generator=generator), labels


def test_pairs_are_different_rightly_named_and_balanced_in_every_fold():
    _, labels = faces(120, 7, 1.0)
    labels[::9] = -1
    pairs = draw_pairs(labels, SMALL, seed=1)
    assert pairs.images.shape == (400, 2)
    assert len({frozenset(pair) for pair in pairs.images.tolist()}) == 400
    assert (pairs.images[..., 0] != pairs.images[..., 1]).all()
    first, second = labels[pairs.images].unbind(1)
    assert (first >= 0).all()
    assert (second >= 0).all()
    assert torch.equal(first == second, pairs.same)
    assert pairs.folds.bincount().tolist() == [80] * 5
    assert pairs.folds[pairs.same].bincount().tolist() == [40] * 5


def test_every_pair_has_the_same_chance():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    settings = VerificationSettings(pairs=4, folds=2)
    counts = dict.fromkeys((frozenset(pair) for pair in combinations(range(7), 2)), 0)
    for seed in range(1000):
        for pair in draw_pairs(labels, settings, seed=seed).images.tolist():
            counts[frozenset(pair)] += 1
    same = [count for pair, count in counts.items() if len({int(labels[image]) for image in pair}) == 1]
    different = [count for pair, count in counts.items() if len({int(labels[image]) for image in pair}) == 2]
    # 2 of the 7 pairs of a class and 2 of the 14 others are drawn each time.
    assert (len(same), len(different)) == (7, 14)
    for actual, chance in ((same, 2 / 7), (different, 2 / 14)):
        assert np.abs(np.array(actual) / 1000 - chance).max() < 4.5 * math.sqrt(chance * (1 - chance) / 1000)


def test_few_pairs_are_all_taken_in_whole_folds():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    pairs = draw_pairs(labels, VerificationSettings(pairs=6000, folds=3))
    assert (pairs.images.shape, int(pairs.same.sum())) == ((12, 2), 6)
    with pytest.raises(ValueError, match=r"7 labelled images of 3 classes have 6 pairs of the same class and 15"):
        draw_pairs(labels, VerificationSettings(folds=10))
    with pytest.raises(ValueError, match=r"0 pairs of the same class"):
        draw_pairs(torch.arange(50))
    with pytest.raises(ValueError, match=r"0 of different ones"):
        draw_pairs(torch.zeros(50, dtype=torch.int64))


def test_many_images_are_drawn_from_without_listing_their_pairs():
    labels = torch.arange(200_000) % 1000
    pairs = draw_pairs(labels)
    assert len(pairs.images.unique(dim=0)) == 6000
    assert torch.equal(labels[pairs.images[..., 0]] == labels[pairs.images[..., 1]], pairs.same)
    assert torch.equal(pairs.images, draw_pairs(labels).images)
    assert not torch.equal(pairs.images, draw_pairs(labels, seed=1).images)


@pytest.mark.parametrize("nearness", ["cosine", "euclidean"])
def test_accuracies_and_accepts_equal_a_loop_over_every_threshold(nearness):
    features, labels = faces(100, 6, 1.5)
    pairs = draw_pairs(labels, SMALL)
    rows = features.double()
    scores, same = [], pairs.same.tolist()
    for one, two in pairs.images.tolist():
        cosine = float(rows[one] @ rows[two] / rows[one].norm() / rows[two].norm())
        scores.append(cosine if nearness == "cosine" else -float((rows[one] - rows[two]).square().sum()))
    accuracies, accepts = [], {rate: [] for rate in (0.3, 0.1, 0.01)}
    for held in range(5):
        others = [pair for pair in range(400) if pair // 80 != held]
        own = [pair for pair in range(400) if pair // 80 == held]
        ordered = sorted({scores[pair] for pair in others}, reverse=True)
        candidates = [math.inf, *((a + b) / 2 for a, b in pairwise(ordered)), -math.inf]
        right = [sum((scores[pair] > limit) == same[pair] for pair in others) for limit in candidates]
        limit = candidates[right.index(max(right))]
        accuracies.append(sum((scores[pair] > limit) == same[pair] for pair in own) / len(own))
        negatives = [scores[pair] for pair in others if not same[pair]]
        for rate, actual in accepts.items():
            allowed = [limit for limit in negatives if sum(score > limit for score in negatives) <= rate * 160 + 1e-9]
            positives = [pair for pair in own if same[pair]]
            actual.append(sum(scores[pair] > min(allowed) for pair in positives) / len(positives))
    result = verify(features, pairs, SMALL, nearness=nearness)
    assert result.accuracy == pytest.approx(np.mean(accuracies), rel=1e-12)
    assert result.deviation == pytest.approx(np.std(accuracies, ddof=1), rel=1e-9)
    assert result.correct.double().mean().item() == pytest.approx(result.accuracy)
    # 160 pairs of different classes in the other folds: a rate of 0.001 would allow none of them.
    assert list(result.true_accepts) == [0.3, 0.1, 0.01]
    for rate, actual in accepts.items():
        assert result.true_accepts[rate] == pytest.approx((np.mean(actual), np.std(actual, ddof=1)), rel=1e-9)


@pytest.mark.parametrize("decimals", [1, 8])
def test_thresholds_are_those_of_the_roc_curve_also_where_scores_are_equal(decimals):
    generator = torch.Generator().manual_seed(0)
    same = torch.rand(500, generator=generator) < 0.4
    scores = (torch.randn(500, generator=generator, dtype=torch.float64) + same).round(decimals=decimals)
    false, true, _ = roc_curve(same.numpy(), scores.numpy(), drop_intermediate=False)
    number = int(same.sum())
    accuracy = (true * number + (1 - false) * (500 - number)) / 500
    actual = ((scores > best_threshold(scores, same)) == same).double().mean().item()
    assert actual == pytest.approx(accuracy.max(), rel=1e-12)
    for rate in (0.5, 0.1, 0.01, 1 / 300):
        limit = threshold_at(scores[~same], rate)
        assert (scores[~same] > limit).double().mean().item() <= rate + 1e-12
        assert (scores[same] > limit).double().mean().item() == pytest.approx(true[false <= rate + 1e-12].max())


def test_the_area_is_that_of_scikit_learn():
    features, labels = faces(100, 6, 1.5)
    pairs = draw_pairs(labels, SMALL)
    unit = torch.nn.functional.normalize(features, dim=1).double()
    scores = (unit[pairs.images[..., 0]] * unit[pairs.images[..., 1]]).sum(-1)
    expected = roc_auc_score(pairs.same, scores)
    assert verify(features, pairs, SMALL).auc == pytest.approx(expected, rel=1e-12)


def test_classes_far_apart_are_verified_without_a_mistake():
    features, labels = faces(60, 4, 0.01)
    result = verify(features, draw_pairs(labels, SMALL), SMALL)
    assert (result.accuracy, result.deviation, result.auc) == (1, 0, 1)
    assert all(mean == 1 for mean, _ in result.true_accepts.values())


def test_equal_features_are_judged_by_chance():
    _, labels = faces(60, 4, 1.0)
    result = verify(torch.ones(60, 3), draw_pairs(labels, SMALL), SMALL)
    assert (result.accuracy, result.auc) == (0.5, 0.5)
    assert all(mean == 0 for mean, _ in result.true_accepts.values())


def test_a_threshold_between_neighbouring_floats_still_parts_them():
    low = 1.0
    scores = torch.tensor([math.nextafter(low, 2), low], dtype=torch.float64)
    limit = best_threshold(scores, torch.tensor([True, False]))
    assert (scores > limit).tolist() == [True, False]


def test_the_own_fold_is_never_looked_at_for_its_threshold():
    features, labels = faces(100, 6, 1.5)
    pairs = draw_pairs(labels, SMALL)
    before = verify(features, pairs, SMALL).correct
    own = pairs.folds == 2
    flipped = pairs._replace(same=torch.where(own, ~pairs.same, pairs.same))
    assert torch.equal(verify(features, flipped, SMALL).correct[own], ~before[own])
