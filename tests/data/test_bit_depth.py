"""Pictures whose samples Pillow would lose, mix or turn round, beside the values that were written."""

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from manyviews.data.decoding import bit_depth
from manyviews.data.decoding.decode import Decoding, UnreadableImageError, looks_like_an_image

SIDE = 8
ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE]
COLOURS = np.stack([ROWS * 36, COLUMNS * 36, (ROWS + COLUMNS) * 18], -1)
ALPHA = ROWS * 30 + 40


def read(path: Path, **options) -> np.ndarray:
    return Decoding(3, SIDE, (255, 255, 255), 10**6, **options).read(path).permute(1, 2, 0).numpy().astype(float)


def over(colours: np.ndarray) -> np.ndarray:
    return 255 + (colours - 255.0) * (ALPHA / 255)[..., None]


def tiff(
    values: np.ndarray,
    *,
    order: str = "<",
    planar: bool = False,
    packed: bool = False,
    tiles: bool = False,
    photometric: int | None = None,
    extra: dict[int, list[int]] | None = None,
) -> bytes:
    """A TIFF by hand of [rows, columns, channels], of one strip (or tile) for each plane; `packed` by Deflate."""
    channels = values.shape[2]
    planes = np.moveaxis(values, 2, 0)[..., None] if planar else values[None]
    if tiles:
        planes = np.pad(planes, ((0, 0), (0, 16 - SIDE), (0, 16 - SIDE), (0, 0)))
    content = [plane.astype(plane.dtype.newbyteorder(order)).tobytes() for plane in planes]
    content = [zlib.compress(part) for part in content] if packed else content
    depth, kind = 8 * values.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: [SIDE], 257: [SIDE], 258: [depth] * channels, 259: [8 if packed else 1], 277: [channels]}
    tags |= {262: [(2 if channels > 2 else 1) if photometric is None else photometric], 284: [2 if planar else 1]}
    tags |= {339: [kind] * channels, **({322: [16], 323: [16]} if tiles else {278: [SIDE]}), **(extra or {})}
    places, sizes = (324, 325) if tiles else (273, 279)
    tags |= {places: [0] * len(content), sizes: [len(part) for part in content]}
    start = 8 + 2 + 12 * len(tags) + 4
    start += sum(4 * len(own) for own in tags.values() if len(own) > 1)
    tags[places] = [start + sum(tags[sizes][:index]) for index in range(len(content))]
    head, arrays = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags)), b""
    for tag, own in sorted(tags.items()):
        at = 8 + 2 + 12 * len(tags) + 4 + len(arrays)
        arrays += struct.pack(f"{order}{len(own)}I", *own) if len(own) > 1 else b""
        head += struct.pack(f"{order}HHII", tag, 4, len(own), at if len(own) > 1 else own[0])
    return head + bytes(4) + arrays + b"".join(content)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, colour: int, *before: bytes, depth: int = 16) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, 0))
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    tail = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + tail


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


WIDE = (COLOURS * 257).astype(np.uint16)
LAYOUTS = [(order, packed, tiles) for order in "<>" for packed in (False, True) for tiles in (False, True)]


@pytest.mark.parametrize(("order", "packed", "tiles"), LAYOUTS)
def test_colours_of_sixteen_bits_in_separate_planes_are_those_that_were_written(tmp_path, order, packed, tiles):
    content = tiff(WIDE, order=order, planar=True, packed=packed, tiles=tiles)
    np.testing.assert_array_equal(read(write(tmp_path, "a.tif", content)), COLOURS)
    alpha = np.concatenate([WIDE, (ALPHA * 257).astype(np.uint16)[..., None]], -1)
    content = tiff(alpha, order=order, planar=True, packed=packed, tiles=tiles, extra={338: [2]})
    np.testing.assert_allclose(read(write(tmp_path, "b.tif", content)), over(COLOURS), atol=1)


@pytest.mark.parametrize(("order", "packed", "tiles"), LAYOUTS)
@pytest.mark.parametrize("premultiplied", [False, True])
def test_grey_and_alpha_in_separate_planes_are_composited(tmp_path, order, packed, tiles, premultiplied):
    grey = COLOURS[..., 0]
    stored = grey * ALPHA // 255 if premultiplied else grey
    values = np.stack([stored, ALPHA], -1).astype(np.uint8)
    extra = {338: [1 if premultiplied else 2]}
    content = tiff(values, order=order, planar=True, packed=packed, tiles=tiles, extra=extra)
    path = write(tmp_path, "a.tif", content)
    # Pillow reads grey with premultiplied alpha since 13.0.
    if premultiplied and int(PIL.__version__.split(".")[0]) < 13:
        with pytest.raises(UnreadableImageError, match="save it with 8 or 16 bits"):
            read(path)
        return
    np.testing.assert_allclose(read(path), over(np.repeat(grey[..., None], 3, 2)), atol=2)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["i2", "i4", "f4"])
