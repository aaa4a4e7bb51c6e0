"""JPEGs decoded by torchcodec where it is installed; elsewhere a stand-in has its place."""

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from torch import Tensor

from manyviews.config import load
from manyviews.data import Folder, Loader, Order
from manyviews.data.decoding.decode import Decoding, UnreadableImageError
from manyviews.data.decoding.files import Files
from manyviews.data.decoding.jpeg import hide_exif, jpeg_pixels, torchcodec_decoder
from manyviews.recipe import Recipe
from manyviews.train.pretrain import pretrain
from manyviews.views import ViewsSettings

BOXES = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.6, 0.7], [0.55, 0.05, 0.95, 0.9]])
SIDE = 256
"""So large that no photograph here is decoded small."""
DECODERS = ["stand-in", "torchcodec"]

Decode = Callable[..., Tensor]
Calls = list[str]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """The decoder is looked for once; here once for each test."""
    torchcodec_decoder.cache_clear()
    yield
    torchcodec_decoder.cache_clear()


def put(monkeypatch: pytest.MonkeyPatch, decode: Decode | None) -> None:
    """Puts a decoder in the place of torchcodec's; None: it cannot be imported."""
    module: ModuleType | None = None
    if decode is not None:
        module = ModuleType("torchcodec.decoders")
        vars(module)["decode_jpeg"] = decode
    monkeypatch.setitem(sys.modules, "torchcodec", None if module is None else ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)


def by_pillow(source: bytes | Tensor, *, mode: str) -> Tensor:
    """Decodes as torchcodec does, turned by EXIF."""
    content = source if isinstance(source, bytes) else source.numpy().tobytes()
    with Image.open(io.BytesIO(content)) as image:
        if mode == "GRAY":
            image.draft("L", image.size)
        pixels = np.array(ImageOps.exif_transpose(image))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The modes that the stand-in was called with, without the trial."""
    modes: Calls = []

    def decode(source: bytes | Tensor, *, mode: str) -> Tensor:
        pixels = by_pillow(source, mode=mode)
        modes.append(mode)
        return pixels

    put(monkeypatch, decode)
    assert torchcodec_decoder() is decode
    modes.clear()
    return modes


@pytest.fixture(params=DECODERS)
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """As `calls`, once with the stand-in and once with torchcodec itself."""
    if request.param == "stand-in":
        return request.getfixturevalue("calls")
    own = pytest.importorskip("torchcodec.decoders").decode_jpeg
    modes: Calls = []

    def decode(source: bytes | Tensor, *, mode: str) -> Tensor:
        pixels: Tensor = own(source, mode=mode)
        modes.append(mode)
        return pixels

    put(monkeypatch, decode)
    assert torchcodec_decoder() is decode
    modes.clear()
    return modes


def photograph(name: str = "china.jpg") -> Image.Image:
    # Neither side is a multiple of a block.
    return Image.fromarray(load_sample_image(name)).resize((301, 203), Image.Resampling.LANCZOS)


def crop(path: Path, *, torchcodec: bool, channels: int = 3, exact: bool = False, side: int = SIDE) -> Tensor:
    decoding = Decoding(channels, 8, (255, 255, 255), 10**7, torchcodec=torchcodec)
    (squares,) = decoding.crop(path, [(BOXES, side)], exact=exact)
    return squares


def jpegs(folder: Path) -> dict[str, Path]:
    """Files of all kinds that a camera or a program writes, without those in CMYK."""
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    china, grey = photograph(), photograph("flower.jpg").convert("L")
    written: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "grey": (grey, {}),
        "grey progressive": (grey, {"progressive": True}),
        "rgb": (china, {"keep_rgb": True}),
        "exif": (china, {"exif": exif}),
        "restarts": (china, {"restart_marker_blocks": 3}),
        "profile": (china, {"icc_profile": bytes(100_000), "comment": b"of a tower"}),
        "pixel": (china.resize((1, 1)), {}),
        "line": (china.resize((1, 300)), {}),
    }
    for name in ("china.jpg", "flower.jpg"):
        for progressive in (False, True):
            options = [
                {"quality": quality, "subsampling": s} for quality in (30, 95) for s in ("4:4:4", "4:2:2", "4:2:0")
            ]
            for number, more in enumerate(options):
                written[f"{name} {progressive} {number}"] = photograph(name), {**more, "progressive": progressive}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        written[f"turned {orientation}"] = china, {"exif": exif}
    for name, (image, options) in written.items():
        image.save(folder / f"{name}.jpg", format="JPEG", **options)
    return {name: folder / f"{name}.jpg" for name in written}


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_those_of_pillow_bit_for_bit(tmp_path: Path, counted: Calls, channels: int) -> None:
    for name, path in jpegs(tmp_path).items():
        counted.clear()
        found = crop(path, torchcodec=True, channels=channels)
        assert counted == ["GRAY" if channels == 1 or name.startswith("grey") else "RGB"], name
        assert torch.equal(found, crop(path, torchcodec=False, channels=channels)), name


def test_metadata_of_other_kinds_before_the_exif_turn_nothing(tmp_path: Path, counted: Calls) -> None:
    """Pillow looks for EXIF in any segment, torchcodec in the first; neither may change what is decoded."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph().save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    turned, broken = exif.tobytes(), b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0"
    for number, first in enumerate(
        (b"http://ns.adobe.com/xap/1.0/\0<x/>", broken, b"abcdef" + turned[6:], b"Exif\0\0")
    ):
        segment = b"\xff\xe1" + (len(first) + 2).to_bytes(2) + first
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(content[:2] + segment + content[2:])
        found = crop(path, torchcodec=True)
        assert torch.equal(found, crop(path, torchcodec=False))
    assert counted == ["RGB"] * 4


