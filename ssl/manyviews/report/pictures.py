"""Images as a page and TensorBoard show them: small, as data URIs, in sprite sheets and in grids."""

import base64
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from manyviews.data import Images

READ_AT_ONCE = 256
BLOCK = 8
"""JPEG's side of a block, in pixels: tiles that are multiples of it do not run into each other."""
QUALITY = 88


class Sprite(NamedTuple):
    """Many small pictures in one: picture i is in column i mod `columns`, in row i div `columns`."""

    uri: str
    columns: int
    tile: int
    """Side of a picture's place, in pixels."""
    side: int
    """Side of the picture, at the upper left of its place."""


def thumbnails(
    images: Images, ids: Int64[Tensor, " chosen"], side: int
) -> UInt8[Tensor, "chosen channels small small"]:
    """The images of these ids, made smaller where they are larger than `side` pixels, never enlarged."""
    pieces = [torch.empty(0, images.channels, *[min(side, images.size)] * 2, dtype=torch.uint8)]
    for part in ids.split(READ_AT_ONCE):
        pixels = images.read(part)
        if images.size > side:
            shrunk = F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
            pixels = shrunk.round().clamp(0, 255).to(torch.uint8)
        pieces.append(pixels)
    return torch.cat(pieces)


def uris(images: Images, ids: Sequence[int], side: int) -> dict[int, str]:
    """The thumbnails of some images as data URIs, by id; what comes twice is read once."""
    chosen = sorted(set(ids))
    small = thumbnails(images, torch.tensor(chosen, dtype=torch.int64), side)
    return {index: jpeg(picture) for index, picture in zip(chosen, small, strict=True)}


def sprite(pictures: UInt8[Tensor, "pictures channels side side"]) -> Sprite:
    """One picture of many, as square as can be."""
    count, _, side, _ = pictures.shape
    tile = math.ceil(side / BLOCK) * BLOCK
    columns = max(1, math.ceil(math.sqrt(count)))
    return Sprite(jpeg(sheet(pictures, columns, tile)), columns, tile, side)


def sheet(
    pictures: UInt8[Tensor, "pictures channels side side"], columns: int, tile: int
) -> UInt8[Tensor, "3 height width"]:
    """Pictures row by row in colour, each at the upper left of a square of `tile` pixels, on black."""
    gap = tile - pictures.shape[-1]
    grid: UInt8[Tensor, "3 height width"] = make_grid(F.pad(pictures, (0, gap, 0, gap)), columns, padding=0)
    return grid


def jpeg(picture: UInt8[Tensor, "channels height width"]) -> str:
    """A picture as a data URI."""
    pixels = picture.permute(1, 2, 0).squeeze(2).contiguous().numpy()
    content = io.BytesIO()
    # Colour at full resolution: halved, its blocks would be 16 pixels wide and neighbours on a sheet would mix.
    Image.fromarray(pixels).save(content, "JPEG", quality=QUALITY, subsampling=0)
    return data_uri(content.getvalue(), "image/jpeg")


def png(picture: UInt8[Tensor, "channels height width"]) -> bytes:
    """A picture as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).squeeze(2).contiguous().numpy()).save(content, "PNG", optimize=True)
    return content.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Some bytes as an address that holds them itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
