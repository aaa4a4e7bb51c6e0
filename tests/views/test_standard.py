"""The view of evaluation beside timm's transform, torch's resampling and Pillow's."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from manyviews.data import Folder, Images
from manyviews.data.decoding.files import Files
from manyviews.data.images import InMemory, Pictures
from manyviews.data.pictures import pictures
from manyviews.encoder.backbone import description_of
from manyviews.features.backbone import view_of
from manyviews.views import StandardView, ViewsSettings, enlarged, standard_view
from manyviews.views.preview import preview
from manyviews.views.standard import resampling

SHAPES = ((500, 375), (375, 500), (640, 213), (1600, 1200), (224, 224), (100, 80))
MODELS = ("resnet50.a1_in1k", "mobilenetv3_large_100.ra_in1k", "convnext_tiny.fb_in22k_ft_in1k_384")
"""Of crop_pct 0.95, 0.875, and squashed at 384 pixels."""


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Noise with the spectrum of a photograph, in colours."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = draw.normal(size=(2, 3, *frequency.shape))
    planes = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency**1.3, (height, width))
    planes = planes + 2 * planes.mean(0)
    pixels = 125 + 50 * (planes - planes.mean()) / planes.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("photographs")
    for number, (width, height) in enumerate(SHAPES):
        picture = photograph(width, height, number)
        picture.save(root / f"{number}.png")
        picture.save(root / f"{number}.jpg", quality=90)
    turned = photograph(300, 200, 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "turned.jpg", exif=exif)
    return root


def images_of(folder: Path, **more: Any) -> Images:
    return Folder(path=str(folder), holdout=0.0, **more).build().train


def upright(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        turned = picture.getexif().get(0x0112) == 6
        return picture.convert("RGB").transpose(Image.Transpose.ROTATE_270) if turned else picture.convert("RGB")


def levels(view: StandardView, made: Tensor, expected: Tensor) -> Tensor:
    """Differences of inputs of a backbone in grey levels, [images, ...]."""
    return (made - expected).abs() * 255 * torch.as_tensor(view.std).view(-1, 1, 1)


def by_timm(folder: Path, images: Images, described: dict[str, Any]) -> Tensor:
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=described))
    return torch.stack([transform(upright(folder / name)) for name in images.names])


# timm's transform


@pytest.mark.parametrize("name", MODELS)
def test_decoded_from_the_file_it_is_timms_transform_within_one_grey_level_on_average(folder: Path, name: str) -> None:
    described = description_of(name)
    view, images = view_of(described, described.input_size[-1]), images_of(folder, memory=0)
    assert isinstance(images, Files)
    assert not images.whole
    made = view(pictures(images, torch.arange(len(images)), view))
    off = levels(view, made, by_timm(folder, images, timm.get_pretrained_cfg(name).to_dict()))
    means = dict(zip(images.names, off.flatten(1).mean(1).tolist(), strict=True))
    # Decoded at half its size.
    assert means.pop("3.jpg") < 1
    # Resized before it is turned: rows and columns are rounded in another order.
    assert means.pop("turned.jpg") < 0.3
    # Pillow's filters of a box and of the whole differ by rounding.
    assert max(means.values()) < 0.01
    others = off[torch.tensor([file != "3.jpg" for file in images.names])]
    assert others.max() < 3.5


@pytest.mark.parametrize(("size", "bound"), [(512, 1.5), (224, 6.0)])
def test_in_memory_it_is_timms_transform_as_far_as_the_stored_square_has_pixels(
    folder: Path, size: int, bound: float
) -> None:
    name = MODELS[1]
    described, images = description_of(name), images_of(folder, size=size)
    assert isinstance(images, InMemory)
    view = view_of(described, 224)
    made = view(pictures(images, torch.arange(len(images)), view))
    off = levels(view, made, by_timm(folder, images, timm.get_pretrained_cfg(name).to_dict()))
    means = dict(zip(images.names, off.flatten(1).mean(1).tolist(), strict=True))
    # Of the photograph that is three times as wide as high, the square keeps few columns.
    assert max(mean for file, mean in means.items() if not file.startswith("2.")) < bound


def test_an_export_makes_timm_take_the_same_view(folder: Path) -> None:
    images = images_of(folder, memory=0)
    settings = ViewsSettings(size=160, mean=(0.4, 0.5, 0.6), std=0.3).resolve(size=160, channels=3)
    view = standard_view(settings, 3)
    assert view.crop_pct == 0.875
    made = view(pictures(images, torch.arange(len(images)), view))
    off = levels(view, made, by_timm(folder, images, view.pretrained_cfg))
    assert off.flatten(1).mean(1).max() < 1


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (224, 0.9), (299, 0.95), (8, 0.5), (96, 1.0), (177, 0.7)])
def test_boxes_are_in_the_whole_pixels_of_torchvision(size: int, crop_pct: float, mode: Any) -> None:
    view, draw = StandardView(size, 3, crop_pct=crop_pct, crop_mode=mode), np.random.default_rng(size)
    shapes = [(500, 375), (375, 500), (640, 480), (1, 1), (1, 37), (4000, 21), *draw.integers(1, 900, (40, 2)).tolist()]
    aspects = torch.tensor([width / height for width, height in shapes], dtype=torch.float64)
    side = math.floor(size / crop_pct)
    resize = transforms.Resize(side if mode == "center" else (side, side))
    for (width, height), box in zip(shapes, view.boxes(aspects).tolist(), strict=True):
        sides = resize(Image.new("1", (width, height))).size
        first = [round((each - size) / 2) for each in sides]
        left, top = first
        right, bottom = left + size, top + size
        expected = left / sides[0], top / sides[1], right / sides[0], bottom / sides[1]
        assert box == pytest.approx(expected, abs=1e-12), (width, height)


# Resampling


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("stored", "size"), [(100, 37), (40, 64), (64, 64), (65, 8), (1, 8)])
def test_the_resampling_of_a_whole_square_is_torchs(stored: int, size: int, interpolation: Any) -> None:
    pixels = torch.rand(2, 3, stored, stored, generator=torch.Generator().manual_seed(0)) * 255
    weights = resampling(torch.zeros(1), torch.ones(1), stored, size, interpolation)[0]
    expected = F.interpolate(pixels, (size, size), mode=interpolation, antialias=True)
    torch.testing.assert_close(weights @ pixels @ weights.T, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_resampling_of_a_box_is_pillows(interpolation: Any) -> None:
    draw = np.random.default_rng(1)
    pixels = draw.integers(0, 256, (1, 61), dtype=np.uint8)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    for first, last, size in ((0.1, 0.83, 13), (0.0, 0.5, 50), (0.4, 1.0, 7), (0.25, 0.26, 9)):
        box = (61 * first, 0, 61 * last, 1)
        expected = np.asarray(Image.fromarray(pixels).resize((size, 1), filters[interpolation], box=box))[0]
        weights = resampling(torch.tensor([first]), torch.tensor([last]), 61, size, interpolation)[0]
        made = (weights @ torch.from_numpy(pixels[0]).float()).clamp(0, 255)
        assert np.abs(made.numpy() - expected).max() < 0.51, (first, last, size)


def test_square_images_of_the_size_are_only_normalised() -> None:
    pixels = torch.randint(0, 256, (3, 1, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    view = StandardView(20, 1)
    assert torch.equal(view(Pictures((pixels,))), pixels.float().mul(1 / (255 * 0.25)).sub(0.5 / 0.25))
    assert torch.equal(view.bytes(Pictures((pixels,))), pixels)
    colour = StandardView(20, 3, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))(Pictures((pixels,)))
    by_channel = [(pixels / 255 - mean) / std for mean, std in ((0.1, 0.4), (0.2, 0.5), (0.3, 0.6))]
    assert torch.equal(colour, torch.cat(by_channel, 1))


def test_each_image_of_a_batch_has_a_box_of_its_own() -> None:
    pixels = torch.randint(0, 256, (4, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    aspects, view = torch.tensor([1.0, 0.5, 1.5, 3.0]), StandardView(24, 3, crop_pct=0.9)
    whole = view(Pictures((pixels,), aspects))
    for index in range(4):
        alone = view(Pictures((pixels[[index]],), aspects[[index]]))
        torch.testing.assert_close(whole[[index]], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(view(Pictures((pixels,)))[1:], whole[1:], atol=0.1)


def test_half_precision_around_it_changes_nothing() -> None:
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    given, view = Pictures((pixels,), torch.tensor([0.7, 1.4])), StandardView(24, 3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = view(given)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, view(given))


# Settings


def test_a_view_with_more_pixels_than_half_of_the_images_keep_is_told_of(folder: Path) -> None:
    data = Folder(path=str(folder), holdout=0.0, size=224)
    images, files = data.build().train, Folder(path=str(folder), holdout=0.0, memory=0).build().train
    # Half of them are 4 : 3 or longer.
    message = enlarged(169, images, data)
    assert message is not None
    assert "enlarged from 168 to 169 pixels" in message
    assert "data.size=226 keeps as many pixels" in message
    assert message.endswith("data.memory=0 crops from the files")
    assert enlarged(168, images, data) is None
    assert enlarged(1000, files, data) is None
    squares = InMemory(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), ["a"], None, (), "0" * 64)
    assert enlarged(28, squares, data) is None
    assert "data.size=29" in str(enlarged(29, squares, data))


def test_the_share_that_is_seen_follows_the_size() -> None:
    resolved = {size: ViewsSettings().resolve(size=size, channels=3) for size in (28, 96, 159, 160, 224)}
    assert [own.crop_pct for own in resolved.values()] == [1, 1, 1, 0.875, 0.875]
    assert all((own.mean, own.std) == (0.5, 0.25) for own in resolved.values())
    named = ViewsSettings(size=224, crop_pct=0.9, mean=0.1).resolve(size=96, channels=1)
    assert (named.crop_pct, named.mean, named.std) == (0.9, 0.1, 0.25)
    with pytest.raises(ValueError, match=r"views.mean has 3 numbers, and the images have 1 channels"):
        ViewsSettings(mean=(0.1, 0.2, 0.3)).resolve(size=96, channels=1)
    # As an older run has it.
    assert standard_view(ViewsSettings(size=224), 3) == StandardView(224, 3, 0.5, 0.25, crop_pct=1.0)


def test_views_are_normalised_by_their_own_mean_and_deviation() -> None:
    images, ids = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), torch.arange(3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    views = ViewsSettings(solarize=0.5, erase=0.5, blur=0.5)
    (usual,) = views.build(size=32, channels=3, seed=0)(images, ids, 0)
    (own,) = views.model_copy(update={"mean": mean, "std": std}).build(size=32, channels=3, seed=0)(images, ids, 0)
    expected = (usual * 0.25 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
    # Their picture shows the same.
    set_of_images = InMemory(images, ["a", "b", "c"], None, (), "0" * 64)
    pictured = [
        preview(given.build(size=32, channels=3, seed=0), set_of_images, ids, torch.device("cpu"), epochs=1)
        for given in (views, views.model_copy(update={"mean": mean, "std": std}))
    ]
    assert (pictured[0].int() - pictured[1].int()).abs().max() <= 1


def test_a_view_of_files_needs_no_stored_size(folder: Path) -> None:
    view = StandardView(64, 3, crop_pct=0.8)
    small, large = (images_of(folder, memory=0, size=size) for size in (16, 200))
    ids = torch.arange(len(small))
    assert torch.equal(view(pictures(small, ids, view)), view(pictures(large, ids, view)))
    assert torch.equal(replace(view, channels=3).crops(ids, 5, small.aspects)[0].boxes[0], view.boxes(small.aspects))
