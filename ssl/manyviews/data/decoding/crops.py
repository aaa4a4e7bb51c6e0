"""Boxes of upright pictures in images that are stored turned, or decoded at a fraction of their size."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

DENSITY = 1.5
"""Pixels that a JPEG is decoded to along a box, for each pixel along the side of its square.

At this limit the squares of photographs differ from those of the full picture by 0.6 to 1.0 grey levels on average; at
1 by 1.3 to 2.1, at 2 by 0.4 to 0.6.
"""
DIVISORS = (8, 4, 2)
"""Fractions of its size to which a JPEG is decoded at less work."""
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation (TIFF 6.0, page 36)."""
SIDEWAYS, LEFT_IS_RIGHT, TOP_IS_BOTTOM = (5, 6, 7, 8), (2, 3, 7, 8), (3, 4, 6, 7)
"""Orientations in which axes are exchanged, and those in which the stored columns or rows run backwards."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def stored_box(upright: Sequence[float], orientation: int) -> Box:
    """The box of the stored image that shows a box of the upright one; both in shares.

    Examples:
        >>> stored_box((0.0, 0.0, 0.25, 0.5), orientation=6)
        (0.0, 0.75, 0.5, 1.0)
    """
    left, top, right, bottom = upright
    if orientation in SIDEWAYS:
        left, top, right, bottom = top, left, bottom, right
    if orientation in LEFT_IS_RIGHT:
        left, right = 1 - right, 1 - left
    if orientation in TOP_IS_BOTTOM:
        top, bottom = 1 - bottom, 1 - top
    return left, top, right, bottom


def upright_pixels(stored: Pixels, orientation: int) -> Pixels:
    """A view of pixels [height, width, ...] of a stored image, turned upright."""
    if orientation in LEFT_IS_RIGHT:
        stored = stored[:, ::-1]
    if orientation in TOP_IS_BOTTOM:
        stored = stored[::-1]
    return stored.swapaxes(0, 1) if orientation in SIDEWAYS else stored


def divisor(sizes: Iterable[tuple[float, float, int]]) -> int:
    """The largest of `DIVISORS` by which boxes, of width, height and side, may shrink, or 1."""
    enough = min((min(width, height) / (DENSITY * side) for width, height, side in sizes), default=1.0)
    return next((number for number in DIVISORS if number <= enough), 1)


def resized(image: Image.Image, box: Box, side: int, interpolation: str, *, exact: bool) -> Pixels:
    """The square [side, side, channels] of a box, in pixels, with antialiasing; what lies beyond the image is left out.

    Unless `exact`, a box of more pixels than its square is rounded to whole ones, and resized by PyTorch.
    """
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[2], image.width), min(box[3], image.height)
    if exact or min(right - left, bottom - top) < side:
        small = image.resize((side, side), FILTERS[interpolation], box=(left, top, right, bottom), reducing_gap=3.0)
        return np.asarray(small).reshape(side, side, -1)
    part = image.crop((round(left), round(top), round(right), round(bottom)))
    pixels = torch.from_numpy(np.array(part).reshape(part.height, part.width, -1)).permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(pixels, (side, side), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()
