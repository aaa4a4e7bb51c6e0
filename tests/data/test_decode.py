import contextlib
import errno
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from manyviews.data.decoding.decode import Decoding, UnreadableImageError, quiet

WHITE = (255, 255, 255)


def read(path: Path, channels: int = 3, size: int = 2, background=WHITE, max_pixels: int = 10**6) -> list:
    pixels = Decoding(channels, size, background, max_pixels).read(path)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (channels, size, size)
    assert pixels.is_contiguous()
    return pixels.tolist()


def check(path: Path) -> float:
    return Decoding(3, 2, WHITE, 10**6).check(path)


def save(path: Path, values, **options) -> Path:
    Image.fromarray(np.asarray(values)).save(path, **options)
    return path


def mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


GREY = [[0, 100], [200, 255]]


def test_grey_is_repeated_over_three_channels(tmp_path):
    path = save(tmp_path / "a.png", np.array(GREY, np.uint8))
    assert read(path) == [GREY] * 3
    assert read(path, channels=1) == [GREY]


def test_colour_keeps_its_channels_and_their_order(tmp_path):
    values = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    assert read(save(tmp_path / "a.png", values)) == values.transpose(2, 0, 1).tolist()


def test_alpha_is_composited_on_the_background_and_hidden_colours_do_not_show(tmp_path):
    values = np.array([[[9, 9, 9, 0], [200, 100, 0, 255]], [[0, 0, 0, 51], [255, 0, 0, 0]]], np.uint8)
    path = save(tmp_path / "a.png", values)
    assert read(path) == [[[255, 200], [204, 255]], [[255, 100], [204, 255]], [[255, 0], [204, 255]]]
    assert read(path, background=(0, 10, 0)) == [[[0, 200], [0, 0]], [[10, 100], [8, 10]], [[0, 0], [0, 0]]]


def test_grey_with_alpha_is_composited(tmp_path):
    path = save(tmp_path / "a.png", np.array([[[9, 0], [7, 255]], [[0, 51], [100, 255]]], np.uint8))
    assert mode(path) == "LA"
    assert read(path, channels=1) == [[[255, 7], [204, 100]]]


def test_a_palette_gives_its_colours_and_its_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "solid.png")
    image.save(tmp_path / "clear.png", transparency=1)
    image.save(tmp_path / "clear.gif", transparency=1)
    assert read(tmp_path / "solid.png") == [[[10, 40], [70, 40]], [[20, 50], [80, 50]], [[30, 60], [90, 60]]]
    clear = [[[10, 255], [70, 255]], [[20, 255], [80, 255]], [[30, 255], [90, 255]]]
    assert read(tmp_path / "clear.png") == clear
    assert read(tmp_path / "clear.gif") == clear


def test_a_transparent_colour_of_a_grey_or_rgb_file_is_composited(tmp_path):
    Image.fromarray(np.array(GREY, np.uint8)).save(tmp_path / "grey.png", transparency=100)
    assert read(tmp_path / "grey.png", channels=1) == [[[0, 255], [200, 255]]]


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False], [False, True]])).save(tmp_path / "a.png")
    assert mode(tmp_path / "a.png") == "1"
    assert read(tmp_path / "a.png", channels=1) == [[[255, 0], [0, 255]]]


def test_cmyk_is_read_as_colour(tmp_path):
    values = np.array([[[0, 0, 0, 0], [255, 0, 0, 0]], [[0, 255, 0, 0], [0, 0, 0, 255]]], np.uint8)
    Image.fromarray(values, "CMYK").save(tmp_path / "a.tif")
    assert read(tmp_path / "a.tif") == [[[255, 0], [255, 0]], [[255, 255], [0, 0]], [[255, 255], [255, 0]]]


SIXTEEN = [[0, 200], [40000, 65535]]


@pytest.mark.parametrize("kind", ["I;16 png", "I;16 tif", "I;16B tif", "I tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, kind):
    path = tmp_path / f"a.{kind.split()[-1]}"
    if kind == "pgm":
        path.write_bytes(b"P5 2 2 65535\n" + np.array(SIXTEEN, ">u2").tobytes())
    elif kind == "I;16B tif":
        Image.frombytes("I;16B", (2, 2), np.array(SIXTEEN, ">u2").tobytes()).save(path)
    else:
        save(path, np.array(SIXTEEN, np.int32 if kind.startswith("I ") else np.uint16))
    assert mode(path) in {"I", "I;16", "I;16B"}
    assert read(path, channels=1) == [[[0, 1], [156, 255]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 0.2], [0.6, 1]], [[0, 51], [153, 255]]),
        ([[0, 1.2], [100, 255]], [[0, 1], [100, 255]]),
        ([[-1, 0], [2, 4]], [[0, 51], [153, 255]]),
        ([[7000, 7000], [7000, 7000]], [[0, 0], [0, 0]]),
    ],
)
def test_floats_are_shares_of_white_or_grey_values_or_stretched(tmp_path, values, expected):
    assert read(save(tmp_path / "a.tif", np.array(values, np.float32)), channels=1) == [expected]


