"""Crops of whole pictures: torchvision's windows, the same in memory and from files, and the picture of views."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import v2

from manyviews.data import Folder, Images
from manyviews.data.decoding.files import Files
from manyviews.data.images import InMemory
from manyviews.data.pictures import pictures
from manyviews.views import Views, ViewsSettings
from manyviews.views.geometry import ATTEMPTS, RandomWindow, box_extents, crop_boxes, window_matrix, within
from manyviews.views.preview import original, outlines, preview

PLAIN: dict[str, Any] = {
    "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "greyscale": 0.0, "blur": 0.0, "gamma": 0.0,
}  # fmt: skip
SHAPES = ((300, 200), (120, 360), (200, 200), (500, 90))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes, whose red grows to the right and green downwards."""
    root: Path = tmp_path_factory.mktemp("shapes")
    for number, (width, height) in enumerate(SHAPES):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = ((np.arange(width) + 0.5) / width * 255).round()
        pixels[..., 1] = ((np.arange(height) + 0.5) / height * 255).round()[:, None]
        Image.fromarray(pixels).save(root / f"{number}.png")
    return root


def images_of(folder: Path, memory: float) -> Images:
    return Folder(path=str(folder), holdout=0.0, memory=memory, size=128).build().train


# Windows


@pytest.mark.parametrize("shape", [(3000, 2000), (1000, 3000)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 0.6)])
def test_windows_are_distributed_as_torchvisions(shape: tuple[int, int], scale: tuple[float, float]) -> None:
    (width, height), count = shape, 4000
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(224, scale=scale)
    picture = torch.zeros(1, height, width, dtype=torch.uint8)
    drawn = [theirs.make_params([picture]) for _ in range(count)]
    boxes = torch.tensor([[box["left"], box["top"], box["width"], box["height"]] for box in drawn]).double()
    # Where none of ten draws fits, torchvision takes one box in the middle.
    common, repeats = boxes.unique(dim=0, return_counts=True)
    boxes = boxes[~torch.isin((boxes * 7919).sum(1), (common[repeats > 10] * 7919).sum(1))]
    boxes = boxes / torch.tensor([width, height, width, height])
    window = RandomWindow(224, scale=scale)
    draws = torch.rand(window.num_draws + window.more_draws, count)
    aspects = torch.full((count,), width / height)
    params = window.interpret(draws, aspects)
    replaced = box_extents(draws[0], draws[1], scale, window.ratio, aspects)
    area, ratio = draws[[0, *range(11, 29, 2)]], draws[[1, *range(12, 29, 2)]]
    area, log = scale[0] + area * (scale[1] - scale[0]), (2 * ratio - 1) * np.log(4 / 3) - np.log(width / height)
    fits = ((area * log.exp() <= 1) & (area / log.exp() <= 1)).any(0)
    assert len(area) == ATTEMPTS
    assert torch.equal(params["extent"][~fits], replaced[~fits])
    extent, corner = params["extent"][fits].double(), ((params["centre"] - params["extent"] + 1) / 2)[fits].double()
    assert abs(len(boxes) - len(extent)) < 0.05 * count
    pairs = {
        "area": (boxes[:, 2] * boxes[:, 3], extent.prod(1)),
        "ratio": (boxes[:, 2] / boxes[:, 3], extent[:, 0] / extent[:, 1]),
        "left": (boxes[:, 0], corner[:, 0]),
        "top": (boxes[:, 1], corner[:, 1]),
    }
    for name, (one, other) in pairs.items():
        assert ks_2samp(one.numpy(), other.numpy()).pvalue > 0.001, name


def test_every_window_lies_in_its_picture() -> None:
    window = RandomWindow(8, scale=(0.08, 1.0))
    draws = torch.rand(29, 3000, generator=torch.Generator().manual_seed(0))
    aspects = torch.logspace(-1.5, 1.5, 3000)
    params = window.interpret(draws, aspects)
    assert (params["centre"].abs() + params["extent"]).max() <= 1 + 1e-6
    share = params["extent"].prod(1)
    assert share.min() >= 0.08 - 1e-6


@pytest.mark.parametrize("padding", ["border", "zeros", "reflection"])
def test_a_box_has_all_that_its_window_sees(padding: str) -> None:
    window = RandomWindow(16, rotation=30.0, translation=0.2, shear=10.0, scale=(0.3, 1.0))
    draws = torch.rand(29, 500, generator=torch.Generator().manual_seed(0))
    matrix = window_matrix(window.interpret(draws, torch.full((500,), 1.7)))
    boxes = crop_boxes(matrix, padding)
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    seen = outlines(matrix).clamp(-1, 1)
    low, high = (2 * boxes - 1).chunk(2, 1)
    assert (seen >= low[:, None] - 1e-5).all()
    assert (seen <= high[:, None] + 1e-5).all()
    # The same points, by their places in the box.
    points = outlines(within(matrix, boxes)) * (high - low)[:, None] / 2 + ((high + low) / 2)[:, None]
    torch.testing.assert_close(points, outlines(matrix), atol=1e-5, rtol=0)


