"""Decodes JPEGs by torchcodec where it is installed, to Pillow's pixels in less time."""

import importlib
import io
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

MODES = {"L": "GRAY", "RGB": "RGB"}
"""Pillow's modes of the JPEGs that torchcodec decodes, and its names for them."""
LARGEST_METADATA = 1 << 20
"""Bytes that are read beyond those of the decoded pixels; a longer file is left to Pillow."""
# ISO/IEC 10918-1, table B.1.
FIRST, WITHOUT_LENGTH, SCAN, APP1, APP15 = 0xC0, range(0xD0, 0xDA), 0xDA, 0xE1, 0xEF

DecodeJpeg = Callable[..., UInt8[Tensor, "channels height width"]]


def jpeg_pixels(image: Image.Image) -> UInt8[Tensor, "height width channels"] | None:
    """Decodes an open JPEG that is not loaded, as it is stored; None: Pillow has to.

    The pixels are those that Pillow would load, of one channel or three. None is also for files that torchcodec cannot
    decode, of which Pillow will say what is wrong.
    """
    decode = torchcodec_decoder()
    if decode is None or not isinstance(image, JpegImageFile) or image.format != "JPEG" or image.mode not in MODES:
        return None
    shape = (image.height, image.width, len(image.getbands()))
    try:
        assert image.fp is not None
        image.fp.seek(0)
        content = bytearray(image.fp.read(math.prod(shape) + LARGEST_METADATA))
        hide_exif(content)
        # A tensor, for torchcodec would change the filter of warnings, which threads share, to make one of bytes.
        pixels = decode(torch.frombuffer(content, dtype=torch.uint8), mode=MODES[image.mode]).permute(1, 2, 0)
    except Exception:  # Pillow tries it, and says what is wrong
        return None
    return pixels if pixels.shape == shape else None


def hide_exif(content: bytearray) -> None:
    """Marks the APP1 segments of a JPEG as unknown, by which torchcodec would turn the picture.

    Raises:
        ValueError: these are not the segments of a JPEG.
    """
    start = 2
    while (marker := content[start + 1]) != SCAN:
        if content[start] != 0xFF or not FIRST <= marker < 0xFF or marker in WITHOUT_LENGTH:
            raise ValueError(f"no segment of a JPEG begins at byte {start}")
        if marker == APP1:
            content[start + 1] = APP15
        start += 2 + int.from_bytes(content[start + 2 : start + 4])
        if start + 1 >= len(content):
            raise ValueError("it ends before its first scan")


@cache
def torchcodec_decoder() -> DecodeJpeg | None:
    """Returns torchcodec's `decode_jpeg`, if it is installed and gives Pillow's pixels."""
    try:
        return _tried()
    except Exception:  # whatever importing a library that does not fit raises
        return None


def require_torchcodec() -> None:
    """Raises ValueError, with the way out, if torchcodec cannot be used."""
    try:
        _tried()
    except Exception as problem:
        raise ValueError(
            f"data.decoder=torchcodec cannot be used here ({problem}): pip install 'manyviews[torchcodec]', or leave "
            "data.decoder=auto, which decodes by Pillow then"
        ) from problem


def _tried() -> DecodeJpeg:
    """Imports torchcodec and compares it with Pillow; raises what importing does, or ValueError."""
    decode: DecodeJpeg = importlib.import_module("torchcodec.decoders").decode_jpeg
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(23, 37, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    decoded = decode(file.getvalue(), mode="RGB").permute(1, 2, 0).numpy()
    if not np.array_equal(decoded, np.asarray(Image.open(file))):
        raise ValueError("it gives other pixels than Pillow")
    return decode