def test_not_a_number_is_an_error(tmp_path):
    path = save(tmp_path / "a.tif", np.array([[0, np.nan], [0, 1]], np.float32))
    with pytest.raises(UnreadableImageError, match=r"a\.tif: holds NaN"):
        read(path)


ORIENTED = {
    1: [[1, 2], [3, 4]],
    2: [[2, 1], [4, 3]],
    3: [[4, 3], [2, 1]],
    4: [[3, 4], [1, 2]],
    5: [[1, 3], [2, 4]],
    6: [[3, 1], [4, 2]],
    7: [[4, 2], [3, 1]],
    8: [[2, 4], [1, 3]],
}


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_a_camera_held_sideways_gives_an_upright_image(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    options = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(np.array([[1, 2], [3, 4]], np.uint8) * 50).convert("RGB").save(path, exif=exif, **options)
    assert read(path, channels=1) == [(np.array(ORIENTED[orientation]) * 50).tolist()]


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.fromarray(np.full((2, 2), value, np.uint8)) for value in (40, 90, 200)]
    for ending in ("gif", "png", "webp"):
        path = tmp_path / f"a.{ending}"
        options = {"lossless": True} if ending == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        with Image.open(path) as image:
            assert image.n_frames == 3
        assert read(path, channels=1) == [[[40, 40], [40, 40]]]


def test_the_kind_is_found_in_the_content_not_in_the_name(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.array(GREY, np.uint8)).save(path, format="PNG")
    assert read(path, channels=1) == [GREY]


def test_of_a_wide_or_tall_image_the_whole_is_squeezed_to_a_square(tmp_path):
    values = np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4, 4, axis=1)
    wide, tall = save(tmp_path / "wide.png", values), save(tmp_path / "tall.png", values.T.copy())
    squeezed = torch.tensor(read(wide, 1, 8))[0]
    assert (squeezed - torch.arange(64).view(8, 8) * 4).abs().max() <= 1
    assert torch.equal(torch.tensor(read(tall, 1, 8))[0], squeezed.T)