def test_what_torchcodec_would_decode_otherwise_is_left_to_pillow(tmp_path: Path, counted: Calls) -> None:
    china = photograph()
    china.convert("CMYK").save(tmp_path / "cmyk.jpg")
    china.save(tmp_path / "png.jpg", format="PNG")
    china.save(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[china])
    china.resize((1200, 800)).save(tmp_path / "large.jpg")
    for name in ("cmyk", "png", "two"):
        path = tmp_path / f"{name}.jpg"
        assert torch.equal(crop(path, torchcodec=True), crop(path, torchcodec=False)), name
    # Pillow decodes at half the size.
    path = tmp_path / "large.jpg"
    assert torch.equal(crop(path, torchcodec=True, side=32), crop(path, torchcodec=False, side=32))
    # Fractions of pixels are Pillow's too.
    assert torch.equal(crop(path, torchcodec=True, exact=True), crop(path, torchcodec=False, exact=True))
    assert counted == []


def outcome(path: Path, *, torchcodec: bool) -> Tensor | str:
    try:
        return crop(path, torchcodec=torchcodec, side=64)
    except UnreadableImageError as error:
        return error.reason


def test_damaged_files_end_as_they_do_with_pillow(tmp_path: Path, counted: Calls) -> None:
    """Cut off, or with other bytes anywhere: the same pixels, or the same reason."""
    path, readable = tmp_path / "a.jpg", 0
    for progressive in (False, True):
        photograph().resize((90, 60)).save(path, progressive=progressive)
        content = path.read_bytes()
        damaged = [content[:length] for length in (*range(2, len(content), 97), len(content) - 2, len(content) - 1)]
        damaged += [content + b"\0" * 99, content + content, b"\xff" + content, content[:2] + b"\xff" + content[2:]]
        for seed in range(150):
            draw = np.random.default_rng(seed)
            changed = bytearray(content)
            for place in draw.integers(2, len(content), 1 + 4 * (seed % 2)):
                changed[place] = draw.integers(256)
            damaged.append(bytes(changed))
        for number, case in enumerate(damaged):
            path.write_bytes(case)
            expected, found = outcome(path, torchcodec=False), outcome(path, torchcodec=True)
            readable += not isinstance(expected, str)
            same = found == expected if isinstance(expected, str) else torch.equal(torch.as_tensor(found), expected)
            assert same, (progressive, number, expected, found)
    assert 50 < readable < 300
    assert counted


