"""Clusters on the page: which are shown, with which images and shares of classes."""

from dataclasses import replace
from pathlib import Path

import torch

from manyviews.evaluators.results.measurement import Evaluation
from manyviews.report import Findings
from manyviews.report.clusters import Clusters, clusters_of
from report_findings import images


def clusters(groups: list[int], labels: list[int] | None, distances: list[float] | None = None) -> Clusters | None:
    count, classes = len(groups), () if labels is None else tuple("abcdefgh")
    shown = replace(images(count, classes), labels=None if labels is None else torch.tensor(labels))
    found = torch.tensor(distances) if distances is not None else torch.arange(count) / count
    evaluation = Evaluation(
        predictions={"clustering/learned": torch.tensor(groups)}, values={"clustering/learned": found}
    )
    return clusters_of(Findings(Path("run"), shown, None, {"learned": (None, torch.zeros(count, 2))}, evaluation))


def test_the_purest_come_first_with_the_shares_of_their_classes_from_the_centre_outwards() -> None:
    own = clusters([0, 0, 0, 0, 1, 1], [0, 1, 1, 2, 3, 3], [0.4, 0.1, 0.3, 0.2, 0.6, 0.5])
    assert own is not None
    ((title, (first, second)),) = own.groups
    assert title == "All, the purest first"
    assert (first.number, first.images, first.major) == (1, (5, 4), 3)
    assert [(share.name, share.share) for share in first.shares] == [("d", 1)]
    assert (second.number, second.size, second.images, second.major) == (0, 4, (1, 3, 2, 0), 1)
    assert [(share.name, share.share) for share in second.shares] == [("b", 0.5), ("a", 0.25), ("c", 0.25)]


def test_of_many_clusters_the_purest_and_the_most_mixed_are_shown_without_single_images() -> None:
    # Cluster n has 5 images, min(n, 5) of which are of another class; the last ones are of a single image.
    groups = [number for number in range(14) for _ in range(5)] + [14, 15]
    labels = [int(image < min(number, 5)) * (image + 1) for number in range(14) for image in range(5)] + [7, 7]
    own = clusters(groups, labels)
    assert own is not None
    (purest, pure), (mixed, most) = own.groups
    assert (purest, mixed) == ("The purest", "The most mixed")
    assert [cluster.number for cluster in pure][:3] == [0, 1, 2]
    assert {cluster.number for cluster in most} <= set(range(4, 14))
    assert own.total == 16


def test_without_labels_clusters_are_shown_by_size_and_tightness() -> None:
    own = clusters([0, 0, 0, 1, 1, -1], None)
    assert own is not None
    ((title, shown),) = own.groups
    assert (title, [cluster.size for cluster in shown], own.images) == ("All, by size", [3, 2], 5)
    assert shown[0].shares == ()
    radii = [float((7 * number) % 20) for number in range(20) for _ in range(5)]
    many = clusters([number for number in range(20) for _ in range(5)], None, radii)
    assert many is not None
    (_, largest), (title, tightest) = many.groups
    assert title == "The tightest"
    assert [cluster.number for cluster in largest] == list(range(6))
    assert [cluster.radius for cluster in tightest] == [0, 1, 2, 3, 4, 5]


def test_without_a_clustering_there_is_nothing_to_show() -> None:
    count = 3
    features = {"learned": (None, torch.zeros(count, 2))}
    assert clusters_of(Findings(Path("run"), images(count, ()), None, features)) is None