def test_wide_greys_of_either_order_of_bytes_are_those_that_were_written(tmp_path, order, packed, kind):
    white = {"i2": 32767, "i4": 65535, "f4": 1}[kind]
    values = (COLOURS[..., :1] / 255 * white).astype(kind)
    path = write(tmp_path, "a.tif", tiff(values, order=order, packed=packed))
    np.testing.assert_allclose(read(path)[..., 0], COLOURS[..., 0], atol=1)


def test_signed_bytes_and_a_white_of_zero_are_not_turned_round(tmp_path):
    signed = write(tmp_path, "signed.tif", tiff((COLOURS[..., :1] - 128).astype(np.int8)))
    low, high = COLOURS[..., 0].min(), COLOURS[..., 0].max()
    np.testing.assert_allclose(read(signed)[..., 0], (COLOURS[..., 0] - low) * 255 / (high - low), atol=1)
    inverted = write(tmp_path, "inverted.tif", tiff(65535 - WIDE[..., :1], photometric=0))
    np.testing.assert_array_equal(read(inverted)[..., 0], COLOURS[..., 0])


def values_of(bits: int, channels: int) -> np.ndarray:
    values = np.rint(COLOURS[..., :channels] / COLOURS.max() * ((1 << bits) - 1))
    return values.astype(np.uint16)


FULL = COLOURS / COLOURS.max() * 255


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["tif", "planar", "png"])
def test_values_of_fewer_bits_in_sixteen_are_as_bright_as_they_were_meant(tmp_path, bits, channels, kind, caplog):
    bit_depth._warn_of_guess.cache_clear()
    values = values_of(bits, channels)
    if kind == "png":
        content = png(values.astype(">u2"), 2 if channels == 3 else 0)
    else:
        content = tiff(values, planar=kind == "planar" and channels == 3)
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            expected = FULL if channels == 3 else FULL[..., [0, 0, 0]]
            np.testing.assert_allclose(read(write(tmp_path, f"{name}.{kind[:3]}", content)), expected, atol=1)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (bits < 16)
    assert all(f"{bits} bits" in line and "data.bits" in line for line in said)


def test_what_a_file_declares_counts_more_than_its_largest_value(tmp_path, caplog):
    dark = values_of(12, 3) // 16
    expected = dark * (255 / 4095)
    tif = write(tmp_path, "a.tif", tiff(dark, extra={281: [4095] * 3}))
    declared = write(tmp_path, "a.png", png(dark.astype(">u2"), 2, chunk(b"sBIT", bytes([12] * 3))))
    shifted = write(tmp_path, "b.png", png((dark << 4).astype(">u2"), 2, chunk(b"sBIT", bytes([12] * 3))))
    for path in (tif, declared, shifted):
        np.testing.assert_allclose(read(path), expected, atol=1)
    assert not caplog.records


def test_the_bits_that_a_person_names_count_where_the_file_says_nothing(tmp_path, caplog):
    dark = values_of(12, 3) // 16
    path = write(tmp_path, "a.tif", tiff(dark))
    np.testing.assert_allclose(read(path, bits=12), dark * (255 / 4095), atol=1)
    np.testing.assert_allclose(read(path, bits=16), dark / 257, atol=1)
    bright = write(tmp_path, "b.tif", tiff(WIDE))
    np.testing.assert_allclose(read(bright, bits=12), COLOURS, atol=1)
    assert not caplog.records