@pytest.mark.parametrize("orientation", ORIENTED)
def test_a_square_image_is_resized_as_pillow_resizes_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    expected = np.asarray(upright.resize((16, 16), Image.Resampling.BICUBIC, reducing_gap=3.0))
    assert read(tmp_path / "a.png", size=16) == expected.transpose(2, 0, 1).tolist()


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_checking_a_file_gives_the_aspect_of_the_upright_image_and_decodes_nothing(
    tmp_path, orientation, ending, monkeypatch
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert check(path) == (1.5 if orientation < 5 else 20 / 30)


def test_an_orientation_behind_the_pixels_of_a_png_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8) * 40).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    path = tmp_path / "late.png"
    path.write_bytes(content[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + content[-12:])
    assert check(path) == 2 / 3
    assert read(path, 1, 8) == read(save(tmp_path / "b.png", np.array([[4, 1], [5, 2], [6, 3]], np.uint8) * 40), 1, 8)


def test_shrinking_averages_instead_of_skipping_pixels(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = torch.tensor(read(save(tmp_path / "a.png", board), 1, 8))
    assert (pixels - 127.5).abs().max() < 8


def test_a_small_image_is_enlarged(tmp_path):
    assert read(save(tmp_path / "a.png", np.full((3, 5), 77, np.uint8)), 1, 16) == [[[77] * 16] * 16]


def test_reading_a_large_jpeg_at_a_fraction_of_its_size_hardly_changes_it(tmp_path):
    smooth = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(smooth).resize((1600, 1200), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    large = Decoding(3, 96, WHITE, 10**7)
    from_jpeg, from_png = (large.read(tmp_path / f"a.{kind}").int() for kind in ("jpg", "png"))
    assert (from_jpeg - from_png).abs().float().mean() < 1.0


def png_header(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", ["text", "compressed text", "profile", "unknown"])
def test_a_picture_with_a_huge_appendix_is_read_or_refused_without_much_memory(tmp_path, kind):
    small = save(tmp_path / "small.png", np.array(GREY, np.uint8)).read_bytes()
    bomb = zlib.compress(bytes(1 << 28), 9)
    appendix = {
        "text": chunk(b"tEXt", b"k\0" + b"a" * (1 << 22)),
        "compressed text": chunk(b"zTXt", b"k\0\0" + bomb),
        "profile": chunk(b"iCCP", b"k\0\0" + bomb),
        "unknown": chunk(b"xxXx", bytes(1 << 22)),
    }
    path = tmp_path / "large.png"
    path.write_bytes(small[:33] + appendix[kind] + small[33:])
    tracemalloc.start()
    try:
        with contextlib.suppress(UnreadableImageError):
            assert read(path, channels=1) == [GREY]
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def test_of_an_animation_with_a_million_frames_one_is_looked_at(tmp_path):
    frames = [Image.fromarray(np.full((2, 2), value, np.uint8)) for value in (40, 90)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.gif").read_bytes()
    start = content.rindex(b"\x21\xf9")
    (tmp_path / "a.gif").write_bytes(content[:start] + content[start:-1] * 1_000_000 + b";")
    assert read(tmp_path / "a.gif", channels=1) == [[[40, 40], [40, 40]]]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"acTL") - 4
    claimed = chunk(b"acTL", struct.pack(">II", 1_000_000, 0))
    (tmp_path / "a.png").write_bytes(content[:start] + claimed + content[start + len(claimed) :])
    assert read(tmp_path / "a.png", channels=1) == [[[40, 40], [40, 40]]]


HEADERS = {
    "tif": b"II*\0\x08\0\0\0\2\0" + struct.pack("<HHII", 256, 4, 1, 20_000) + struct.pack("<HHII", 257, 4, 1, 20_000),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 20_000, 20_000, 0x80, 0, 0) + bytes(6) + b",",
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 20_000, 20_000, 1, 24, 0, 0, 1, 1, 0, 0),
    "ppm": b"P6 20000 20000 255\n",
    "webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\x1f\x4e\0" * 2,
}


@pytest.mark.parametrize("ending", [*HEADERS, "jp2", "jpg", "avif"])
def test_a_small_file_that_claims_many_pixels_is_refused_whatever_its_kind(tmp_path, ending, monkeypatch):
    path = tmp_path / f"bomb.{ending}"
    if ending in HEADERS:
        path.write_bytes(HEADERS[ending] + bytes(40))
    else:
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path)
        content = bytearray(path.read_bytes())
        if ending == "jpg":
            start = content.index(b"\xff\xc0") + 5
            content[start : start + 4] = struct.pack(">HH", 20_000, 20_000)
        elif ending == "jp2":
            start = content.index(b"ihdr") + 4
            content[start : start + 8] = struct.pack(">II", 20_000, 20_000)
        else:
            start = content.index(b"ispe") + 8
            content[start : start + 8] = struct.pack(">II", 16_000, 16_000)
        path.write_bytes(content)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    with quiet(), pytest.raises(UnreadableImageError, match=r"bomb\."):
        read(path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, kind in ((tmp_path / "pipe.png", "pipe"), (tmp_path, "folder"), (Path("/dev/zero"), "device")):
        for refuse in (lambda path=path: read(path), lambda path=path: check(path)):
            with pytest.raises(UnreadableImageError, match=f"is a {kind} and no file"):
                refuse()


def test_an_image_that_takes_more_memory_than_there_is_is_left_out_like_any_other(tmp_path, monkeypatch):
    def exhaust(image):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", exhaust)
    with pytest.raises(UnreadableImageError, match="more memory than there is"):
        read(save(tmp_path / "a.png", np.array(GREY, np.uint8)))


@pytest.mark.parametrize("side", [1001, 10_000, 20_000])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, side, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    for refuse in (lambda: read(tmp_path / "bomb.png"), lambda: check(tmp_path / "bomb.png")):
        with quiet(), pytest.raises(UnreadableImageError, match=r"bomb\.png: .*pixels"):
            refuse()


def test_pillows_warning_of_many_pixels_does_not_leak(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(10_000, 10_000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet(), pytest.raises(UnreadableImageError):
            read(tmp_path / "bomb.png")
    assert caught == []


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "gif", "bmp"])
def test_a_file_cut_short_is_an_error_that_names_it(tmp_path, ending):
    path = tmp_path / f"cut.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImageError, match=r"cut\."):
        read(path, size=64)


def test_other_trouble_names_the_file_and_the_reason(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    for name, reason in [
        ("empty.png", "empty"),
        ("text.jpg", "not an image"),
        ("photo.heic", "convert"),
        ("gone.png", "no such file"),
    ]:
        with pytest.raises(UnreadableImageError, match=f"{name}: .*{reason}"):
            read(tmp_path / name)


def test_eps_which_would_run_a_program_is_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\n")
    with pytest.raises(UnreadableImageError, match="not an image"):
        read(tmp_path / "a.png")


def test_a_forbidden_file_says_so(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", np.array(GREY, np.uint8))
    path.chmod(0)
    if os.geteuid() == 0:  # who may read everything gets the answer that everybody else gets

        def refuse(path, *arguments, **options):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UnreadableImageError, match="permission denied"):
        read(path)


@pytest.mark.parametrize("look", [Decoding.read, Decoding.check])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_that_too_many_files_are_open_is_no_fault_of_an_image(tmp_path, look, number):
    def opener():
        raise OSError(number, os.strerror(number), str(tmp_path / "a.png"))

    with pytest.raises(OSError, match=r"too many files are open; raise the limit \(ulimit -n\).*a\.png"):
        look(Decoding(3, 2, WHITE, 100), tmp_path / "a.png", opener)
