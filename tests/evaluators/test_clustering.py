import math

import pytest
import torch

from manyviews.evaluators.clustering import ClusteringSettings, clustering
from manyviews.evaluators.k_means import k_means


def groups(num: int, classes: int, noise: float, *, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % classes
    centres = torch.nn.functional.normalize(torch.randn(classes, dim, generator=generator), dim=1)
    return centres[labels] + noise * torch.randn(num, dim, generator=generator), labels


def test_classes_far_apart_are_the_clusters():
    features, labels = groups(200, 4, 0.02)
    result = clustering(features, labels)
    assert (result.nmi, result.ami) == (pytest.approx(1), pytest.approx(1))


def test_labels_drawn_at_random_have_an_adjusted_information_of_zero():
    features, _ = groups(1000, 20, 0.2)
    labels = torch.randint(20, (1000,), generator=torch.Generator().manual_seed(1))
    result = clustering(features, labels)
    assert abs(result.ami) < 0.03
    assert result.nmi > 0.05


def test_the_normalised_information_is_twice_the_mutual_one_over_both_entropies():
    features, labels = groups(150, 3, 0.7)
    actual = k_means(torch.nn.functional.normalize(features, dim=1), 3)
    joint = torch.zeros(3, 3, dtype=torch.float64)
    for cluster, label in zip(actual.tolist(), labels.tolist(), strict=True):
        joint[cluster, label] += 1 / 150
    rows, columns = joint.sum(1), joint.sum(0)
    mutual = sum(
        joint[i, j] * math.log(joint[i, j] / rows[i] / columns[j]) for i in range(3) for j in range(3) if joint[i, j]
    )
    entropies = -(rows * rows.log()).sum() - (columns * columns.log()).sum()
    assert clustering(features, labels).nmi == pytest.approx(float(2 * mutual / entropies), rel=1e-9)


def test_lengths_count_for_euclidean_distance_alone():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    features = (1.0 + 9 * labels[:, None]) * torch.nn.functional.normalize(
        torch.ones(100, 4) + 0.1 * torch.randn(100, 4, generator=generator), dim=1
    )
    assert clustering(features, labels, nearness="euclidean").ami == pytest.approx(1)
    assert clustering(features, labels).ami < 0.1


@pytest.mark.parametrize("most", [50, 50_000])
def test_the_seed_alone_decides_also_in_mini_batches(most):
    features, labels = groups(300, 5, 0.3)
    settings = ClusteringSettings(restarts=2, most=most)
    before = torch.random.get_rng_state()
    one, two = (clustering(features, labels, settings, seed=3) for _ in range(2))
    assert torch.equal(one.groups, two.groups)
    assert (one.nmi, one.silhouette) == (two.nmi, two.silhouette)
    assert one.nmi > 0.5
    assert torch.equal(before, torch.random.get_rng_state())


def test_unlabelled_images_take_no_part():
    features, labels = groups(100, 4, 0.3)
    labels[::4] = -1
    assert clustering(features, labels).ami == clustering(features[labels >= 0], labels[labels >= 0]).ami


def test_fewer_different_images_than_classes_are_no_reason_to_warn():
    assert clustering(torch.ones(6, 3), torch.arange(6) % 3).nmi == 0


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="images of 1 class cannot be clustered"):
        clustering(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))
