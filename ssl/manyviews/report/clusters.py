"""Clusters of the images shown, as rows of pictures: the purest and the most mixed, or by size."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from manyviews.report.findings import Findings, has_labels, labels_of
from manyviews.report.plots import OTHER, PALETTE

PICTURES = 8
"""Images of each cluster, in equal steps from its centre outwards."""
ROWS = 6
"""Clusters of each group; if there are not more than two groups hold, all are in one."""
FEWEST = 5
"""Images of a cluster below which it is not listed as pure or tight: a single image always is."""
NAMED = 4
"""Classes of a cluster that are named; the others are counted together."""


class Share(NamedTuple):
    """The part of a cluster that is of one class, or of all others."""

    name: str
    share: float
    colour: str


class Cluster(NamedTuple):
    """A cluster with some of its images."""

    number: int
    size: int
    radius: float
    """Mean distance of its images to its centre."""
    images: tuple[int, ...]
    major: int
    """The most frequent class, or −1 without labels."""
    shares: tuple[Share, ...]
    """Of the most frequent classes; empty without labels."""


class Clusters(NamedTuple):
    """The clusters of a page, in groups."""

    groups: tuple[tuple[str, tuple[Cluster, ...]], ...]
    """Titles and clusters."""
    total: int
    images: int
    labelled: bool


def clusters_of(findings: Findings) -> Clusters | None:
    """Returns the clusters of the leading kind of features; None if they were not measured."""
    name = f"clustering/{findings.kind}"
    groups, distances = findings.evaluation.predictions.get(name), findings.evaluation.values.get(name)
    if groups is None or distances is None or len(groups) != len(findings.shown):
        return None
    clustered = (groups >= 0).nonzero().squeeze(1)
    labels = labels_of(findings.shown)
    labelled = has_labels(labels[clustered])
    # By cluster, then from the centre outwards.
    order = clustered[distances[clustered].argsort(stable=True)]
    order = order[groups[order].argsort(stable=True)]
    parts = order.split(groups[order].bincount().tolist())
    sizes = torch.tensor([len(part) for part in parts])
    radii = torch.stack([distances[part].mean() for part in parts])
    purity = torch.stack([_purity(labels[part]) for part in parts])
    titles = _ordered(sizes, radii, purity if labelled else None)
    return Clusters(
        tuple(
            (title, tuple(_cluster(findings, number, parts[number], labels, distances) for number in numbers))
            for title, numbers in titles
        ),
        len(parts),
        len(clustered),
        labelled,
    )


def _ordered(sizes: Tensor, radii: Tensor, purity: Tensor | None) -> list[tuple[str, list[int]]]:
    """Titles of groups of clusters, and the numbers of these."""
    # The largest first, which the numbers are by.
    count, largest = len(sizes), torch.arange(len(sizes))
    counted = largest[sizes >= FEWEST] if bool((sizes >= FEWEST).any()) else largest
    if purity is None:
        if count <= 2 * ROWS:
            return [("All, by size", largest.tolist())]
        tightest = counted[radii[counted].argsort(stable=True)]
        return [("The largest", largest[:ROWS].tolist()), ("The tightest", tightest[:ROWS].tolist())]
    if count <= 2 * ROWS:
        return [("All, the purest first", purity.argsort(descending=True, stable=True).tolist())]
    purest = counted[purity[counted].argsort(descending=True, stable=True)]
    mixed = counted[purity[counted].argsort(stable=True)]
    return [("The purest", purest[:ROWS].tolist()), ("The most mixed", mixed[:ROWS].tolist())]


def _purity(labels: Int64[Tensor, " images"]) -> Float[Tensor, ""]:
    """Share of the most frequent class among the images that have one."""
    known = labels[labels >= 0]
    return known.bincount().max() / len(known) if len(known) else torch.zeros(())


def _cluster(findings: Findings, number: int, ids: Tensor, labels: Tensor, distances: Tensor) -> Cluster:
    steps = torch.linspace(0, len(ids) - 1, min(PICTURES, len(ids))).round().long()
    known, counts = labels[ids][labels[ids] >= 0].unique(return_counts=True)
    by_count = counts.argsort(descending=True, stable=True)
    total = max(int(counts.sum()), 1)
    shares = [
        Share(findings.class_name(int(known[row])), int(counts[row]) / total, PALETTE[int(known[row]) % len(PALETTE)])
        for row in by_count[:NAMED].tolist()
    ]
    if len(known) > NAMED:
        rest = int(counts[by_count[NAMED:]].sum())
        shares.append(Share(f"{len(known) - NAMED:,} more", rest / total, OTHER))
    major = int(known[by_count[0]]) if len(known) else -1
    radius = float(distances[ids].mean())
    return Cluster(number, len(ids), radius, tuple(ids[steps].tolist()), major, tuple(shares))
