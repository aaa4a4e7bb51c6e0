"""A picture of images, the crops drawn in, beside their views."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from manyviews.data import Images
from manyviews.data.pictures import pictures
from manyviews.views.normalisation import restored
from manyviews.views.pipeline import Views

GAP = 2
"""White pixels between the images."""
SMALLEST = 64
"""Side in pixels to which smaller views are enlarged, without smoothing."""
THIN = 100
"""Side in pixels of an image up to which outlines are one pixel wide."""
LINES = ((228, 26, 28), (55, 126, 184), (77, 175, 74), (152, 78, 163), (255, 127, 0), (166, 86, 40))
"""Colours of the outlines of crops, one for each view in turn."""


def preview(
    views: Views, images: Images, ids: Int64[Tensor, " rows"], device: torch.device, *, epochs: int = 4
) -> UInt8[Tensor, "3 height width"]:
    """One row per image: the whole image with the crops of the first epoch, then its views of the first epochs.

    Small local views stand in the corner of their cell.
    """
    size = views.window.size
    zoom = max(1, SMALLEST // size)
    side = zoom * size
    aspects = None if images.aspects is None else images.aspects[ids]
    corners = outlines(views.windows(ids, 0, aspects))
    shapes = torch.ones(len(ids)) if aspects is None else aspects
    rows = zip(images.read(ids), shapes.tolist(), corners.unbind(1), strict=True)
    columns = [torch.stack([original(square, aspect, outline, side) for square, aspect, outline in rows])]
    for epoch in range(epochs):
        for group in views(pictures(images, ids, views, epoch).to(device), ids.to(device), epoch):
            columns += [_cell(view, zoom, side) for view in restored(group, *views.normalisation).cpu()]
    cells = F.pad(torch.stack(columns), (GAP, 0, GAP, 0), value=255)
    picture = cells.permute(2, 1, 3, 0, 4).flatten(3, 4).flatten(1, 2)
    return F.pad(picture, (0, GAP, 0, GAP), value=255)


def original(
    square: UInt8[Tensor, "channels size size"], aspect: float, corners: Float[Tensor, "views 4 2"], side: int
) -> UInt8[Tensor, "3 side side"]:
    """A squeezed image in its own proportions, whole, with outlines of crops, in a white square."""
    array = square.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array.squeeze(2) if len(square) == 1 else array).convert("RGB")
    width, height = round(side * min(1, aspect)) or 1, round(side * min(1, 1 / aspect)) or 1
    resample = Image.Resampling.NEAREST if width % picture.width == 0 == height % picture.height else None
    picture = picture.resize((width, height), resample)
    draw, extent = ImageDraw.Draw(picture), torch.tensor([width - 1, height - 1])
    for number, corner in enumerate((corners + 1) / 2 * extent):
        draw.polygon([(x, y) for x, y in corner.tolist()], outline=LINES[number % len(LINES)], width=1 + side // THIN)
    cell = Image.new("RGB", (side, side), "white")
    cell.paste(picture, ((side - width) // 2, (side - height) // 2))
    return torch.from_numpy(np.array(cell)).permute(2, 0, 1)


def outlines(windows: Float[Tensor, "*batch 2 3"]) -> Float[Tensor, "*batch 4 2"]:
    """The corners of windows in their images, from -1 to 1."""
    corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]])
    return corners @ windows.transpose(-1, -2)


def _cell(
    values: Float[Tensor, "batch channels height width"], zoom: int, side: int
) -> UInt8[Tensor, "batch 3 side side"]:
    pixels = (values * 255).round().clamp(0, 255).to(torch.uint8)
    if pixels.shape[1] != 3:
        pixels = pixels.float().mean(1, keepdim=True).byte().expand(-1, 3, -1, -1)
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    rest = side - pixels.shape[-1]
    return F.pad(pixels, (0, rest, 0, rest), value=255)
