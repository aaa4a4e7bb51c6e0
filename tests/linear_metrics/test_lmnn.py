import itertools

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from manyviews.linear_metrics import LMNN
from manyviews.linear_metrics.linear_metric import labelled
from manyviews.linear_metrics.lmnn import descend, find_impostors, lmnn_loss, target_neighbours


def overlapping(images: int = 40, dim: int = 4, classes: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (images,), generator=generator)
    return centres[labels] + torch.randn(images, dim, generator=generator, dtype=torch.float64), labels


def oracle(weights: Tensor, features: Tensor, labels: Tensor, neighbours: int, push: float) -> tuple[Tensor, int]:
    """The paper's loss, image by image, with the targets by the Euclidean distance of the features."""
    mapped, total, active = features @ weights.T, torch.zeros((), dtype=torch.float64), 0
    for i in range(len(features)):
        own = [j for j in range(len(features)) if j != i and labels[j] == labels[i]]
        for j in sorted(own, key=lambda j: float((features[i] - features[j]).norm()))[:neighbours]:
            pulled = (mapped[i] - mapped[j]).square().sum()
            total = total + (1 - push) * pulled
            for other in (labels != labels[i]).nonzero().flatten().tolist():
                hinge = 1 + pulled - (mapped[i] - mapped[other]).square().sum()
                if hinge > 0:
                    total, active = total + push * hinge, active + 1
    return total, active


@pytest.mark.parametrize(("neighbours", "push", "rank"), [(3, 0.5, 4), (1, 0.2, 2), (100, 0.7, 4)])
@pytest.mark.parametrize("small", [False, True])
def test_value_and_gradient_equal_a_loop_over_triplets(neighbours, push, rank, small, monkeypatch):
    if small:
        monkeypatch.setattr("manyviews.linear_metrics.lmnn.PAIRS", 7)
        monkeypatch.setattr("manyviews.linear_metrics.lmnn.TILE", 9)
    features, labels = overlapping()
    # A class of two images, and one of a single image, which pushes only.
    labels[:3] = torch.tensor([3, 3, 4])
    data = labelled(features, labels)
    weights = torch.randn(rank, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected, active = oracle(weights, features, labels, neighbours, push)
    (gradient,) = torch.autograd.grad(expected, weights)
    targets = target_neighbours(data, neighbours)
    for reserve in (0.0, 0.5):
        impostors = find_impostors(weights.detach(), data.features, data.labels, targets, reserve)
        loss, own, triplets = lmnn_loss(weights.detach(), data.features, targets, impostors, push)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        assert triplets.item() == active
        torch.testing.assert_close(own, gradient, rtol=1e-9, atol=1e-9)


def test_targets_are_the_nearest_of_the_class_and_never_the_image_itself():
    features, labels = overlapping()
    features[5] = features[6]
    labels[:8] = torch.tensor([3, 3, 4, 0, 0, 1, 1, 1])
    targets = target_neighbours(labelled(features, labels), 3)
    assert targets[:2].tolist() == [[1, -1, -1], [0, -1, -1]]
    assert targets[2].tolist() == [-1, -1, -1]
    assert (targets[5, 0].item(), targets[6, 0].item()) == (6, 5)
    for image, found in enumerate(targets.tolist()):
        own = [j for j in range(40) if j != image and labels[j] == labels[image]]
        nearest = sorted(own, key=lambda j: float((features[image] - features[j]).norm()))[:3]
        assert [j for j in found if j >= 0] == nearest


@pytest.mark.parametrize("reserve", [0.0, 0.1])
def test_the_loss_with_all_impostors_counted_never_rises(reserve, monkeypatch):
    # Without a reserve, images that nobody looked at do come too near, and steps are taken back.
    monkeypatch.setattr("manyviews.linear_metrics.lmnn.RESERVE", reserve)
    features, labels = overlapping(100, 5, 4)
    data = labelled(features, labels)
    targets = target_neighbours(data, 3)
    start = torch.eye(5, dtype=torch.float64)
    found = descend(start, data.features, data.labels, targets, LMNN(iterations=200, tolerance=1e-6))
    assert len(found.values) > 3
    assert all(after <= before for before, after in itertools.pairwise(found.values))
    assert found.values[-1] < 0.8 * found.values[0]
    assert found.values[-1] == pytest.approx(
        oracle(found.weights, data.features, data.labels, 3, 0.5)[0].item(), rel=1e-10
    )


def test_the_minimum_is_the_same_from_every_start():
    features, labels = overlapping(80)
    data = labelled(features, labels)
    targets = target_neighbours(data, 3)
    generator = torch.Generator().manual_seed(3)
    starts = [torch.eye(4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64, generator=generator)]
    ends = [
        descend(start, data.features, data.labels, targets, LMNN(iterations=2000, tolerance=1e-9)) for start in starts
    ]
    assert ends[0].values[-1] == pytest.approx(ends[1].values[-1], rel=1e-4)
    matrices = [end.weights.T @ end.weights for end in ends]
    torch.testing.assert_close(*matrices, rtol=0.05, atol=0.05 * matrices[0].abs().max().item())


def test_neighbours_are_right_where_a_feature_of_noise_hides_them():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    features = torch.randn(600, 6, generator=generator)
    features[:, 0] = labels + 0.15 * features[:, 0]
    features[:, 5] *= 50
    train, test = slice(0, 400), slice(400, 600)
    metric = LMNN().fit(features[train], labels[train])

    def accuracy(mapped: Tensor) -> float:
        return KNeighborsClassifier(3).fit(mapped[train], labels[train]).score(mapped[test], labels[test])

    assert accuracy(features) < 0.5
    assert accuracy(metric.transform(features)) > 0.95
    narrow = LMNN(rank=1, start="whitening").fit(features[train], labels[train])
    assert accuracy(narrow.transform(features)) > 0.95
    again = LMNN().fit(features[train], labels[train])
    assert torch.equal(metric.weights, again.weights)


def test_a_report_tells_how_many_steps_are_taken_at_each_search():
    messages = []
    features, labels = overlapping()
    LMNN(iterations=12, tolerance=1e-9).fit(features, labels, report=lambda *args: messages.append(args))
    assert messages == [("LMNN", 10, 12), ("LMNN", 12, 12)]


def test_what_cannot_be_fitted_is_said_with_the_way_out():
    features, labels = overlapping()
    with pytest.raises(ValueError, match="all labelled images are of class 2"):
        LMNN().fit(features, torch.full_like(labels, 2))
    with pytest.raises(ValueError, match="no class has two images"):
        LMNN().fit(features, torch.arange(40))
    with pytest.raises(ValueError, match="rank 5 is above the 4 dimensions"):
        LMNN(rank=5).fit(features, labels)
    with pytest.raises(ValueError, match="target neighbours coincide"):
        LMNN().fit(labels[:, None].double().repeat(1, 4), labels)
