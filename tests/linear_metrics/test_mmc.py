import itertools
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import avg_pool2d

from manyviews.data.sources.fashion_mnist import Sample
from manyviews.linear_metrics import MMC
from manyviews.linear_metrics.mmc import ascend, between, between_pairs


def clusters(images: int = 36, dim: int = 4, classes: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    labels = torch.arange(images) % classes
    scale = torch.linspace(0.5, 1.5, dim, dtype=torch.float64)
    return centres[labels] + scale * torch.randn(images, dim, generator=generator, dtype=torch.float64), labels


def similar_and_dissimilar(features: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    pairs = list(itertools.combinations(range(len(features)), 2))
    similar = [features[a] - features[b] for a, b in pairs if labels[a] == labels[b]]
    dissimilar = [features[a] - features[b] for a, b in pairs if labels[a] != labels[b]]
    return torch.stack(similar).numpy(), torch.stack(dissimilar).numpy()


def least(
    similar: np.ndarray,
    dissimilar: np.ndarray,
    near: float | np.ndarray = 1.0,
    far: np.ndarray | None = None,
    *,
    diagonal: bool,
) -> float:
    """The least Σ_S / (mean over D)² that a general optimiser finds, from several starts, with numerical gradients."""
    dim = similar.shape[1]

    def objective(numbers: np.ndarray) -> float:
        weights = np.diag(numbers) if diagonal else numbers.reshape(dim, dim)
        apart = np.average(np.linalg.norm(dissimilar @ weights.T, axis=1), weights=far)
        return (near * np.square(similar @ weights.T).sum(1)).sum() / apart**2

    generator = np.random.default_rng(0)
    starts = [np.ones(dim) if diagonal else np.eye(dim).ravel()]
    starts += [start + 0.3 * generator.standard_normal(start.shape) for start in starts * 2]
    return min(minimize(objective, start, method="BFGS", options={"gtol": 1e-9}).fun for start in starts)


@pytest.mark.filterwarnings("ignore:Desired error not necessarily achieved")
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_optimum_is_that_of_a_general_optimiser(diagonal):
    features, labels = clusters()
    metric = MMC(diagonal=diagonal, prior=0.0, shrinkage=0.0, tolerance=1e-7, iterations=5000).fit(features, labels)
    similar, dissimilar = similar_and_dissimilar(features, labels)
    weights = metric.weights.double().numpy()
    # The constraint holds, and the objective is the least.
    assert np.linalg.norm(dissimilar @ weights.T, axis=1).mean() == pytest.approx(1, abs=1e-5)
    value = np.square(similar @ weights.T).sum()
    assert value == pytest.approx(least(similar, dissimilar, diagonal=diagonal), rel=1e-5)
    assert metric.figures["within"] == pytest.approx(value / len(similar), rel=1e-5)
    if diagonal:
        assert np.count_nonzero(weights - np.diag(np.diag(weights))) == 0


@pytest.mark.parametrize("tile", [512, 7])
def test_sums_over_pairs_equal_a_double_loop_and_the_scatter_is_twice_the_gradient(tile, monkeypatch):
    monkeypatch.setattr("manyviews.linear_metrics.mmc.TILE", tile)
    features, labels = clusters()
    root = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total, scatter = between(features @ root.T, features, labels)
    _, dissimilar = similar_and_dissimilar(features, labels)
    matrix = (root.T @ root).requires_grad_()
    lengths = [(torch.from_numpy(pair) @ matrix @ torch.from_numpy(pair)).sqrt() for pair in dissimilar]
    mean = sum(lengths) / len(lengths)
    assert total == pytest.approx(mean.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(mean, matrix)
    torch.testing.assert_close(scatter / 2, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_the_distances_between_classes_never_fall_and_the_gap_bounds_what_is_missing(diagonal, prior):
    features, labels = clusters()
    identity = torch.eye(4, dtype=torch.float64)
    apart = partial(between, inputs=features, labels=labels)
    start = (features, apart, prior * identity / 4, (1 - prior) * identity / 4)
    found = ascend(*start, MMC(diagonal=diagonal, iterations=5000, tolerance=1e-9))
    assert found.gap <= 1e-9
    assert all(after >= before * (1 - 1e-14) for before, after in itertools.pairwise(found.values))
    assert found.free.trace().item() == pytest.approx(1 - prior)
    assert torch.linalg.eigvalsh(found.free)[0] > -1e-12
    for steps in range(1, 40, 5):
        early = ascend(*start, MMC(diagonal=diagonal, iterations=steps, tolerance=1e-9))
        assert found.values[-1] <= early.values[-1] * (1 + early.gap) * (1 + 1e-12)


def test_the_prior_is_the_share_of_the_euclidean_distance_within_classes():
    features, labels = clusters(100)
    similar, _ = similar_and_dissimilar(features, labels)
    for prior in (0.25, 0.9):
        weights = MMC(prior=prior, shrinkage=0.0).fit(features, labels).weights.double()
        matrix = weights.T @ weights
        total = np.square(similar @ weights.T.numpy()).sum()
        kept = prior * total / np.square(similar).sum()
        # What is left without the Euclidean part is a metric still.
        assert torch.linalg.eigvalsh(matrix - kept * torch.eye(4))[0] > -1e-6 * matrix.trace()
    euclidean = MMC(prior=1.0).fit(features, labels).weights
    torch.testing.assert_close(euclidean / euclidean[0, 0], torch.eye(4), atol=1e-5, rtol=0)


def test_images_evenly_drawn_from_all_classes_come_close_to_all(monkeypatch):
    monkeypatch.setattr("manyviews.linear_metrics.mmc.FIRST", 50)
    features, labels = clusters(1200)
    whole = MMC(prior=0.0).fit(features, labels)
    part = MMC(prior=0.0, most=600).fit(features, labels)
    assert whole.figures["gap"] <= 1e-3
    assert part.figures["within"] == pytest.approx(whole.figures["within"], rel=0.05)


def test_one_class_has_no_dissimilar_pair():
    features, labels = clusters()
    with pytest.raises(ValueError, match="all labelled images are of class 3"):
        MMC().fit(features, torch.full_like(labels, 3))


def some_pairs(count: int = 60, *, graded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Features, pairs of them, and how similar these are: by class, or by the difference of a number."""
    features, labels = clusters()
    generator = torch.Generator().manual_seed(2)
    pairs = torch.randint(len(features), (count, 2), generator=generator)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    same = (labels[pairs[:, 0]] == labels[pairs[:, 1]]).double()
    return (
        features,
        pairs,
        (same * 0.7 + torch.rand(len(pairs), generator=generator, dtype=torch.float64) * 0.3) if graded else same,
    )


@pytest.mark.filterwarnings("ignore:Desired error not necessarily achieved")
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_optimum_of_given_pairs_is_that_of_a_general_optimiser(diagonal, graded):
    features, pairs, same = some_pairs(graded=graded)
    settings = MMC(diagonal=diagonal, prior=0.0, shrinkage=0.0, tolerance=1e-7, iterations=5000)
    metric = settings.fit_pairs(features, pairs, same)
    apart, near = (features[pairs[:, 0]] - features[pairs[:, 1]]).numpy(), same.numpy()
    weights = metric.weights.double().numpy()
    assert np.average(np.linalg.norm(apart @ weights.T, axis=1), weights=1 - near) == pytest.approx(1, abs=1e-5)
    value = (near * np.square(apart @ weights.T).sum(1)).sum()
    assert value == pytest.approx(least(apart, apart, near, 1 - near, diagonal=diagonal), rel=1e-5)
    assert metric.figures["within"] == pytest.approx(value / near.sum(), rel=1e-5)
    assert metric.figures["pairs"] == len(pairs)


def test_all_pairs_of_classes_are_what_classes_are():
    features, labels = clusters()
    pairs = torch.combinations(torch.arange(len(labels)))
    same = (labels[pairs[:, 0]] == labels[pairs[:, 1]]).float()
    settings = MMC(shrinkage=0.0, tolerance=1e-7, iterations=5000)
    by_pairs, by_classes = settings.fit_pairs(features, pairs, same).weights, settings.fit(features, labels).weights
    torch.testing.assert_close(by_pairs.T @ by_pairs, by_classes.T @ by_classes, rtol=1e-4, atol=1e-5)


def test_weighted_means_over_pairs_equal_a_loop_and_the_scatter_is_twice_the_gradient():
    features, pairs, same = some_pairs(graded=True)
    apart, weights = features[pairs[:, 0]] - features[pairs[:, 1]], 1 - same
    root = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total, scatter = between_pairs(apart @ root.T, apart, weights)
    matrix = (root.T @ root).requires_grad_()
    mean = (
        sum(weight * (pair @ matrix @ pair).sqrt() for weight, pair in zip(weights, apart, strict=True)) / weights.sum()
    )
    assert total == pytest.approx(mean.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(mean, matrix)
    torch.testing.assert_close(scatter / 2, gradient, rtol=1e-9, atol=1e-12)


def test_pairs_that_define_no_metric_are_refused():
    features, pairs, same = some_pairs()
    settings = MMC()
    for value, name in ((1.0, "dissimilar"), (0.0, "similar")):
        with pytest.raises(ValueError, match=f"none of the {len(pairs)} pairs is {name}"):
            settings.fit_pairs(features, pairs, torch.full_like(same, value))
    with pytest.raises(ValueError, match=r"up to 99, with .* are not pairs of the 36 images"):
        settings.fit_pairs(features, pairs.where(pairs > 0, 99), same)
    with pytest.raises(ValueError, match="features of all similar pairs are equal"):
        settings.fit_pairs(torch.zeros_like(features), pairs, same)
    with pytest.raises(ValueError, match="not finite"):
        settings.fit_pairs(features / 0, pairs, same)
    few = same.cumsum(0) * same <= 2
    with pytest.raises(ValueError, match="rank 2 of 4"):
        MMC(shrinkage=0.0).fit_pairs(features, pairs[few], same[few])
    assert MMC().fit_pairs(features, pairs[few], same[few]).figures["shrinkage"] > 0


def drawn_pairs(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of images, half of them of one class."""
    pairs = torch.randint(len(labels), (20 * count, 2), generator=generator)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    chosen = torch.cat([kind.nonzero().squeeze(1)[: count // 2] for kind in (same, ~same)])
    return pairs[chosen], same[chosen].double()


def test_300_pairs_tell_pairs_of_other_images_apart_better_than_the_euclidean_distance():
    split = Sample().build()
    features, unseen = (avg_pool2d(images.pixels.float() / 255, 4).flatten(1) for images in (split.train, split.test))
    gains = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        metric = MMC().fit_pairs(features, *drawn_pairs(split.train.labels, 300, generator))
        pairs, same = drawn_pairs(split.test.labels, 2000, generator)
        before, after = (
            roc_auc_score(same, -(points[pairs[:, 0]] - points[pairs[:, 1]]).norm(dim=1))
            for points in (unseen, metric.transform(unseen))
        )
        gains.append(after - before)
    # The lower end of the interval of the mean.
    assert np.mean(gains) - stats.t.ppf(0.975, 2) * np.std(gains, ddof=1) / np.sqrt(3) > 0.01
