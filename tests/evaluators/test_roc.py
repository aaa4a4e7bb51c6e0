"""The ROC curve against scikit-learn, and its bootstrap against a loop."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from manyviews.evaluators.roc import area, best_point, equal_error_rate, intervals, roc, thinned
from manyviews.evaluators.verification import best_threshold


def scored(number: int, decimals: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    same = torch.rand(number, generator=generator) < 0.4
    return (torch.randn(number, generator=generator, dtype=torch.float64) + same).round(decimals=decimals), same


@pytest.mark.parametrize("decimals", [1, 8])
def test_points_area_and_equal_error_rate_are_those_of_scikit_learn(decimals: int) -> None:
    scores, same = scored(500, decimals)
    false, true, limits = roc_curve(same.numpy(), scores.numpy(), drop_intermediate=False)
    curve = roc(scores, same)
    assert torch.equal(curve.lowest, torch.from_numpy(limits))
    assert curve.false_accepts.numpy() == pytest.approx(false, abs=1e-15)
    assert curve.true_accepts.numpy() == pytest.approx(true, abs=1e-15)
    assert area(curve).item() == pytest.approx(roc_auc_score(same.numpy(), scores.numpy()), rel=1e-12)
    crossing = brentq(lambda rate: 1 - rate - np.interp(rate, false, true), 0, 1, xtol=1e-14)
    assert equal_error_rate(curve).item() == pytest.approx(crossing, abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 8])
def test_each_threshold_accepts_what_its_point_counts(decimals: int) -> None:
    scores, same = scored(200, decimals)
    curve = roc(scores, same)
    assert curve.threshold.isfinite().all()
    for point in range(len(curve.threshold)):
        accepted = scores > curve.threshold[point]
        assert int((accepted & same).sum()) == curve.same[point]
        assert int((accepted & ~same).sum()) == curve.different[point]
    best = curve.threshold[best_point(curve)]
    assert ((scores > best) == same).sum() == ((scores > best_threshold(scores, same)) == same).sum()


def test_separated_pairs_have_no_error_and_reversed_ones_nothing_else() -> None:
    same = torch.tensor([True, True, False, False])
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
    for order, rate in ((scores, 0.0), (-scores, 1.0), (torch.ones(4), 0.5)):
        assert equal_error_rate(roc(order, same)).item() == rate
    # Equal scores cannot be parted: at the threshold none is accepted.
    assert roc(torch.ones(4), same).threshold[0] == 1


def test_a_weight_counts_as_so_many_equal_pairs() -> None:
    scores, same = scored(60, 1)
    weights = torch.randint(0, 4, (3, 60), generator=torch.Generator().manual_seed(1)).double()
    curve = roc(scores, same, weights)
    for row in range(3):
        often = weights[row].long()
        repeated = roc(scores.repeat_interleave(often), same.repeat_interleave(often))
        assert area(curve)[row].item() == pytest.approx(area(repeated).item(), rel=1e-12)
        assert equal_error_rate(curve)[row].item() == pytest.approx(equal_error_rate(repeated).item(), rel=1e-12)


def test_intervals_are_those_of_a_loop_that_draws_images_with_replacement() -> None:
    scores, same = scored(80, 8)
    images = torch.randint(0, 30, (80, 2), generator=torch.Generator().manual_seed(2))
    used = images.unique().tolist()
    generator = np.random.default_rng(3)
    found: dict[str, list[float]] = {"AUC": [], "EER": [], "threshold": []}
    for _ in range(50):
        often = dict(zip(used, generator.multinomial(len(used), [1 / len(used)] * len(used)), strict=True))
        pairs = [pair for pair in range(80) for _ in range(often[int(images[pair, 0])] * often[int(images[pair, 1])])]
        own, kind = scores[pairs], same[pairs]
        found["AUC"].append(roc_auc_score(kind.numpy(), own.numpy()))
        false, true, _ = roc_curve(kind.numpy(), own.numpy(), drop_intermediate=False)
        found["EER"].append(brentq(lambda rate, f=false, t=true: 1 - rate - np.interp(rate, f, t), 0, 1, xtol=1e-14))
        curve = roc(scores, same, torch.tensor([[float(pairs.count(pair)) for pair in range(80)]]))
        found["threshold"].append(curve.threshold[best_point(curve)].item())
    actual = intervals(scores, same, images, seed=3, draws=50)
    for name, values in found.items():
        assert actual[name] == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-10)


def test_intervals_of_the_area_cover_it() -> None:
    # Images are points on a line, pairs of one class are near; the area over all pairs of many images is the truth.
    def pairs(number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(number, generator=generator, dtype=torch.float64)
        images = torch.stack([torch.randperm(number, generator=generator)[:2] for _ in range(4 * number)])
        apart = (points[images[:, 0]] - points[images[:, 1]]).abs()
        same = torch.rand(len(images), generator=generator, dtype=torch.float64) < torch.exp(-apart)
        return -apart, same, images

    scores, same, _ = pairs(3000, 0)
    truth = roc_auc_score(same.numpy(), scores.numpy())
    covered = 0
    for seed in range(1, 61):
        low, high = intervals(*pairs(60, seed), seed=0, draws=200)["AUC"]
        covered += low <= truth <= high
    # Of 60 intervals at 95 %, fewer than 52 cover once in 200 times; too wide ones may all cover.
    assert covered >= 52


def test_a_thinned_curve_keeps_its_ends_and_is_dense_where_few_are_accepted() -> None:
    scores, same = scored(30_000, 12)
    curve = roc(scores, same)
    kept = thinned(curve, 150)
    assert len(kept) <= 150
    assert kept[0] == 1
    assert (curve.false_accepts[kept][-1], curve.true_accepts[kept][-1]) == (1, 1)
    rates = np.geomspace(1e-3, 1, 50)
    false, true = curve.false_accepts.numpy(), curve.true_accepts.numpy()
    drawn = np.interp(rates, false[kept], true[kept])
    assert np.abs(drawn - np.interp(rates, false, true)).max() < 0.01
    assert torch.equal(thinned(roc(scores[:40], same[:40]), 150), torch.arange(1, 41))
