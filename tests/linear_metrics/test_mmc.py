import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from manyviews.linear_metrics import MMC
from manyviews.linear_metrics.mmc import ascend, between


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


def least(features: Tensor, labels: Tensor, *, diagonal: bool) -> float:
    """The least Σ_S / (mean over D)² that a general optimiser finds, from several starts, with numerical gradients."""
    similar, dissimilar = similar_and_dissimilar(features, labels)
    dim = features.shape[1]

    def objective(numbers: np.ndarray) -> float:
        weights = np.diag(numbers) if diagonal else numbers.reshape(dim, dim)
        return np.square(similar @ weights.T).sum() / np.linalg.norm(dissimilar @ weights.T, axis=1).mean() ** 2

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
    assert value == pytest.approx(least(features, labels, diagonal=diagonal), rel=1e-5)
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
    start = (features, labels, prior * identity / 4, (1 - prior) * identity / 4)
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
