"""Decodes image files of any format to uint8 squares, whole or by boxes."""

import errno
import io
import os
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from manyviews.data.decoding.bit_depth import eight_bits, metadata_follows, without_text
from manyviews.data.decoding.crops import (
    SIDEWAYS,
    TURNS,
    check_boxes,
    divisor,
    orientation_of,
    resized,
    rounded,
    stored_box,
    upright_pixels,
)
from manyviews.data.decoding.jpeg import jpeg_pixels
from manyviews.data.images import Interpolation
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

JPEGS = ("JPEG", "MPO")


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
    """Decodes images, upright and resized with antialiasing: whole, squeezed to a square, or boxes of them.

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
    torchcodec: bool = field(default=False, repr=False, compare=False)
    """Decode JPEGs by torchcodec where it can be, to the same pixels."""

    def read(self, path: Path, opener: Opener | None = None) -> UInt8[Tensor, "channels size size"]:
        """Decodes the whole image in a file, which `opener` opens if given, to a square.

        Raises:
            UnreadableImageError: it cannot be read or decoded, is truncated, or has more than `max_pixels` pixels.
        """
        return self.read_whole(path, opener)[0]

    def read_whole(self, path: Path, opener: Opener | None = None) -> tuple[UInt8[Tensor, "channels size size"], float]:
        """Decodes an image as `read` does, and returns its aspect too."""

        def draft(image: Image.Image) -> tuple[Tensor, float]:
            shape = aspect(image)
            # JPEG decodes at 1/2, 1/4 or 1/8 at a fraction of the work; at twice the size the resize still antialiases.
            image.draft(None, (2 * self.size, 2 * self.size))
            return self.square(image), shape

        return _of_picture(draft, path, self.max_pixels, opener)

    def crop(
        self,
        path: Path,
        crops: Sequence[tuple[Float[Tensor, "_ 4"], int]],
        *,
        interpolation: Interpolation = "bilinear",
        exact: bool = True,
        opener: Opener | None = None,
    ) -> list[UInt8[Tensor, "_ channels _ _"]]:
        """Decodes boxes of the image in a file to squares, from as few pixels as they need.

        Args:
            path: the file.
            crops: for each side of squares, boxes (left, top, right, bottom) in shares of the upright image, and the
                side in pixels.
            interpolation: the filter, antialiased.
            exact: keep fractions of pixels. Otherwise boxes of a picture that is decoded at full size are rounded to
                whole pixels, as torchvision's crops are, and resizing takes half the time.
            opener: opens the file instead.

        Raises:
            UnreadableImageError: as `read` does.
            ValueError: a box is empty, or outside the image.
        """
        for boxes, _ in crops:
            check_boxes(boxes)
        return _of_picture(
            lambda image: self.squares(image, crops, interpolation, exact=exact), path, self.max_pixels, opener
        )

    def check(self, path: Path, opener: Opener | None = None) -> float:
        """Reads the aspect of the image in a file, which is decoded only if it is a PNG that ends with EXIF.

        Raises:
            UnreadableImageError: it is not an image, or too large.
        """
        return _of_picture(aspect, path, self.max_pixels, opener)

    def square(self, image: Image.Image) -> UInt8[Tensor, "channels size size"]:
        """Converts an open image to a square."""
        converted = _in_mode(eight_bits(image, self.background, self.bits), "L" if self.channels == 1 else "RGB")
        turn = TURNS.get(orientation_of(image))
        upright = converted if turn is None else converted.transpose(turn)
        shape = (self.size, self.size)
        pixels = np.array(upright.resize(shape, Image.Resampling.BICUBIC, reducing_gap=3.0))
        return torch.from_numpy(pixels.reshape(*shape, self.channels)).permute(2, 0, 1).contiguous()

    def squares(
        self,
        image: Image.Image,
        crops: Sequence[tuple[Float[Tensor, "_ 4"], int]],
        interpolation: Interpolation,
        *,
        exact: bool = True,
    ) -> list[UInt8[Tensor, "_ channels _ _"]]:
        """Converts boxes of an open image to squares, as `crop` does."""
        wanted = [(boxes.tolist(), side) for boxes, side in crops]
        drafted, share = None, 0
        if image.format in JPEGS:
            width, height = image.size
            orientation = orientation_of(image)
            stored = [(stored_box(box, orientation), side) for boxes, side in wanted for box in boxes]
            share = divisor(
                ((right - left) * width, (bottom - top) * height, side) for (left, top, right, bottom), side in stored
            )
            # Of a grey image, the luma alone is decoded.
            drafted = image.draft("L" if self.channels == 1 else None, (width // share, height // share))
        # Pillow alone decodes JPEGs small.
        pixels = jpeg_pixels(image) if self.torchcodec and not exact and share == 1 else None
        size = image.size
        if pixels is None:
            loaded = eight_bits(image, self.background, self.bits)
            size = loaded.size
            # Grey becomes colour as a square.
            plain = loaded if loaded.mode == "L" else _in_mode(loaded, "L" if self.channels == 1 else "RGB")
            # A pixel of a picture that is decoded small is several of the file's.
            cut = partial(resized, plain) if exact or share > 1 else partial(rounded, _pixels(plain))
        else:
            cut = partial(rounded, pixels)
        # Of a JPEG decoded small, the last pixels may lie partly outside.
        wide, high = size if drafted is None else drafted[1][2:]
        orientation = orientation_of(image)
        results = []
        for boxes, side in wanted:
            result = torch.empty(len(boxes), self.channels, side, side, dtype=torch.uint8)
            for target, upright in zip(result.numpy(), boxes, strict=True):
                left, top, right, bottom = stored_box(upright, orientation)
                box = (left * wide, top * high, right * wide, bottom * high)
                target[:] = upright_pixels(cut(box, side, interpolation), orientation).transpose(2, 0, 1)
            results.append(result)
        return results


def aspect(image: Image.Image) -> float:
    """Width over height of an open image when it is upright.

    Examples:
        >>> aspect(Image.new("L", (3, 2)))
        1.5
    """
    width, height = image.size
    # Pillow would load a PNG to look for EXIF behind its pixels.
    known = isinstance(image, PngImageFile) and not metadata_follows(image)
    orientation = orientation_of(image, Image.Image.getexif if known else None)
    return height / width if orientation in SIDEWAYS else width / height


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


def _pixels(image: Image.Image) -> UInt8[Tensor, "height width channels"]:
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, -1))


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    # Pillow would copy an image that is in the mode.
    return image if image.mode == mode else image.convert(mode)
