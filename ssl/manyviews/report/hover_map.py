"""The 2-D map as the page's script takes it: points, classes, names, and a sprite sheet of small pictures."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyviews.report.findings import Findings, drawn, has_labels, labels_of
from manyviews.report.pictures import Sprite, sprite, thumbnails
from manyviews.report.plots import OTHER, PALETTE
from manyviews.system.files import spelled

MOST = 2_500
"""Points of a map: as many pictures weigh a megabyte or two."""
SIDE = 32
TITLES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
MEANINGS = {
    "pca": "The first two principal components: what is far apart here is far apart.",
    "tsne": "t-SNE keeps neighbours; distances between groups, and their sizes, mean little.",
    "umap": "UMAP keeps neighbours; distances between groups, and their sizes, mean little.",
}


class Group(NamedTuple):
    """What one button of the legend stands for."""

    name: str
    colour: str
    images: int


class HoverMap(NamedTuple):
    """The map: what the page shows, and the data of its script."""

    methods: tuple[tuple[str, str], ...]
    """Titles and what each map keeps."""
    groups: tuple[Group, ...]
    """The classes of the legend; empty without labels."""
    sprite: Sprite
    images: int
    data: dict[str, Any]


def hover_map(findings: Findings, seed: int) -> HoverMap | None:
    """The maps of at most 2,500 images, the same images in all; None where no map was given."""
    maps = {method: (ids, points) for method, (ids, points) in findings.points.items() if len(ids)}
    if not maps:
        return None
    common = torch.cat([ids for ids, _ in maps.values()]).unique()
    chosen = drawn(common, MOST, seed, 6).sort().values
    images, labels = findings.shown, labels_of(findings.shown)[chosen]
    groups, group_of = legend(findings, labels)
    sheet = sprite(thumbnails(images, chosen, SIDE))
    data = {
        "maps": [_placed(*maps[method], chosen) for method in maps],
        "names": [spelled(images.names[index]) for index in chosen.tolist()],
        "classes": [findings.class_name(number) for number in labels.unique().tolist()],
        "class": torch.searchsorted(labels.unique(), labels).tolist(),
        "group": group_of.tolist(),
        "colours": [group.colour for group in groups] or [PALETTE[0]],
        "columns": sheet.columns,
        "tile": sheet.tile,
        "side": sheet.side,
        "labelled": has_labels(labels),
    }
    methods = tuple((TITLES.get(method, method), MEANINGS.get(method, "")) for method in maps)
    return HoverMap(methods, tuple(groups), sheet, len(chosen), data)


def legend(findings: Findings, labels: Tensor) -> tuple[list[Group], Tensor]:
    """The classes of some images as groups of one colour each, and the group of each image.

    Where there are more classes than colours the largest have one each, and all others share one; so do images without
    a class among those with one.
    """
    groups: list[Group] = []
    of_each = torch.zeros(len(labels), dtype=torch.int64)
    if not has_labels(labels):
        return groups, of_each
    numbers, counts = labels[labels >= 0].unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[: len(PALETTE)]
    if len(numbers) > len(PALETTE):
        order = order[:-1]
    for number in numbers[order].sort().values.tolist():
        own = labels == number
        of_each[own] = len(groups)
        groups.append(Group(findings.class_name(number), PALETTE[len(groups)], int(own.sum())))
    rest = ~torch.isin(labels, numbers[order])
    if rest.any():
        more, nameless = len(numbers) - len(order), bool((labels[rest] < 0).any())
        words = [f"{more:,} more classes"] * (more > 0) + ["no class"] * nameless
        of_each[rest] = len(groups)
        groups.append(Group(" and ".join(words), OTHER, int(rest.sum())))
    return groups, of_each


def _placed(ids: Tensor, points: Tensor, chosen: Tensor) -> list[list[int] | None]:
    """The points of the chosen images in thousandths of the larger side; None for an image without a finite one."""
    points = points.double()
    finite = points.isfinite().all(1)
    if not finite.any():
        return [None] * len(chosen)
    low, high = points[finite].amin(0), points[finite].amax(0)
    scaled = (points - (low + high) / 2) / (high - low).amax().clamp(min=1e-12) * 1000 + 500
    places = {int(index): row for row, index in enumerate(ids.tolist()) if finite[row]}
    rounded = scaled.nan_to_num().round().long().tolist()
    return [rounded[places[index]] if index in places else None for index in chosen.tolist()]