def test_a_decoder_that_fails_or_gives_another_shape_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph().save(tmp_path / "a.jpg")
    expected, calls = crop(tmp_path / "a.jpg", torchcodec=False), []

    def fails(source: bytes | Tensor, *, mode: str) -> Tensor:
        calls.append(mode)
        if len(calls) == 2:
            raise RuntimeError("out of order")
        pixels = by_pillow(source, mode=mode)
        return pixels if len(calls) == 1 else pixels[:, 1:]

    put(monkeypatch, fails)
    for _ in range(2):
        assert torch.equal(crop(tmp_path / "a.jpg", torchcodec=True), expected)
    assert len(calls) == 3


def test_files_that_are_mostly_no_pixels_are_not_read_into_memory(tmp_path: Path, calls: Calls) -> None:
    path = tmp_path / "a.jpg"
    photograph().resize((90, 60)).save(path)
    content, lengths = path.read_bytes(), []
    expected = crop(path, torchcodec=False)
    segment = b"\xff\xe5\xff\xff" + bytes(65533)
    path.write_bytes(content[:2] + 20 * segment + content[2:])

    class Seen(io.BytesIO):
        def read(self, length: int | None = -1) -> bytes:
            lengths.append(length)
            return super().read(length)

    with Image.open(Seen(path.read_bytes())) as image:
        assert jpeg_pixels(image) is None
    assert max(length or -1 for length in lengths) < 1.1 * 2**20
    assert min(length or 0 for length in lengths) >= 0
    assert torch.equal(crop(path, torchcodec=True), expected)
    assert calls == []


def test_only_segments_before_the_first_scan_are_renamed() -> None:
    scan = b"\xff\xda\0\x02\xff\xe1\xff\xd9"
    content = bytearray(b"\xff\xd8\xff\xe1\0\x04ab\xff\xee\0\x02\xff\xe1\0\x02" + scan)
    hide_exif(content)
    assert content == b"\xff\xd8\xff\xef\0\x04ab\xff\xee\0\x02\xff\xef\0\x02" + scan
    for broken in (
        b"\xff\xd8\0\0\0\0",
        b"\xff\xd8\xff\xd0\0\x02" + scan,
        b"\xff\xd8\xff\xe1\0\x04",
        b"\xff\xd8\xff\xff",
    ):
        with pytest.raises(ValueError, match=r"segment|first scan"):
            hide_exif(bytearray(broken))


def folder_of(root: Path) -> Path:
    root.mkdir()
    for number in range(6):
        ImageOps.mirror(photograph()).rotate(3 * number).save(root / f"{number}.jpg")
    return root


def darker(source: bytes | Tensor, *, mode: str) -> Tensor:
    """Decodes with one other pixel."""
    pixels = by_pillow(source, mode=mode).clone()
    pixels[..., -1, -1] ^= 1
    return pixels


def test_auto_takes_torchcodec_only_if_it_gives_pillows_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    for decode, taken in ((by_pillow, True), (darker, False), (None, False)):
        torchcodec_decoder.cache_clear()
        put(monkeypatch, decode)
        assert (torchcodec_decoder() is not None) == taken


def test_torchcodec_is_tried_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    photograph().save(tmp_path / "a.jpg")
    tried = []

    def other(source: bytes | Tensor, *, mode: str) -> Tensor:
        tried.append(mode)
        return darker(source, mode=mode)

    put(monkeypatch, other)
    expected = crop(tmp_path / "a.jpg", torchcodec=False)
    for _ in range(3):
        assert torch.equal(crop(tmp_path / "a.jpg", torchcodec=True), expected)
    assert tried == ["RGB"]


