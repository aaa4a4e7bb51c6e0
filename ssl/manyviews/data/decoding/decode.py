"""Decodes image files of any format to uint8 squares."""

import errno
import io
import os
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from manyviews.data.decoding.bit_depth import eight_bits, without_text
from manyviews.system.files import RefusedFileError, open_regular, shown

# Not all of Pillow's: some run other programs (EPS), or match files of other formats.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI", "SGI")
BY_NAME = {".tga": "TGA", ".pcx": "PCX"}
"""Formats without a signature, tried only for files with this ending."""
ENDINGS = (
    "jpg jpeg jpe jfif png apng gif bmp dib webp tif tiff ppm pgm pbm pnm pfm jp2 j2k j2c jpc jpf jpx avif qoi sgi "
    "tga pcx heic heif"
)
SUFFIXES = frozenset(f".{ending}" for ending in ENDINGS.split())
"""Endings of images; HEIC is among them to be reported as unreadable."""

SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"),
    *(b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ", b"qoif"),
)

PILLOW_LIMIT = 178_956_970
"""Pillow itself refuses more pixels than this."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112


class UnreadableImageError(ValueError):
    """A file that is not an image, damaged, or refused, with the `reason`."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{shown(path)}: {reason}")
        self.reason = reason


T = TypeVar("T")
Opener = Callable[[], BinaryIO]
"""Opens a regular file for reading; raises OSError or ValueError."""


@dataclass(frozen=True)
class Decoding:
    """Decodes the central square of an image, upright and resized with antialiasing.

    The format is detected from the content, not the name. More than 8 bits are reduced to 8 by `eight_bits`, of an
    animation the first frame is used, and colour profiles are ignored.
    """

    channels: int
    """1 or 3."""
    size: int
    """Side of the square, in pixels."""
    background: tuple[int, int, int]
    """Red, green and blue on which transparent pixels are composited."""
    max_pixels: int
    """Larger images are refused before they are decoded."""
    bits: int | None = None
    """Significant bits of 16-bit values that do not declare them; None: guessed from the largest."""

    def read(self, path: Path, opener: Opener | None = None) -> UInt8[Tensor, "channels size size"]:
        """Decodes the image in a file, which `opener` opens if given.

        Raises:
            UnreadableImageError: it cannot be read or decoded, is truncated, or has more than `max_pixels` pixels.
        """

        def square(image: Image.Image) -> Tensor:
            # JPEG decodes at 1/2, 1/4 or 1/8 at a fraction of the work; at twice the size the resize still antialiases.
            image.draft(None, (2 * self.size, 2 * self.size))
            return self.square(image)

        return _of_picture(square, path, self.max_pixels, opener)

    def check(self, path: Path, opener: Opener | None = None) -> None:
        """Raises UnreadableImageError if a file is not an image or too large; decodes nothing."""
        _of_picture(lambda image: None, path, self.max_pixels, opener)

    def square(self, image: Image.Image) -> UInt8[Tensor, "channels size size"]:
        """Converts an open image to a square."""
        converted = eight_bits(image, self.background, self.bits).convert("L" if self.channels == 1 else "RGB")
        # Pillow turns TIFFs itself.
        upright = None if image.format == "TIFF" else UPRIGHT.get(_orientation(image))
        if upright is not None:
            converted = converted.transpose(upright)
        pixels = np.array(_square(converted, self.size)).reshape(self.size, self.size, self.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def looks_like_an_image(path: Path) -> bool:
    """Whether the ending of a name, or else the first bytes of the file, are those of an image."""
    suffix = path.suffix.lower()
    if suffix:
        return suffix in SUFFIXES
    try:
        with open_regular(path) as file:
            start = file.read(12)
    except (OSError, RefusedFileError):
        return False
    webp, avif = start[:4] == b"RIFF" and start[8:] == b"WEBP", start[4:] in (b"ftypavif", b"ftypavis")
    return start.startswith(SIGNATURES) or webp or avif


def quiet() -> AbstractContextManager[object]:
    """Context without Pillow's warnings; enter it before starting threads."""
    return warnings.catch_warnings(action="ignore")


@cache
def _formats(suffix: str) -> tuple[str, ...]:
    Image.init()
    known = tuple(name for name in FORMATS if name in Image.OPEN)
    named = BY_NAME.get(suffix.lower())
    return known if named is None else (*known, named)


def _of_picture(use: Callable[[Image.Image], T], path: Path, max_pixels: int, opener: Opener | None) -> T:
    """Applies a function to the image in a file, which is not decoded yet."""

    def read(file: BinaryIO | io.BytesIO) -> T:
        with Image.open(file, formats=_formats(path.suffix)) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than data.max_pixels={max_pixels}")
            return use(image)

    try:
        with open_regular(path) if opener is None else opener() as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError("the file is empty")
            try:
                return read(file)
            except ValueError as error:
                if not re.search("MAX_TEXT_CHUNK|text chunks", str(error)):
                    raise
                # Pillow refuses PNGs with long texts.
                return read(without_text(file))
    except Exception as error:  # a broken file makes Pillow's plugins raise nearly anything
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            # Not an error of the file, which would be left out.
            way_out = "too many files are open; raise the limit (ulimit -n) or use fewer workers"
            raise OSError(error.errno, way_out, error.filename) from error
        raise UnreadableImageError(path, _reason(error, path)) from error


def _reason(error: Exception, path: Path) -> str:
    if path.suffix.lower() in {".heic", ".heif"}:
        return "HEIC is not read; convert it to JPEG or PNG"
    if isinstance(error, UnidentifiedImageError):
        if path.suffix.lower() in {".tif", ".tiff"}:
            return "not an image, or a TIFF of samples or a compression that are not read; save it with 8 or 16 bits"
        return "not an image, or of an unknown kind"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more pixels than data.max_pixels allows ({error})"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    if isinstance(error, RefusedFileError):
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return shown(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken metadata of a valid image
        return 1


def _square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return image.crop(box)
    # One resize of the central square is the resize of the shorter side followed by the crop, at less cost.
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
