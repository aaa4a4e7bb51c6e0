import math

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.metrics.cluster import contingency_matrix

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


def test_every_agreement_is_that_of_scikit_learn_or_of_a_loop_over_images():
    features, labels = groups(90, 4, 0.7)
    result = clustering(features, labels, ClusteringSettings(k=6))
    clusters, classes = result.groups.tolist(), labels.tolist()
    assert result.nmi == pytest.approx(normalized_mutual_info_score(classes, clusters))
    assert result.ami == pytest.approx(adjusted_mutual_info_score(classes, clusters))
    table = contingency_matrix(classes, clusters)
    assert result.purity == pytest.approx(table.max(axis=0).sum() / 90)
    precision = recall = 0.0
    for i in range(90):
        together = [j for j in range(90) if clusters[j] == clusters[i]]
        of_class = [j for j in range(90) if classes[j] == classes[i]]
        both = len(set(together) & set(of_class))
        precision, recall = precision + both / len(together) / 90, recall + both / len(of_class) / 90
    assert result.b_cubed == pytest.approx(2 * precision * recall / (precision + recall))


def test_clusters_and_silhouette_are_those_of_scikit_learn_and_the_largest_has_number_0():
    features, _ = groups(90, 4, 0.7)
    unit = torch.nn.functional.normalize(features, dim=1).numpy()
    expected = KMeans(5, n_init=10, random_state=0).fit_predict(unit)
    result = clustering(features, None, ClusteringSettings(k=5))
    assert adjusted_rand_score(expected, result.groups.numpy()) == 1
    assert result.silhouette == pytest.approx(silhouette_score(unit, expected), rel=1e-5)
    sizes = result.groups.bincount().tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert (result.nmi, result.purity) == (None, None)


def test_the_distance_of_an_image_is_that_to_the_mean_of_its_cluster():
    features, _ = groups(60, 3, 0.5)
    result = clustering(features, None, ClusteringSettings(k=3), nearness="euclidean")
    for number in range(3):
        own = result.groups == number
        expected = (features[own] - features[own].mean(0)).norm(dim=1)
        torch.testing.assert_close(result.distances[own], expected, rtol=1e-5, atol=1e-6)


def test_without_labels_the_number_of_clusters_is_the_one_with_the_largest_silhouette():
    features, _ = groups(120, 5, 0.05)
    result = clustering(features, None, ClusteringSettings(largest_k=9))
    assert list(result.tried) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert max(result.tried, key=lambda k: result.tried[k]) == len(result.groups.unique()) == 5
    assert result.silhouette == pytest.approx(result.tried[5], rel=1e-5)
    # Asked for with labels too.
    assert len(clustering(features, torch.arange(120) % 2, ClusteringSettings(k="auto")).groups.unique()) == 5


@pytest.mark.parametrize("linkage", ["average", "complete"])
def test_identities_are_merged_up_to_the_threshold_as_a_loop_merges_them(linkage):
    features, _ = groups(14, 4, 0.35)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    cosines = unit @ unit.T
    clusters = [[number] for number in range(14)]
    while len(clusters) > 1:
        pairs = [(one, other) for number, one in enumerate(clusters) for other in clusters[:number]]
        near = [cosines[one][:, other] for one, other in pairs]
        values = [float(own.mean() if linkage == "average" else own.min()) for own in near]
        best = max(range(len(pairs)), key=lambda number: values[number])
        if values[best] < 0.6:
            break
        one, other = pairs[best]
        clusters = [own for own in clusters if own not in (one, other)] + [one + other]
    settings = ClusteringSettings(k="threshold", threshold=0.6, linkage=linkage)
    actual = clustering(features, None, settings).groups
    assert {tuple(sorted(own)) for own in clusters} == {
        tuple((actual == number).nonzero().flatten().tolist()) for number in range(int(actual.max()) + 1)
    }
    assert len(clusters) > 2


def test_the_threshold_of_a_verification_is_used_if_none_is_given_and_its_lack_is_refused():
    points, settings = torch.tensor([[0.0], [1.0], [9.0]]), ClusteringSettings(k="threshold")
    assert clustering(points, None, settings, nearness="euclidean", threshold=1.0).groups.tolist() == [0, 0, 1]
    assert clustering(points, None, settings, nearness="euclidean", threshold=0.5).groups.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="measure it by tasks=verification first"):
        clustering(points, None, settings)


def test_more_images_than_fit_in_memory_as_pairs_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr("manyviews.evaluators.clustering.MOST_MERGED", 5)
    with pytest.raises(ValueError, match="takes 5 of them at most, not 6; name some classes"):
        clustering(torch.eye(6), None, ClusteringSettings(k="threshold", threshold=0.5))


def test_fewer_images_than_clusters_and_equal_ones_are_refused():
    with pytest.raises(ValueError, match="4 images cannot be 5 clusters"):
        clustering(torch.eye(4), None, ClusteringSettings(k=5))
    with pytest.raises(ValueError, match="3 with different features are needed"):
        clustering(torch.ones(4, 2), None)
