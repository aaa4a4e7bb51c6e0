import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, pil_to_tensor, resized_crop

from manyviews.data.decoding.crops import DIVISORS, divisor
from manyviews.data.decoding.decode import Decoding, UnreadableImageError

WHITE = (255, 255, 255)
BOXES = torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.0, 0.0, 1.0, 1.0], [0.55, 0.05, 0.95, 0.9]])
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def crop(
    path, boxes: Tensor, side: int, *, channels: int = 3, interpolation="bilinear", background=WHITE, exact=True
) -> Tensor:
    decoding = Decoding(channels, 8, background, 10**8)
    (squares,) = decoding.crop(path, [(boxes, side)], interpolation=interpolation, exact=exact)
    assert squares.dtype == torch.uint8
    assert squares.shape == (len(boxes), channels, side, side)
    return squares


def of_whole(image: Image.Image, boxes: Tensor, side: int, interpolation="bilinear") -> Tensor:
    """The oracle: boxes of an upright image that is there with all its pixels."""
    sizes = torch.tensor([*image.size, *image.size])
    squares = [
        np.asarray(image.resize((side, side), FILTERS[interpolation], box=tuple(box)))
        for box in (boxes.double() * sizes).tolist()
    ]
    return torch.from_numpy(np.stack(squares)).view(len(boxes), side, side, -1).permute(0, 3, 1, 2)


def difference(one: Tensor, other: Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


def photograph(name: str, scale: float = 1.0) -> Image.Image:
    image = Image.fromarray(load_sample_image(name))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    extent = 0.3 + 0.7 * torch.rand(count, 2, generator=generator)
    start = torch.rand(count, 2, generator=generator) * (1 - extent)
    return torch.cat([start, start + extent], 1)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("side", [16, 32, 64, 96, 224])
def test_crops_of_a_photograph_decoded_small_are_within_a_grey_level_of_the_full_decode(tmp_path, side, interpolation):
    differences = []
    for seed, name in enumerate(("china.jpg", "flower.jpg")):
        photograph(name).save(tmp_path / name, quality=90)
        full = Image.open(tmp_path / name).convert("RGB")
        for boxes in random_boxes(16, seed).split(4):
            squares = crop(tmp_path / name, boxes, side, interpolation=interpolation)
            differences.append(difference(squares, of_whole(full, boxes, side, interpolation)))
            if side <= 32:
                # Decoded small, boxes are not rounded: a pixel is several of the file's.
                rough = crop(tmp_path / name, boxes, side, interpolation=interpolation, exact=False)
                assert torch.equal(rough, squares)
    assert sum(differences) / len(differences) < 1


def test_a_jpeg_is_decoded_at_the_smallest_scale_that_serves_its_smallest_box(tmp_path, monkeypatch):
    Image.new("RGB", (1600, 1200)).save(tmp_path / "a.jpg")
    sizes = []
    resize = Image.Image.resize

    def seen(image, *arguments, **options):
        sizes.append(image.size)
        return resize(image, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", seen)
    whole, quarter = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.75, 0.75]])
    for boxes, side in ((whole, 100), (quarter, 100), (torch.cat([whole, quarter]), 50), (whole, 1000)):
        crop(tmp_path / "a.jpg", boxes, side)
    assert sizes == [(200, 150), (800, 600), *[(400, 300)] * 2, (1600, 1200)]


