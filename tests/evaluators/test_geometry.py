"""The geometry of features against slow loops and the limits where it is known."""

import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.testing import assert_close

from manyviews.evaluators import geometry as lying
from manyviews.evaluators.geometry import alignment, geometry, neighbourhood_overlap, staleness, uniformity
from manyviews.evaluators.results.measurement import Evaluation, Measurement
from manyviews.evaluators.results.tables import sheets
from recorded import printed_text


def rows(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def numbers(actual: tuple[Measurement, ...]) -> dict[str, float]:
    """What was measured by its name."""
    return {own.metric: own.value for own in actual}


def test_alignment_and_uniformity_are_those_of_double_loops():
    one, other = rows(30, 5), rows(30, 5, 1)
    unit = [[value / row.norm() for value in row.double()] for row in one]
    partner = [[value / row.norm() for value in row.double()] for row in other]
    aligned = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in zip(unit, partner, strict=True)]
    assert alignment(one, other) == pytest.approx(float(sum(aligned) / 30), rel=1e-6)
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    values = [math.exp(-2 * sum(float(a - b) ** 2 for a, b in zip(unit[i], unit[j], strict=True))) for i, j in pairs]
    assert uniformity(one) == pytest.approx(math.log(sum(values) / len(values)), abs=1e-6)


def test_uniformity_over_several_tiles_is_that_of_the_whole_matrix():
    features = rows(3_500, 8)
    unit = torch.nn.functional.normalize(features.double())
    expected = torch.pdist(unit).square().mul(-2).exp().mean().log()
    assert uniformity(features) == pytest.approx(expected.item(), abs=1e-6)


def test_perfect_alignment_is_0_whatever_the_lengths_and_opposite_views_are_at_4():
    features = rows(20, 4)
    assert alignment(features, 7 * features) == pytest.approx(0, abs=1e-12)
    assert alignment(features, -features) == pytest.approx(4)


def test_collapsed_features_have_uniformity_0_and_rank_1():
    actual = numbers(geometry("learned", rows(1, 6).expand(40, -1), None, seed=0))
    assert actual == {"uniformity": pytest.approx(0, abs=1e-5), "effective rank": pytest.approx(1, abs=1e-4)}


def test_features_that_are_all_zero_have_collapsed():
    actual = numbers(geometry("learned", torch.zeros(50, 16), (torch.zeros(9, 16), torch.zeros(9, 16)), seed=0))
    assert actual == {"uniformity": pytest.approx(0, abs=1e-6), "effective rank": 0, "alignment": 0}


def test_features_that_are_zero_lie_in_one_place_of_their_own():
    # As if they all had a direction that no other feature has.
    features, marked = rows(30, 5), torch.cat([rows(30, 5), torch.zeros(30, 1)], 1)
    features[::3], marked[::3] = 0, torch.tensor([0, 0, 0, 0, 0, 1.0])
    assert uniformity(features) == pytest.approx(uniformity(marked), abs=1e-6)
    assert alignment(features, rows(30, 5)) == pytest.approx(
        alignment(marked, torch.nn.functional.pad(rows(30, 5), (0, 1)))
    )
    assert alignment(features[:1], rows(1, 5)) == pytest.approx(2)
    assert numbers(staleness(features, features))["5 %"] == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e30])
def test_the_length_of_features_changes_nothing(scale: float):
    features, others = rows(40, 6), rows(40, 6, 1)
    assert uniformity(features * scale) == pytest.approx(uniformity(features), abs=1e-5)
    assert alignment(features * scale, others) == pytest.approx(alignment(features, others), abs=1e-5)
    stale = numbers(staleness(features, others))["mean"]
    assert numbers(staleness(features * scale, others))["mean"] == pytest.approx(stale, abs=1e-5)


def test_features_evenly_on_the_circle_have_the_uniformity_of_the_integral():
    count = 2_000
    angles = torch.arange(count) * (2 * math.pi / count)
    # The mean of exp(−2 d²) with d² = 2 − 2 cos is e⁻⁴ times the Bessel function I₀(4).
    expected = -4 + torch.special.i0(torch.tensor(4.0, dtype=torch.float64)).log()
    # No point is paired with itself.
    expected = ((expected.exp() * count - 1) / (count - 1)).log()
    assert uniformity(torch.stack([angles.cos(), angles.sin()], 1)) == pytest.approx(expected.item(), abs=1e-6)


