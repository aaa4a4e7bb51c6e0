"""Boxes of upright pictures in images that are stored turned, or decoded at a fraction of their size."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

DENSITY = 1.5
"""Pixels that a JPEG is decoded to along a box, for each pixel along the side of its square.

At this limit the squares of photographs differ from those of the full picture by 0.6 to 1.0 grey levels on average; at
1 by 1.3 to 2.1, at 2 by 0.4 to 0.6.
"""
DIVISORS = (8, 4, 2)
"""Fractions of its size to which a JPEG is decoded at less work."""
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
ORIENTATION = 0x0112
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


def orientation_of(image: Image.Image, exif: Callable[[Image.Image], Image.Exif] | None = None) -> int:
    """The EXIF orientation of an image, 1 for a TIFF, which Pillow turns itself."""
    if image.format == "TIFF":
        return 1
    try:
        return int((image.getexif() if exif is None else exif(image)).get(ORIENTATION, 1))
    except Exception:  # broken metadata of a valid image
        return 1


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


def resized(image: Image.Image, box: Box, side: int, interpolation: str) -> Pixels:
    """The square [side, side, channels] of a box, in pixels, with antialiasing; what lies beyond the image is left out.

    Near its edge the square also sees what lies beside the box, as far as the filter reaches.
    """
    left, top, right, bottom = _within(box, image.width, image.height)
    small = image.resize((side, side), FILTERS[interpolation], box=(left, top, right, bottom), reducing_gap=3.0)
    return np.asarray(small).reshape(side, side, -1)


def rounded(pixels: UInt8[Tensor, "height width channels"], box: Box, side: int, interpolation: str) -> Pixels:
    """The square of a box that is rounded to whole pixels, at least one, as `resized` makes it in half the time."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = map(round, _within(box, width, height))
    left, top = min(left, width - 1), min(top, height - 1)
    part = pixels[top : max(bottom, top + 1), left : max(right, left + 1)].permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(part, (side, side), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()


def check_boxes(boxes: Float[Tensor, "_ 4"]) -> None:
    """Raises ValueError for a box that is empty, or outside the image."""
    for left, top, right, bottom in boxes.tolist():
        if not (max(left, 0) < min(right, 1) and max(top, 0) < min(bottom, 1)):
            raise ValueError(
                f"the box ({left:g}, {top:g}, {right:g}, {bottom:g}) is empty or outside the image; give left, top, "
                "right and bottom as shares of its width and height, from 0 to 1"
            )


def _within(box: Box, width: int, height: int) -> Box:
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