@pytest.mark.parametrize(
    ("decode", "reason"), [(None, "torchcodec"), (darker, r"it gives other pixels than Pillow")], ids=["none", "other"]
)
def test_torchcodec_that_cannot_be_used_is_an_error_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: Decode | None, reason: str
) -> None:
    put(monkeypatch, decode)
    words = [f"data={folder_of(tmp_path / 'images')}", f"output={tmp_path / 'run'}", "data.decoder=torchcodec"]
    way_out = r"data\.decoder=torchcodec cannot be used here \(.*" + reason + r".*pip install 'manyviews\[torchcodec\]'"
    with pytest.raises(ValueError, match=way_out):
        pretrain(load(Recipe, None, words))
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("decoder", ["auto", "pillow", "torchcodec"])
def test_the_setting_chooses_and_the_images_are_the_same(tmp_path: Path, calls: Calls, decoder: str) -> None:
    root = folder_of(tmp_path / "images")
    settings = Folder(path=str(root), memory=0, holdout=0)
    images = settings.model_copy(update={"decoder": decoder}).build().train
    assert isinstance(images, Files)
    plain = replace(images, decoding=replace(images.decoding, torchcodec=False))
    assert images.fingerprint == settings.model_copy(update={"decoder": "pillow"}).build().train.fingerprint
    # Fingerprints hold the representation of what decodes, which versions without the setting wrote as well.
    assert repr(images.decoding) == (
        "Decoding(channels=3, size=96, background=(255, 255, 255), max_pixels=120000000, bits=None)"
    )
    views = ViewsSettings(size=SIDE).build(size=SIDE, channels=3, seed=0)
    calls.clear()
    found = images.crop(torch.arange(6), views, 0)
    assert calls == ([] if decoder == "pillow" else ["RGB"] * 6)
    assert all(map(torch.equal, found, plain.crop(torch.arange(6), views, 0)))


def test_worker_processes_decode_by_torchcodec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in of the worker writes a file; torchcodec's package is found by its path."""
    package = tmp_path / "path" / "torchcodec"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "decoders.py").write_text(
        "import io, os\n"
        "import numpy, torch\n"
        "from PIL import Image\n"
        "def decode_jpeg(source, *, mode):\n"
        f"    open(os.path.join({str(tmp_path)!r}, f'by {{os.getpid()}}'), 'w').close()\n"
        "    content = source if isinstance(source, bytes) else source.numpy().tobytes()\n"
        "    return torch.from_numpy(numpy.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    root = folder_of(tmp_path / "images")
    views = ViewsSettings(size=SIDE).build(size=SIDE, channels=3, seed=0)
    squares, marks = [], []
    for decoder in ("pillow", "auto"):
        images = Folder(path=str(root), memory=0, holdout=0, decoder=decoder).build().train
        batches = iter(Loader(images, Order(6, 3, 0), views, workers=1))
        squares.append([next(batches).images.squares for _ in range(2)])
        batches.close()
        marks.append(len(list(tmp_path.glob("by *"))))
    assert marks == [0, 1]
    assert all(torch.equal(*pair) for parts in zip(*squares, strict=True) for pair in zip(*parts, strict=True))


def test_a_run_is_resumed_with_another_decoder(tmp_path: Path, calls: Calls) -> None:
    words = [
        *(f"data={folder_of(tmp_path / 'images')}", f"output={tmp_path / 'run'}", "data.memory=0", "data.holdout=0"),
        *("views.size=16", "encoder.name=light_resnet", "train.batch_size=2", "train.threads=1", "train.workers=0"),
        *("train.monitor=0", "train.preview=0"),
    ]
    pretrain(load(Recipe, None, [*words, "train.epochs=1", "data.decoder=pillow"]))
    pretrain(load(Recipe, None, [*words, "train.epochs=2", "extend=true", "resume=true", "data.decoder=torchcodec"]))
    assert "decoder: torchcodec" in (tmp_path / "run" / "config.yaml").read_text()


def test_torchcodec_itself_is_taken_where_it_is_installed() -> None:
    own = pytest.importorskip("torchcodec.decoders").decode_jpeg
    assert torchcodec_decoder() is own
