"""Features in the plane: against scikit-learn, the same each time, for any number of images."""

import importlib
import sys

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.testing import assert_close

from manyviews.evaluators.map import Method, flat_map, principal_components


def groups(count: int, dim: int = 20) -> tuple[Tensor, Tensor]:
    """Points around four centres, and which centre is whose."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    centres = 4 * torch.randn(4, dim, generator=generator)
    return centres[labels] + torch.randn(count, dim, generator=generator), labels


@pytest.mark.parametrize(("count", "dim"), [(60, 7), (9, 40)])
def test_principal_components_are_those_of_scikit_learn_up_to_signs(count: int, dim: int):
    features, _ = groups(count, dim)
    expected = torch.from_numpy(PCA(5, svd_solver="full").fit_transform(features.double().numpy()))
    actual = principal_components(features, 5)
    assert_close(actual.abs(), expected.abs(), rtol=1e-6, atol=1e-6)
    assert_close(flat_map(features, "pca", seed=0), actual[:, :2].float())


def test_the_largest_weight_of_a_component_is_positive():
    features, _ = groups(60, 7)
    weights = torch.linalg.lstsq(features.double() - features.double().mean(0), principal_components(features, 3))
    largest = weights.solution.gather(0, weights.solution.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_components_beyond_those_that_there_are_are_zero():
    actual = principal_components(torch.arange(4.0).unsqueeze(1), 3)
    assert_close(actual[:, 0], torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64))
    assert not actual[:, 1:].any()


def test_tsne_keeps_groups_together_and_is_the_same_for_the_same_seed():
    features, labels = groups(200)
    actual = flat_map(features, "tsne", seed=3)
    assert actual.shape == (200, 2)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, flat_map(features, "tsne", seed=3))
    nearest = KNeighborsClassifier(5).fit(actual[:150].numpy(), labels[:150].numpy())
    assert nearest.score(actual[150:].numpy(), labels[150:].numpy()) > 0.95


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("count", [3, 4, 10])
def test_few_images_and_images_that_are_all_one_have_a_finite_map(method: Method, count: int):
    for features in (groups(count)[0], torch.ones(count, 8), torch.arange(float(count)).unsqueeze(1)):
        assert torch.isfinite(flat_map(features, method, seed=0)).all()


@pytest.mark.slow
def test_umap_keeps_groups_together_is_the_same_each_time_and_says_no_warning():
    pytest.importorskip("umap")
    features, labels = groups(120)
    actual = flat_map(features, "umap", seed=3)
    assert torch.equal(actual, flat_map(features, "umap", seed=3))
    nearest = KNeighborsClassifier(5).fit(actual[:90].numpy(), labels[:90].numpy())
    assert nearest.score(actual[90:].numpy(), labels[90:].numpy()) > 0.95
    assert torch.isfinite(flat_map(torch.ones(4, 8), "umap", seed=0)).all()


def test_without_umap_learn_the_way_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError):
        importlib.import_module("umap")
    with pytest.raises(ValueError, match=r"pip install 'manyviews\[umap\]'"):
        flat_map(groups(10)[0], "umap", seed=0)


@pytest.mark.parametrize(
    ("features", "message"), [(torch.ones(2, 3), "3 images or more"), (torch.full((5, 2), torch.nan), "finite")]
)
def test_what_has_no_map_is_refused(features: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        flat_map(features, "pca", seed=0)
