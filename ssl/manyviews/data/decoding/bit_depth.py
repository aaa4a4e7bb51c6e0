"""Converts images to 8 bits per channel where Pillow would lose or mix samples."""

import io
import logging
import struct
from collections.abc import Mapping
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch.utils.data import get_worker_info

from manyviews.data.decoding.planes import (
    BITS,
    LARGEST_SAMPLE,
    LARGEST_TYPED,
    PHOTOMETRIC,
    PLANAR,
    SAMPLE_FORMAT,
    SAMPLES,
    SIGNED,
    Deep,
    Samples,
    deep_samples,
    packing_of,
)

logger = logging.getLogger(__name__)

GUESSES = (8, 10, 12, 14)
"""Bits that are assumed for undeclared 16-bit values, if the largest value of an image fits."""
SCALED = frozenset({"JPEG2000", "PPM"})
"""Formats whose values Pillow scales to 16 bits by the declaration of the file."""
MOST_CHUNKS = 1000
LARGEST_HEAD = 1 << 16


def eight_bits(image: Image.Image, background: tuple[int, int, int], bits: int | None = None) -> Image.Image:
    """Loads an image in 8 bits per channel, composited on the background.

    The white of integers with more than 8 bits is declared by the file (a TIFF's bits and largest sample value, a PNG's
    sBIT, the maximum of a PPM, the bits of a JPEG 2000), else it has `bits`, else the fewest of 8, 10, 12, 14 and 16
    bits that hold the largest value. Floats up to 1 have a white of 1, up to 255 of 255. If there are negative or
    larger values, the range of the image is stretched.

    Examples:
        >>> eight_bits(Image.new("I;16", (1, 1), 65535), (0, 0, 0)).getpixel((0, 0))
        255

    Raises:
        ValueError: Pillow would decode the image wrongly, or it has NaN or infinite values.
    """
    _correct(image)
    declared = _declared_bits(image)
    extent = image.tile[0].extents if isinstance(image, ImageFile.ImageFile) and len(image.tile) == 1 else None
    tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    white_is_zero, depth = tags.get(PHOTOMETRIC) == 0, tags.get(BITS, (8,))[0]
    signed = SIGNED in tags.get(SAMPLE_FORMAT, ())
    # The low bits of a TGA's image descriptor.
    alpha_bits = (_peek(image, 17, 1) or b"\x08")[0] & 15
    no_alpha = image.format == "TGA" and image.mode == "RGBA" and not alpha_bits
    clear = image.info.get("transparency")
    deep = deep_samples(image)
    if deep is None or not tags:
        # A PNG may have metadata after its pixels.
        image.load()
    if deep is not None:
        return _on_background(_reduced(deep, 16 if deep.full else declared, bits, clear), background)
    if image.mode.startswith("I") or image.mode == "F" or signed:
        values = np.asarray(image)
        if signed and image.mode == "L":
            values = values.view(np.int8)
        elif tags and not signed and depth == 32 and image.mode == "I":
            values = values.view(np.uint32)
        grey = _scaled(values, declared, bits, (1 << 15) - 1 if signed and depth == 16 else (1 << 16) - 1)
        grey = 255 - grey if white_is_zero else grey
        if isinstance(clear, int):
            shown = np.where(values == clear, 0, 255).astype(np.uint8)
            return _on_background(Image.fromarray(np.stack([grey, shown], -1), "LA"), background)
        return Image.fromarray(grey)
    if no_alpha:
        return image.convert("RGB")
    if image.format == "GIF" and extent is not None and extent != (0, 0, *image.size):
        # The first frame does not fill the canvas.
        canvas = Image.new("RGBA", image.size)
        canvas.paste(image.convert("RGBA").crop(extent), extent[:2])
        return _on_background(canvas, background)
    if image.has_transparency_data:
        return _on_background(image, background)
    return image.convert("L") if image.mode == "1" else image


def without_text(file: BinaryIO) -> io.BytesIO:
    """A PNG file without its texts, which Pillow refuses beyond 1 MB."""
    file.seek(0)
    kept = io.BytesIO()
    kept.write(file.read(8))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(length + 4, io.SEEK_CUR)
        else:
            kept.write(head + file.read(length + 4))
    kept.seek(0)
    return kept


def metadata_follows(image: Image.Image) -> bool:
    """Whether a PNG that is not loaded yet has texts or EXIF after its pixels."""
    start, pixels = 8, False
    while len(head := _peek(image, start, 8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        pixels |= kind == b"IDAT"
        start += 12 + length
    return False


def _correct(image: Image.Image) -> None:
    """Corrects how Pillow unpacks an image; raises ValueError where that cannot be corrected."""
    if image.format == "JPEG2000" and _signed_jpeg2000(image):
        raise ValueError("JPEG 2000 with signed samples is not read; save it as TIFF or PNG")
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PLANAR) == 2 and image.tag_v2.get(SAMPLES, 1) == 1:
        # A single separate plane, whose samples Pillow would read as bytes.
        image.tag_v2[PLANAR] = 1
        image._setup()
    tile, clear = image.tile[0], image.info.get("transparency")
    if image.format == "PNG" and tile.args in ("L;2", "L;4") and isinstance(clear, int):
        # Pillow scales these greys to 8 bits, but not the transparent one.
        image.info["transparency"] = clear * 255 // (3 if tile.args == "L;2" else 15)
    if isinstance(image, TiffImageFile) and tile.codec_name == "libtiff":
        # libtiff returns bytes in the machine's order.
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        mode = packing_of(image)
        natural = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF", "I;16S": "I;16NS", "I;32S": "I;32NS"}
        image.tile = [tile._replace(args=(natural.get(mode, mode), *arguments[1:]))]
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PLANAR) == 2 and image.mode == "PA":
        raise ValueError("a TIFF with a palette and transparency in separate planes is not read; interleave them")