@pytest.mark.parametrize("size", [*itertools.product((1, 7, 15, 17, 100, 1001), (1, 8, 31, 640))])
def test_pillow_decodes_at_the_scale_that_was_asked_for(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.jpg")
    for number in DIVISORS:
        if min(size) >= number:
            with Image.open(tmp_path / "a.jpg") as image:
                _, box = image.draft(None, (size[0] // number, size[1] // number))
                assert box == (0, 0, size[0] / number, size[1] / number)


def test_each_box_keeps_enough_pixels():
    assert divisor([(1200.0, 900.0, 100), (150.0, 3000.0, 10)]) == 4
    assert divisor([(1199.0, 1200.0, 100)]) == 4
    assert divisor([(1200.0, 1200.0, 100)]) == 8
    assert divisor([(10.0, 10.0, 100)]) == divisor([]) == 1


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_upright_picture(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    photograph("china.jpg", 0.3).save(path, exif=exif, **({} if ending in ("png", "tif") else {"quality": 95}))
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    found = crop(path, BOXES, 48)
    # Rows and columns are resized one after the other, in 8 bits.
    assert (found.int() - of_whole(upright, BOXES, 48).int()).abs().max() <= 2
    assert difference(found, of_whole(upright, BOXES, 48)) < 0.3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_decoded_small_in_its_own_proportions(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph("flower.jpg").save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("RGB")
    boxes = torch.tensor([[0.3, 0.0, 0.45, 1.0], [0.0, 0.6, 1.0, 0.75]])
    assert difference(crop(tmp_path / "a.jpg", boxes, 20), of_whole(upright, boxes, 20)) < 1


def test_several_sides_come_from_one_opened_file(tmp_path):
    photograph("china.jpg").save(tmp_path / "a.jpg", quality=90)
    decoding = Decoding(3, 8, WHITE, 10**6)
    opened = []

    def opener():
        opened.append(open(tmp_path / "a.jpg", "rb"))  # noqa: SIM115
        return opened[-1]

    large, small = decoding.crop(tmp_path / "a.jpg", [(BOXES, 64), (BOXES[:2], 24)], opener=opener)
    assert (large.shape, small.shape, len(opened)) == ((3, 3, 64, 64), (2, 3, 24, 24), 1)
    assert torch.equal(large, crop(tmp_path / "a.jpg", BOXES, 64))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rounded_crops_are_those_that_torchvision_takes_of_whole_pixels(tmp_path, orientation, interpolation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    photograph("china.jpg").save(path, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    size = torch.tensor([*upright.size, *upright.size])
    whole = torch.tensor([[20, 10, 300, 290], [50, 0, upright.width, 330]])
    found = crop(
        path, (whole + 0.4 * torch.tensor([1, -1, -1, 1])) / size, 96, interpolation=interpolation, exact=False
    )
    for square, (left, top, right, bottom) in zip(found, whole.tolist(), strict=True):
        sides = bottom - top, right - left
        by_pillow = resized_crop(upright, top, left, *sides, [96, 96], InterpolationMode(interpolation))
        difference = (square.int() - pil_to_tensor(by_pillow).int()).abs()
        assert difference.max() <= (1 if orientation < 5 else 3)
        assert difference.float().mean() < 0.2


@pytest.mark.parametrize("side", [32, 96, 224])
def test_rounding_moves_the_edges_of_a_crop_by_at_most_half_a_pixel(tmp_path, side):
    """The brightness of a ramp is its position."""
    ramp = np.tile(np.linspace(0, 255, 640), (480, 1)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    for boxes in random_boxes(32, side).split(8):
        exact, rounded = (crop(tmp_path / "a.png", boxes, side, channels=1, exact=exact) for exact in (True, False))
        # At its edge the exact square sees what lies beside it.
        inside = (exact.float() - rounded.float())[..., 1:-1]
        assert inside.abs().max() <= 0.5 * 255 / 639 + 1.5


def kinds(folder) -> dict[str, object]:
    """Files of every kind of pixels."""
    colours = np.asarray(photograph("flower.jpg", 0.1))
    grey, alpha = colours[..., 0], colours[..., 1]
    images = {
        "rgb.png": Image.fromarray(colours),
        "grey.png": Image.fromarray(grey),
        "grey.jpg": Image.fromarray(grey),
        "rgba.png": Image.fromarray(np.dstack([colours, alpha])),
        "la.png": Image.fromarray(np.dstack([grey, alpha])),
        "palette.png": Image.fromarray(colours).quantize(64),
        "palette.gif": Image.fromarray(colours).quantize(64),
        "one.png": Image.fromarray(grey > 128),
        "cmyk.tif": Image.fromarray(colours).convert("CMYK"),
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 200),
        "deep.tif": Image.fromarray(grey.astype(np.int32) * 200),
        "float.tif": Image.fromarray(grey.astype(np.float32) / 255),
        "lossless.webp": Image.fromarray(np.dstack([colours, alpha])),
    }
    for name, image in images.items():
        image.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    Image.fromarray(colours).quantize(64).save(folder / "clear.png", transparency=3)
    return {name: folder / name for name in [*images, "clear.png"]}


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_of_every_kind_of_pixels_are_those_of_the_whole_picture(tmp_path, channels):
    for name, path in kinds(tmp_path).items():
        with Image.open(path) as image:
            side = max(image.size)
            # Enlarged to the longer side, the picture is there with all its pixels.
            boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
            whole = crop(path, boxes, side, channels=channels, background=(10, 200, 30))
        square = Decoding(channels, side, (10, 200, 30), 10**6)
        fast = crop(path, boxes, side, channels=channels, background=(10, 200, 30), exact=False)
        assert (fast.int() - whole.int()).abs().max() <= 1, name
        assert torch.equal(square.crop(path, [(boxes, side)], interpolation="bicubic")[0][0], square.read(path)), name
        assert difference(whole[0], square.read(path)) < 4, name


def test_the_luma_of_a_colour_jpeg_is_its_grey(tmp_path):
    photograph("china.jpg").save(tmp_path / "a.jpg", quality=90)
    grey = Image.open(tmp_path / "a.jpg").convert("L")
    found = crop(tmp_path / "a.jpg", BOXES, 224, channels=1)
    assert difference(found, of_whole(grey, BOXES, 224)) < 0.5


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2000)])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_pictures_of_one_pixel_and_lines_are_cropped(tmp_path, size, ending):
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", size, (77, 77, 77)).save(path)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.4, 0.4, 0.41, 0.41], [0.999, 0.999, 1.0, 1.0]])
    found = crop(path, boxes, 16)
    assert (found == 77).all()
    assert (crop(path, boxes, 16, exact=False) == 77).all()


def test_what_lies_beyond_the_image_is_left_out(tmp_path):
    photograph("china.jpg", 0.2).save(tmp_path / "a.png")
    beyond, edge = torch.tensor([[-0.2, 0.1, 0.5, 1.0000001]]), torch.tensor([[0.0, 0.1, 0.5, 1.0]])
    assert torch.equal(crop(tmp_path / "a.png", beyond, 32), crop(tmp_path / "a.png", edge, 32))


@pytest.mark.parametrize(
    "box", [[0.5, 0, 0.5, 1], [0, 0.8, 1, 0.2], [1, 0, 1.5, 1], [0, -1, 1, 0], [0, 0, float("nan"), 1]]
)
def test_an_empty_box_is_no_fault_of_the_file(tmp_path, box):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is empty or outside the image; give left, top") as error:
        crop(tmp_path / "a.png", torch.tensor([box]).float(), 8)
    assert not isinstance(error.value, UnreadableImageError)


def test_a_damaged_or_refused_file_is_named(tmp_path):
    photograph("china.jpg").save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableImageError, match=r"cut\.jpg: "):
        crop(tmp_path / "cut.jpg", BOXES, 32)
    with pytest.raises(UnreadableImageError, match=r"whole\.jpg: 640 x 427 pixels are more than"):
        Decoding(3, 8, WHITE, 1000).crop(tmp_path / "whole.jpg", [(BOXES, 32)])


def test_no_boxes_give_no_squares(tmp_path):
    photograph("china.jpg").save(tmp_path / "a.jpg")
    assert crop(tmp_path / "a.jpg", torch.empty(0, 4), 32).shape == (0, 3, 32, 32)
