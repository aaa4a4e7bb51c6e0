import json

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from manyviews.linear_metrics import LMNN, MMC, LinearMetric, Mahalanobis, Metric

METRICS = [
    Mahalanobis(),
    Mahalanobis(covariance="total", shrinkage=0.2),
    MMC(),
    MMC(diagonal=True),
    LMNN(iterations=6, rank=3),
]


def correlated(images: int = 120, dim: int = 6, classes: int = 4, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes whose images differ most in some directions; labels in no order, −1 among them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    centres = 2 * torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (images,), generator=generator)
    features = (centres[labels] + torch.randn(images, dim, generator=generator, dtype=torch.float64)) @ mixing + 5
    labels[::10] = -1
    return features, labels


def squared_distances(metric: LinearMetric, features: Tensor) -> Tensor:
    mapped = metric.transform(features)
    return (mapped[:, None] - mapped).square().sum(2)


@pytest.mark.parametrize("images", [200, 12])
@pytest.mark.parametrize("kind", ["within", "total"])
def test_shrinkage_and_distances_are_those_of_scikit_learn(kind, images):
    features, labels = correlated(images, 20, 2)
    metric = Mahalanobis(covariance=kind).fit(features, labels)
    known, classes = features[labels >= 0], labels[labels >= 0]
    centres = torch.stack([known[classes == label].mean(0) if kind == "within" else known.mean(0) for label in classes])
    covariance, shrinkage = ledoit_wolf((known - centres).numpy(), assume_centered=True)
    assert metric.figures["shrinkage"] == pytest.approx(shrinkage, rel=1e-9)
    difference = features[:, None] - features
    expected = torch.einsum("abi,ij,abj->ab", difference, torch.from_numpy(covariance).inverse(), difference)
    torch.testing.assert_close(squared_distances(metric, features), expected, rtol=1e-4, atol=1e-4)


def test_without_shrinkage_the_residuals_become_white_and_with_all_of_it_the_distance_is_euclidean():
    features, labels = correlated(300)
    known, classes = features[labels >= 0], labels[labels >= 0]
    mapped = Mahalanobis(shrinkage=0.0).fit(features, labels).transform(known)
    residuals = mapped - torch.stack([mapped[classes == label].mean(0) for label in classes])
    torch.testing.assert_close(
        residuals.T @ residuals / len(known), torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0
    )
    plain = squared_distances(Mahalanobis(shrinkage=1.0).fit(features, labels), known)
    expected = (known[:, None] - known).square().sum(2)
    torch.testing.assert_close(plain / plain[0, 1], expected / expected[0, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", METRICS, ids=str)
def test_a_metric_is_the_same_after_a_file_that_holds_no_pickle(settings, tmp_path):
    features, labels = correlated()
    metric = settings.fit(features.float(), labels)
    metric.save(tmp_path / "metric.safetensors")
    loaded = LinearMetric.load(tmp_path / "metric.safetensors")
    assert torch.equal(metric.transform(features.float()), loaded.transform(features.float()))
    assert loaded.settings["name"] == settings.name
    assert TypeAdapter(Metric).validate_python(dict(loaded.settings)) == settings
    assert loaded.figures == metric.figures
    header = json.loads((tmp_path / "metric.safetensors").read_bytes()[8:].split(b"\n")[0].partition(b"}}")[0] + b"}}")
    assert json.loads(header["__metadata__"]["versions"]).keys() == {"manyviews", "torch", "timm"}


@pytest.mark.parametrize("settings", METRICS, ids=str)
def test_images_without_a_label_the_names_of_classes_and_the_origin_have_no_part(settings):
    features, labels = correlated()
    metric = settings.fit(features, labels)
    known = labels >= 0
    torch.testing.assert_close(settings.fit(features[known], labels[known]).weights, metric.weights)
    renamed = settings.fit(features, torch.where(known, labels * 1_000 + 7, -1).int())
    torch.testing.assert_close(renamed.weights, metric.weights)
    moved = settings.fit(features + 100, labels)
    torch.testing.assert_close(
        squared_distances(moved, features + 100), squared_distances(metric, features), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("settings", METRICS, ids=str)
def test_the_unit_of_the_features_has_no_part_in_which_images_are_near(settings):
    features, labels = correlated()
    near = squared_distances(settings.fit(features, labels), features)
    far = squared_distances(settings.fit(features * 1e-3, labels), features * 1e-3)
    torch.testing.assert_close(far / far.mean(), near / near.mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", METRICS, ids=str)
def test_float32_features_give_a_float32_map_close_to_that_of_float64(settings):
    features, labels = correlated()
    double, single = settings.fit(features, labels), settings.fit(features.float(), labels)
    assert single.transform(features.float()).dtype == torch.float32
    assert double.transform(features).dtype == torch.float64
    expected = squared_distances(double, features)
    torch.testing.assert_close(squared_distances(single, features), expected, rtol=0.02, atol=0.02 * expected.mean())


@pytest.mark.parametrize("settings", [Mahalanobis(), MMC(), MMC(diagonal=True), LMNN()], ids=str)
def test_fewer_images_than_dimensions_and_equal_features_are_safe(settings):
    features, labels = correlated(24, 60, 3)
    features[:, 7], features[1] = 0.25, features[2]
    metric = settings.fit(features.float(), labels)
    assert metric.weights.isfinite().all()
    assert metric.transform(features.float()).isfinite().all()


def test_what_cannot_be_fitted_is_said_with_the_way_out(tmp_path):
    features, labels = correlated()
    metric = Mahalanobis().fit(features, labels)
    with pytest.raises(ValueError, match="have 3 dimensions, the metric was fitted on 6"):
        metric.transform(features[:, :3])
    with pytest.raises(ValueError, match="0 of 120 images are labelled"):
        Mahalanobis().fit(features, torch.full_like(labels, -1))
    with pytest.raises(ValueError, match="do not vary"):
        Mahalanobis().fit(features, torch.arange(120))
    with pytest.raises(ValueError, match="rank 5 of 6"):
        Mahalanobis(shrinkage=0.0).fit(torch.cat([features[:, :5], features[:, :1]], 1), labels)
    with pytest.raises(ValueError, match="not finite"):
        Mahalanobis().fit(features.log(), labels)
    save_file({"weights": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no linear metric"):
        LinearMetric.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        LinearMetric.load(tmp_path / "text")