def _declared_bits(image: Image.Image) -> int | None:
    """The significant bits that a file declares; 16 where Pillow scales to that."""
    if image.format in SCALED:
        return 16
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        depth = tags.get(BITS, (1,))[0]
        if 8 < depth < 16:
            return int(depth)
        for tag in (LARGEST_SAMPLE, LARGEST_TYPED):
            largest = tags.get(tag, 0)
            highest = max(largest) if isinstance(largest, tuple) else largest
            if isinstance(highest, int) and 0 < highest < 1 << 16:
                # The largest value in use (TIFF 6.0): it gives the bits, not the white.
                return highest.bit_length()
    return _png_bits(image) if image.format == "PNG" else None


def _png_bits(image: Image.Image) -> int | None:
    """The chunk sBIT of a PNG that is not loaded yet."""
    start = 8
    for _ in range(MOST_CHUNKS):
        head = _peek(image, start, 12)
        if len(head) < 8 or head[4:8] == b"IDAT":
            return None
        length, kind = struct.unpack_from(">I4s", head)
        if kind == b"sBIT" and 0 < length <= 4:
            return max(head[8 : 8 + length])
        start += 12 + length
    return None


def _signed_jpeg2000(image: Image.Image) -> bool:
    """Whether a component of a codestream is signed, by its marker SIZ (ISO 15444-1, A.5.1)."""
    head = _peek(image, 0, LARGEST_HEAD)
    start = head.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(head) < start + 42:
        return False
    (components,) = struct.unpack_from(">H", head, start + 40)
    return any(depth & 0x80 for depth in head[start + 42 : start + 42 + 3 * components : 3])


def _peek(image: Image.Image, start: int, count: int) -> bytes:
    """Bytes of the file of an image that is not loaded yet; empty without a file."""
    file = getattr(image, "fp", None)
    if file is None:
        return b""
    position = file.tell()
    try:
        file.seek(start)
        content: bytes = file.read(count)
        return content
    finally:
        file.seek(position)


def _reduced(deep: Deep, declared: int | None, bits: int | None, clear: object) -> Image.Image:
    """16-bit samples in 8 bits; colours and alpha each have their own white."""
    values, opaque = deep.values, None
    if deep.mode in ("RGBA", "RGBa", "LA", "La"):
        values, opaque = values[..., :-1], values[..., -1]
    top = (1 << 16) - 1
    channels = _scaled(values, declared, bits, top)
    mode = deep.mode
    if isinstance(clear, tuple) and len(clear) == values.shape[-1]:
        opaque, mode = np.where((values == np.asarray(clear)).all(-1), 0, top).astype(np.uint16), f"{mode}A"
    if opaque is not None:
        if mode in ("RGBa", "La"):
            # Premultiplied: colours are at most alpha, which therefore has the same white.
            both = _scaled(deep.values, declared, bits, top)
            channels, alpha = both[..., :-1], both[..., -1]
        else:
            alpha = _scaled(opaque, declared, bits, top)
        channels = np.concatenate([channels, alpha[..., None]], -1)
    size = (channels.shape[1], channels.shape[0])
    return Image.frombytes(mode, size, np.ascontiguousarray(channels).tobytes())


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    straight = image.convert("LA") if image.mode == "La" else image
    if not straight.has_transparency_data:
        return straight
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), straight.convert("RGBA"))


def _scaled(values: Samples, declared: int | None, bits: int | None, top: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Values of any type as 8 bits; `top` is the white of integers that use all of their bits."""
    if not np.isfinite(values).all():
        raise ValueError("holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if values.dtype == np.int8:
        white = 127.0
    elif values.dtype.kind in "iu":
        white = float(_white(values, int(high), declared, bits, top))
    else:
        white = 1.0 if high <= 1 else 255.0
    if low < 0 or high > white:
        start, span = low, max(high - low, 1e-30)
    else:
        start, span = 0.0, white
    return np.asarray(np.rint((values.astype(np.float64) - start) * (255 / span)), np.uint8)


def _white(values: Samples, highest: int, declared: int | None, bits: int | None, top: int) -> int:
    """The white of 16-bit integers."""
    if declared is not None:
        fits = highest < 1 << declared < 1 << 16
        # The values of a PNG should be scaled up, whatever its sBIT; not all writers do so.
        shifted = fits and highest > 0 and not bool((values % (1 << (16 - declared))).any())
        return (1 << declared) - 1 if fits and not shifted else top
    if bits is not None:
        return min((1 << bits) - 1, top) if highest < 1 << bits else top
    for guess in GUESSES:
        if highest < 1 << guess:
            if highest:
                _warn_of_guess(guess)
            return (1 << guess) - 1
    return top


@cache
def _warn_of_guess(bits: int) -> None:
    worker = get_worker_info()
    if worker is None or worker.id == 0:
        logger.warning(
            "16-bit images whose values are all below %s are read as images of %d bits, white being %s; if that is "
            "wrong, set the bits of all of them: data.bits=16",
            f"{1 << bits:,}",
            bits,
            f"{(1 << bits) - 1:,}",
        )