# In memory and from files


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"local": 3},
        {"rotation": 25.0, "translation": 0.1, "vertical_flip": 0.5},
        {"rotation": 40.0, "padding": "zeros"},
    ],
    ids=["crops", "local", "turned", "zeros"],
)
def test_files_and_memory_give_the_same_windows(folder: Path, settings: dict[str, Any]) -> None:
    memory, disk = images_of(folder, 2.0), images_of(folder, 0.0)
    assert isinstance(memory, InMemory)
    assert isinstance(disk, Files)
    assert memory.aspects is not None
    assert memory.aspects.tolist() == [width / height for width, height in SHAPES]
    assert memory.fingerprint != disk.fingerprint
    views = ViewsSettings(size=56, **PLAIN, **settings).build(size=128, channels=3, seed=3)
    ids = torch.arange(len(SHAPES))
    for epoch in range(3):
        whole, cropped = pictures(memory, ids, views, epoch), pictures(disk, ids, views, epoch)
        assert cropped.cropped
        assert [part.shape[0] for part in cropped.squares] == [2, *([3] if "local" in settings else [])]
        for one, other in zip(views(whole, ids, epoch), views(cropped, ids, epoch), strict=True):
            assert one.shape == other.shape
            # A grey level is 4 / 255 here.
            difference = (one - other).abs() * 255 / 4
            assert difference.median() <= 1
            assert difference.mean() < 2.5


def test_a_crop_is_where_the_window_says(folder: Path) -> None:
    disk, ids = images_of(folder, 0.0), torch.arange(len(SHAPES))
    views = ViewsSettings(size=64, flip=0.0, **PLAIN).build(size=128, channels=3, seed=3)
    (made,), windows = views(pictures(disk, ids, views), ids, 0), views.windows(ids, 0, disk.aspects)
    middle = (made[:, :, :2].mean((3, 4)) * 0.25 + 0.5) * 2 - 1
    torch.testing.assert_close(middle, windows[..., 2], atol=0.02, rtol=0)


def test_square_pictures_take_no_further_draws_and_have_no_aspects(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (40, 40), (10 * number, 0, 0)).save(tmp_path / f"{number}.png")
    assert images_of(tmp_path, 2.0).aspects is None
    assert images_of(tmp_path, 0.0).aspects is None


# The picture of views


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 96)])
def test_the_preview_shows_originals_beside_their_views(channels: int, size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, channels, size, size), dtype=torch.uint8, generator=draw)
    images = InMemory(pixels, ["a", "b", "c"], None, (), "0" * 64)
    views = ViewsSettings().build(size=size, channels=channels, seed=0)
    shown = preview(views, images, torch.arange(3), torch.device("cpu"), epochs=2)
    side, gap = size * max(1, 64 // size), 2
    assert shown.shape == (3, 3 * (side + gap) + gap, 5 * (side + gap) + gap)
    assert shown.dtype == torch.uint8
    assert (shown[:, :gap] == 255).all()
    first = original(pixels[1], 1.0, torch.zeros(0, 4, 2), side)
    zoom = side // size
    assert torch.equal(first[:, ::zoom, ::zoom], pixels[1].expand(3, -1, -1))
    assert torch.equal(shown, preview(views, images, torch.arange(3), torch.device("cpu"), epochs=2))


def test_the_preview_draws_the_windows_into_whole_pictures(folder: Path) -> None:
    views = ViewsSettings(size=64, local=2, **PLAIN).build(size=128, channels=3, seed=3)
    one, other = (
        preview(views, images_of(folder, memory), torch.arange(4), torch.device("cpu")) for memory in (2.0, 0.0)
    )
    assert one.shape == other.shape == (3, 4 * 66 + 2, 17 * 66 + 2)
    # Of a picture 500 x 90 most of its cell is white, above and below.
    cell = one[:, 3 * 66 + 2 : 4 * 66, 2:66]
    assert (cell == 255).all(0).float().mean() > 0.7
    assert Views.interpolation == "bilinear"


def test_an_outline_is_where_the_crop_is() -> None:
    corners = torch.tensor([[[-1.0, -1], [0, -1], [0, 0], [-1, 0]]])
    cell = original(torch.zeros(3, 8, 8, dtype=torch.uint8), 2.0, corners, 40)
    assert (cell[:, :10] == 255).all()
    drawn: Tensor = (cell[:, 10:30] > 0).any(0)
    rows, columns = drawn.nonzero().unbind(1)
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (0, 9, 0, 19)
