"""Images as thumbnails, data URIs and sprite sheets, and the map that shows them on hover."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from manyviews.data import Images
from manyviews.data.pictures import pictures, reads_crops
from manyviews.report.findings import Findings, drawn, has_labels, labels_of
from manyviews.report.plots import OTHER, PALETTE
from manyviews.system.files import spelled
from manyviews.views import StandardView

READ_AT_ONCE = 256
BLOCK = 8
"""Side of a JPEG block, in pixels: tiles that are multiples of it do not run into each other."""
QUALITY = 88
MOST_POINTS, SIDE = 2_500, 32
"""Most points of a map, and the side of their pictures in pixels: together a megabyte or two."""
TITLES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
MEANINGS = {
    "pca": "The first two principal components: what is far apart here is far apart.",
    "tsne": "t-SNE keeps neighbours; distances between groups, and their sizes, mean little.",
    "umap": "UMAP keeps neighbours; distances between groups, and their sizes, mean little.",
}


class Sprite(NamedTuple):
    """Many small pictures in one: picture i is in column i mod `columns`, row i div `columns`.

    Each has `side` pixels, at the upper left of a square tile of `tile` pixels.
    """

    uri: str
    columns: int
    tile: int
    side: int


class Group(NamedTuple):
    """One button of the map's legend."""

    name: str
    colour: str
    images: int


class HoverMap(NamedTuple):
    """The 2-D map: what the page shows, and the data of its script."""

    methods: tuple[tuple[str, str], ...]
    """Title and meaning of each map."""
    groups: tuple[Group, ...]
    """The classes of the legend; empty without labels."""
    sprite: Sprite
    data: dict[str, Any]


def thumbnails(
    images: Images, ids: Int64[Tensor, " chosen"], side: int, view: StandardView | None = None
) -> UInt8[Tensor, "chosen channels small small"]:
    """Reads what a view shows of these images, with `side` pixels or, of smaller images in memory, with theirs."""
    side = side if reads_crops(images) else min(side, images.size)
    small = replace(view or StandardView(side, images.channels), size=side, interpolation="bilinear")
    pieces = [small.bytes(pictures(images, part, small)) for part in ids.split(READ_AT_ONCE) if len(part)]
    return torch.cat(pieces) if pieces else torch.empty(0, images.channels, side, side, dtype=torch.uint8)


def uris(images: Images, ids: Sequence[int], side: int, view: StandardView | None = None) -> dict[int, str]:
    """Returns the thumbnails of some images as data URIs, by id; each is read once."""
    chosen = sorted(set(ids))
    small = thumbnails(images, torch.tensor(chosen, dtype=torch.int64), side, view)
    return {index: picture_uri(picture) for index, picture in zip(chosen, small, strict=True)}


def sprite(pictures: UInt8[Tensor, "pictures channels side side"]) -> Sprite:
    """Puts many pictures into one, as square as possible."""
    count, _, side, _ = pictures.shape
    tile = math.ceil(side / BLOCK) * BLOCK
    columns = max(1, math.ceil(math.sqrt(count)))
    return Sprite(picture_uri(sheet(pictures, columns, tile)), columns, tile, side)


def sheet(
    pictures: UInt8[Tensor, "pictures channels side side"], columns: int, tile: int
) -> UInt8[Tensor, "3 height width"]:
    """Arranges pictures row by row, each at the upper left of a black square of `tile` pixels."""
    gap = tile - pictures.shape[-1]
    grid: UInt8[Tensor, "3 height width"] = make_grid(F.pad(pictures, (0, gap, 0, gap)), columns, padding=0)
    return grid


def picture_uri(picture: UInt8[Tensor, "channels height width"], kind: Literal["jpeg", "png"] = "jpeg") -> str:
    """Encodes a picture as a data URI."""
    # Colour at full resolution: at half, blocks would be 16 pixels wide and neighbours on a sheet would mix.
    options = {"quality": QUALITY, "subsampling": 0} if kind == "jpeg" else {"optimize": True}
    content = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).squeeze(2).contiguous().numpy()).save(content, kind, **options)
    return data_uri(content.getvalue(), f"image/{kind}")


def data_uri(content: bytes, kind: str) -> str:
    """Encodes bytes of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def hover_map(findings: Findings, seed: int) -> HoverMap | None:
    """Returns the maps of at most 2,500 images, the same images in all; None without a map."""
    maps = {method: (ids, points) for method, (ids, points) in findings.points.items() if len(ids)}
    if not maps:
        return None
    common = torch.cat([ids for ids, _ in maps.values()]).unique()
    chosen = drawn(common, MOST_POINTS, seed, 6).sort().values
    images, labels = findings.shown, labels_of(findings.shown)[chosen]
    groups, group_of = legend(findings, labels)
    tiles = sprite(thumbnails(images, chosen, SIDE, findings.view))
    data = {
        "maps": [_scaled(*maps[method], chosen) for method in maps],
        "names": [spelled(images.names[index]) for index in chosen.tolist()],
        "classes": [findings.class_name(number) for number in labels.unique().tolist()],
        "class": torch.searchsorted(labels.unique(), labels).tolist(),
        "group": group_of.tolist(),
        "colours": [group.colour for group in groups] or [PALETTE[0]],
        "columns": tiles.columns,
        "tile": tiles.tile,
        "side": tiles.side,
        "labelled": has_labels(labels),
    }
    methods = tuple((TITLES.get(method, method), MEANINGS.get(method, "")) for method in maps)
    return HoverMap(methods, tuple(groups), tiles, data)


def legend(findings: Findings, labels: Tensor) -> tuple[list[Group], Tensor]:
    """Groups classes by colour; returns the groups and the group of each image.

    With more classes than colours, the largest have a colour each and all others share one, with the images without a
    class.
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
        parts = [f"{more:,} more classes"] * (more > 0) + ["no class"] * nameless
        of_each[rest] = len(groups)
        groups.append(Group(" and ".join(parts), OTHER, int(rest.sum())))
    return groups, of_each


def _scaled(ids: Tensor, points: Tensor, chosen: Tensor) -> list[list[int] | None]:
    """The chosen points in thousandths of the larger side; None for points that are not finite."""
    points = points.double()
    finite = points.isfinite().all(1)
    if not finite.any():
        return [None] * len(chosen)
    low, high = points[finite].amin(0), points[finite].amax(0)
    scaled = (points - (low + high) / 2) / (high - low).amax().clamp(min=1e-12) * 1000 + 500
    rows = {int(index): row for row, index in enumerate(ids.tolist()) if finite[row]}
    rounded = scaled.nan_to_num().round().long().tolist()
    return [rounded[rows[index]] if index in rows else None for index in chosen.tolist()]
