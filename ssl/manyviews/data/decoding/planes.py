"""Reads 16-bit colours, of which Pillow keeps 8 bits, and TIFFs with separate planes."""

import io
import struct
import sys
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

Samples = np.ndarray[Any, np.dtype[Any]]

# TIFF 6.0, sections 8 and 16 and supplements: the numbers of the tags that are read here.
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIPS, STRIP_ROWS, STRIP_BYTES, LARGEST_SAMPLE, PLANAR, PREDICTOR = 273, 278, 279, 281, 284, 317
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES, SAMPLE_FORMAT, LARGEST_TYPED = 322, 323, 324, 325, 339, 341
SAMPLES, EXTRA, ORIENTATION = 277, 338, 274
SIGNED, PREMULTIPLIED = 2, 1

MIXED = frozenset({"RGB", "RGBA", "CMYK", "LA", "La"})
"""Modes of which Pillow reads some wrongly in separate planes."""
SECOND_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
"""The byte order with which Pillow keeps the less significant byte of each 16-bit value."""


class Deep(NamedTuple):
    """An image of 16-bit samples, of which Pillow would keep the upper 8 bits."""

    values: Samples
    """uint16 [height, width, channels]"""
    mode: str
    """Pillow's mode for the same channels of 8 bits."""
    full: bool = False
    """Whether white is 65535."""


def deep_samples(image: Image.Image) -> Deep | None:
    """Samples of 16-bit colours, grey with alpha or separate planes; None for other images."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.fp is None:
        return None
    packing = packing_of(image)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PLANAR) == 2 and image.mode in MIXED:
        wide = set(image.tag_v2.get(BITS, ())) == {16}
        if not wide and image.mode not in ("LA", "La") and image.tile[0].codec_name != "raw":
            return None  # Pillow reads these correctly
        mode = "RGBa" if image.mode == "RGBA" and PREMULTIPLIED in image.tag_v2.get(EXTRA, ()) else image.mode
        planes = [_plane(image, number) for number in range(len(Image.Image.getbands(image)))]
        values = np.stack(planes, -1)
        return Deep(values, mode) if wide else Deep(values.astype(np.uint16) * 257, mode, full=True)
    if packing == "LA;16B":
        return Deep(np.ascontiguousarray(_again(image, "RGBA", "RGBA")).view(">u2"), "LA")
    name, _, order = packing.partition(";16")
    if name not in ("RGB", "RGBX", "RGBA", "RGBa", "CMYK") or order not in SECOND_BYTE:
        return None
    # Premultiplied colours are divided later: Pillow would divide each byte by itself.
    straight = "RGBA" if name == "RGBa" else name
    low = _again(image, image.mode, f"{straight};16{SECOND_BYTE[order]}")
    high = _again(image, image.mode, f"{straight};16{order}")
    return Deep((high.astype(np.uint16) << 8) | low, "RGBa" if name == "RGBa" else image.mode)


def _again(image: ImageFile.ImageFile, mode: str, packing: str) -> Samples:
    """The bytes of an image that is opened a second time and unpacked with another mode."""
    assert image.fp is not None
    image.fp.seek(0)
    with Image.open(image.fp, formats=[str(image.format)]) as second:
        assert isinstance(second, ImageFile.ImageFile)
        second._mode = mode
        second.tile = [
            tile._replace(args=(packing, *tile.args[1:]) if isinstance(tile.args, tuple) else packing)
            for tile in image.tile
        ]
        return np.array(second)


def _plane(image: TiffImageFile, number: int) -> Samples:
    """One plane of a TIFF, decoded as a grey TIFF of its own."""
    tags, samples = image.tag_v2, image.tag_v2.get(SAMPLES, 1)
    tiled = TILES in tags
    offsets, sizes = (tags[TILES], tags[TILE_BYTES]) if tiled else (tags[STRIPS], tags[STRIP_BYTES])
    count = len(offsets) // samples
    assert image.fp is not None
    # Many strips may refer to the same large part of a file.
    if not count or len(sizes) != len(offsets) or sum(sizes) > image.fp.seek(0, io.SEEK_END):
        raise ValueError("its planes are not all there")
    parts = []
    for strip in range(number * count, (number + 1) * count):
        image.fp.seek(offsets[strip])
        parts.append(image.fp.read(sizes[strip]))
    own = {tag: [tags[tag]] for tag in (WIDTH, HEIGHT, COMPRESSION, FILL_ORDER, PREDICTOR) if tag in tags}
    own |= {tag: [tags[tag]] for tag in (STRIP_ROWS, TILE_WIDTH, TILE_HEIGHT, ORIENTATION) if tag in tags}
    own |= {BITS: [tags[BITS][0]], PHOTOMETRIC: [1], SAMPLES: [1]}
    own[TILE_BYTES if tiled else STRIP_BYTES] = [len(part) for part in parts]
    first = 8 + 2 + 12 * (len(own) + 1) + 4 + 8 * count
    starts = np.cumsum([first, *map(len, parts)])[:-1].tolist()
    own[TILES if tiled else STRIPS] = starts
    order = ">" if tags.prefix == b"MM" else "<"
    head, arrays = struct.pack(f"{order}2sHIH", tags.prefix, 42, 8, len(own)), b""
    for tag, values in sorted(own.items()):
        if len(values) > 1:
            (value,) = [8 + 2 + 12 * len(own) + 4 + len(arrays)]
            arrays += struct.pack(f"{order}{len(values)}I", *values)
        else:
            value = values[0]
        head += struct.pack(f"{order}HHII", tag, 4, len(values), value)
    content = (head + bytes(4) + arrays).ljust(first, b"\0") + b"".join(parts)
    with Image.open(io.BytesIO(content), formats=["TIFF"]) as plane:
        return np.array(plane)


def packing_of(image: ImageFile.ImageFile) -> str:
    """Pillow's name for the layout of the stored samples of an image that is not loaded yet."""
    arguments = image.tile[0].args
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""