def test_a_dark_jpeg_2000_of_twelve_bits_and_a_dark_pgm_stay_dark(tmp_path, caplog):
    dark = (COLOURS[..., 0] // 16).astype(np.uint16)
    pgm = write(tmp_path, "a.pgm", b"P5 8 8 4095\n" + dark.astype(">u2").tobytes())
    np.testing.assert_allclose(read(pgm)[..., 0], dark * (255 / 4095), atol=1)
    Image.fromarray(dark * 16).save(tmp_path / "a.j2k", irreversible=False)
    np.testing.assert_allclose(read(tmp_path / "a.j2k")[..., 0], dark * (16 / 257), atol=1)
    assert not caplog.records


def test_signed_samples_of_a_jpeg_2000_are_refused(tmp_path):
    content = io.BytesIO()
    Image.fromarray(COLOURS.astype(np.uint8)).save(content, "JPEG2000", no_jp2=True)
    data = bytearray(content.getvalue())
    data[data.index(b"\xff\x4f\xff\x51") + 42] |= 0x80
    with pytest.raises(UnreadableImageError, match="signed samples"):
        read(write(tmp_path, "a.j2k", bytes(data)))


def test_a_transparent_value_of_sixteen_or_of_few_bits_is_exactly_that_one(tmp_path):
    grey = np.array([[0x1234, 0x12FF], [0x1234, 0xFFFF]], ">u2").repeat(4, 0).repeat(4, 1)
    clear = write(tmp_path, "grey.png", png(grey, 0, chunk(b"tRNS", b"\x12\x34")))
    np.testing.assert_array_equal(read(clear)[::4, ::4, 0], [[255, 19], [255, 255]])
    colours = np.repeat(grey[..., None], 3, 2)
    clear = write(tmp_path, "rgb.png", png(colours, 2, chunk(b"tRNS", b"\x12\x34" * 3)))
    np.testing.assert_array_equal(read(clear)[::4, ::4, 0], [[255, 19], [255, 255]])
    for depth in (2, 4):
        values = (COLUMNS % 4).astype(np.uint8)
        packed = np.packbits(((values[..., None] >> np.arange(depth)[::-1]) & 1).reshape(SIDE, -1), axis=1)
        content = png(packed, 0, chunk(b"tRNS", b"\0\1"), depth=depth)
        grey = np.where(values == 1, 255, values * (255 // ((1 << depth) - 1)))
        np.testing.assert_array_equal(read(write(tmp_path, f"{depth}.png", content))[..., 0], grey)


def test_grey_and_alpha_of_sixteen_bits_keep_all_of_them(tmp_path):
    values = np.stack([values_of(12, 1)[..., 0], (ALPHA * 16).astype(np.uint16)], -1)
    path = write(tmp_path, "a.png", png(values.astype(">u2"), 4))
    grey = values[..., :1] * (255 / 4095)
    expected = 255 + (grey - 255) * (ALPHA * 16 / 4095)[..., None]
    np.testing.assert_allclose(read(path), np.repeat(expected, 3, 2), atol=1)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
@pytest.mark.parametrize("behind", [False, True])
def test_a_sound_picture_with_much_text_is_read(tmp_path, kind, behind):
    pixels = COLOURS.astype(np.uint8)
    long = zlib.compress(b"a" * 3_000_000)
    text = {"zTXt": b"k\0\0" + long, "iTXt": b"k\0\1\0\0\0" + long, "tEXt": b"k\0" + b"a" * 70_000_000}[kind]
    content = png(pixels, 2, depth=8)
    at = len(content) - 12 if behind else 33
    path = write(tmp_path, "a.png", content[:at] + chunk(kind.encode(), text) + content[at:])
    np.testing.assert_array_equal(read(path), COLOURS)


def test_a_first_frame_that_does_not_fill_the_canvas_shows_the_background(tmp_path):
    content = io.BytesIO()
    image = Image.fromarray(np.ones((4, 4), np.uint8), "P")
    image.putpalette([0, 255, 0, 9, 9, 9])
    image.save(content, "GIF")
    data = bytearray(content.getvalue())
    data[6:10] = struct.pack("<HH", SIDE, SIDE)
    expected = np.full((SIDE, SIDE, 3), 255)
    expected[:4, :4] = 9
    np.testing.assert_array_equal(read(write(tmp_path, "a.gif", bytes(data))), expected)


@pytest.mark.parametrize("bits", [0, 8])
def test_alpha_of_a_tga_counts_where_its_header_says_that_it_is_alpha(tmp_path, bits):
    pixels = np.concatenate([COLOURS[::-1, :, ::-1], ALPHA[::-1, :, None]], -1).astype(np.uint8)
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, SIDE, SIDE, 32, bits)
    path = write(tmp_path, "a.tga", header + pixels.tobytes())
    np.testing.assert_allclose(read(path), over(COLOURS) if bits else COLOURS, atol=1)


def test_what_has_no_signature_is_tried_by_its_name_alone(tmp_path):
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, SIDE, SIDE, 24, 0)
    with pytest.raises(UnreadableImageError, match="not an image"):
        read(write(tmp_path, "a.png", header + bytes(3 * SIDE * SIDE)))
    for ending in ("tga", "j2k", "qoi", "pcx", "sgi", "pfm", "TGA"):
        assert looks_like_an_image(Path(f"a.{ending}"))
    for ending in ("tif", "j2k", "qoi", "jp2", "avif"):
        Image.fromarray(COLOURS.astype(np.uint8)).save(tmp_path / f"a.{ending}")
        (tmp_path / f"a.{ending}").rename(tmp_path / ending)
        assert looks_like_an_image(tmp_path / ending), ending


def test_planes_that_overlap_to_fill_the_memory_are_refused(tmp_path):
    content = tiff(WIDE, planar=True, extra={279: [0] * 3})
    large = bytearray(content)
    at = large.index(struct.pack("<HHI", 279, 4, 3)) + 8
    (place,) = struct.unpack_from("<I", large, at)
    struct.pack_into("<3I", large, place, *[len(content) // 2] * 3)
    with pytest.raises(UnreadableImageError, match="planes"):
        read(write(tmp_path, "a.tif", bytes(large)))


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_in_separate_planes_and_a_grey_that_calls_itself_one_are_read_as_they_are(tmp_path, packed, caplog):
    dark = (COLOURS // 5).astype(np.uint8)
    np.testing.assert_array_equal(read(write(tmp_path, "a.tif", tiff(dark, planar=True, packed=packed))), dark)
    for order in "<>":
        for grey in (WIDE[..., :1], WIDE[..., :1].astype(np.int32), (COLOURS[..., :1] / 255).astype(np.float32)):
            path = write(tmp_path, "b.tif", tiff(grey, order=order, planar=True, packed=packed))
            np.testing.assert_array_equal(read(path)[..., 0], COLOURS[..., 0])
    assert not caplog.records