def test_orthonormal_features_have_full_rank_and_the_rank_is_that_of_the_formula():
    assert numbers(geometry("learned", torch.eye(12), None, seed=0))["effective rank"] == pytest.approx(12)
    features = rows(50, 9) * torch.linspace(0.1, 3, 9)
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum() + 1e-7
    expected = math.exp(-(shares * shares.log()).sum().item())
    assert numbers(geometry("learned", features, None, seed=0))["effective rank"] == pytest.approx(expected, rel=1e-4)


def test_of_many_images_some_are_drawn_by_the_seed_and_their_number_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lying, "IMAGES", 100)
    features = rows(400, 6)
    actual = [geometry("raw pixels", features, (features, features), seed=seed) for seed in (0, 0, 1)]
    assert {own.n for each in actual for own in each} == {100}
    assert actual[0] == actual[1] != actual[2]
    assert numbers(actual[0])["uniformity"] == pytest.approx(uniformity(features), abs=0.2)
    shown = printed_text(sheets(Evaluation(actual[0])))
    assert "100 images" in shown
    assert f"{actual[0][0].value:.1f}" in shown


@pytest.mark.parametrize(
    ("features", "message"),
    [(torch.ones(1, 3), "2 images or more"), (torch.tensor([[1.0], [math.nan]]), "not finite")],
)
def test_what_has_no_geometry_is_refused(features: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        geometry("learned", features, None, seed=0)
    with pytest.raises(ValueError, match="none"):
        alignment(torch.empty(0, 2), torch.empty(0, 2))
    with pytest.raises(ValueError, match="2 images or more, and there are 1"):
        uniformity(torch.ones(1, 3))


def test_neighbourhood_overlap_is_that_of_sets_of_neighbours():
    one, other, k = rows(80, 6), rows(80, 3, 1), 7

    def neighbours(features: Tensor) -> list[set[int]]:
        search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(features.numpy())
        return [set(actual) for actual in search.kneighbors(return_distance=False)]

    common = [len(a & b) / k for a, b in zip(neighbours(one), neighbours(other), strict=True)]
    assert neighbourhood_overlap(one, other, k) == pytest.approx(sum(common) / len(common))


def test_a_rotation_keeps_all_neighbours_and_unrelated_features_share_them_by_chance():
    features = rows(300, 5)
    rotation = torch.linalg.qr(rows(5, 5, 1)).Q
    assert neighbourhood_overlap(features, 3 * features @ rotation, 10) == pytest.approx(1, abs=1e-3)
    assert neighbourhood_overlap(features, rows(300, 5, 2), 10) == pytest.approx(10 / 299, abs=0.02)
    assert neighbourhood_overlap(features, rows(300, 4, 2), 299) == 1


@pytest.mark.parametrize("k", [0, 5])
def test_more_neighbours_than_there_are_are_refused(k: int):
    with pytest.raises(ValueError, match="between 1 and the number of other images, 4"):
        neighbourhood_overlap(rows(5, 2), rows(5, 2), k)


def test_staleness_is_the_cosine_of_each_row_with_its_fresh_embedding():
    bank, fresh = rows(5_000, 4), rows(5_000, 4, 1)
    cosines = torch.nn.functional.cosine_similarity(bank.double(), fresh.double())
    actual = staleness(bank, fresh)
    assert {own.n for own in actual} == {5_000}
    mean, *quantiles = numbers(actual).values()
    assert mean == pytest.approx(cosines.mean().item())
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    assert list(numbers(actual)) == ["mean", "5 %", "25 %", "50 %", "75 %", "95 %"]
    assert_close(torch.tensor(quantiles), cosines.quantile(shares).float())
    still = numbers(staleness(bank, 2 * bank))
    assert still["mean"] == pytest.approx(1)
    assert still["5 %"] == pytest.approx(1)
    assert numbers(staleness(bank[:1], fresh[:1]))["50 %"] == pytest.approx(cosines[0].item())
    with pytest.raises(ValueError, match="none"):
        staleness(bank[:0], fresh[:0])
