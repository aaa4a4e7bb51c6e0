"""Crop, flips, rotation, translation and shear as one resampling of the image."""

import math
from typing import Any

import torch
from jaxtyping import Float
from kornia.augmentation import GeometricAugmentationBase2D
from kornia.constants import Resample
from torch import Tensor
from torch.nn import functional as F

ATTEMPTS = 10
"""Draws of an area and a ratio for a crop of an image that is not square."""
LEAST = 1e-3
"""Least extent of a box, as a share of half the image's side."""


class RandomWindow(GeometricAugmentationBase2D):
    """Every geometric augmentation as one bilinear `grid_sample` through a random window.

    The window is a random resized crop; it may be flipped, and turned, moved and sheared about its own centre, so that
    it shows the image's surroundings where there are any, and padding only beyond the image's edge. kornia's chain
    RandomResizedCrop, RandomHorizontalFlip, RandomAffine resamples twice and pads inside the image.

    A kornia augmentation: usable in `AugmentationSequential` (masks, boxes and keypoints follow) and with `params=`.
    Input float [batch, channels, height, width], output [batch, channels, size, size].

    In square images the share of the area is uniform in `scale`, and the logarithm of the aspect ratio is uniform among
    those which let the crop fit. In others crops are those of torchvision's RandomResizedCrop, the first of ten draws
    of area and ratio that fits, which makes large crops rarer than `scale` says; only, they are not rounded to whole
    pixels, and where none of ten fits the first one gets a ratio that does (torchvision then takes the centre).
    """

    num_draws = 11
    more_draws = 2 * (ATTEMPTS - 1)
    """Further draws, for images that are not square."""
    # No image passes through the matrix: it is only needed for boxes, keypoints and the inverse.
    _compute_matrix_lazily = True

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        rotation: float = 0.0,
        translation: float = 0.0,
        shear: float = 0.0,
        padding: str = "border",
    ) -> None:
        super().__init__(p=1.0)
        self.size = size
        self.scale, self.ratio = scale, ratio
        self.flip_probabilities = (flip, vertical_flip)
        self.rotation, self.translation, self.shear = rotation, translation, shear
        self.flags = {"resample": Resample.BILINEAR, "padding_mode": padding, "align_corners": False}

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Parameters from torch's global generator, as kornia's own augmentations draw them."""
        count, aspect = batch_shape[0], batch_shape[-1] / batch_shape[-2]
        if aspect == 1:
            return self.interpret(torch.rand(self.num_draws, count))
        return self.interpret(torch.rand(self.num_draws + self.more_draws, count), torch.full((count,), aspect))

    def interpret(
        self, draws: Float[Tensor, "draws batch"], aspects: Float[Tensor, " batch"] | None = None
    ) -> dict[str, Tensor]:
        """Parameters from numbers in [0, 1); `aspects` are the images' widths over their heights, None for squares."""
        area, ratio, x, y, horizontal, vertical, angle, *rest = draws[: self.num_draws]
        if aspects is None:
            extent = box_extents(area, ratio, self.scale, self.ratio)
        else:
            more = draws[self.num_draws :].unflatten(0, (ATTEMPTS - 1, 2))
            areas, ratios = (torch.cat([first[None], more[:, row]]) for row, first in enumerate((area, ratio)))
            extent = first_that_fits(areas, ratios, self.scale, self.ratio, aspects.to(draws))
        parameters = {"extent": extent, "centre": (2 * torch.stack([x, y], 1) - 1) * (1 - extent)}
        if any(self.flip_probabilities):
            chances = zip((horizontal, vertical), self.flip_probabilities, strict=True)
            parameters["flip"] = torch.stack([draws < chance for draws, chance in chances], 1)
        if self.rotation:
            parameters["angle"] = (2 * angle - 1) * self.rotation
        if self.translation:
            parameters["translation"] = (2 * torch.stack(rest[:2], 1) - 1) * self.translation
        if self.shear:
            parameters["shear"] = (2 * torch.stack(rest[2:], 1) - 1) * self.shear
        return parameters

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """The images [batch, channels, height, width] through their windows."""
        mode, padding = flags["resample"].name.lower(), flags["padding_mode"]
        return resample(input, window_matrix(params).to(input), self.size, mode=mode, padding=padding)

    @property
    def turns(self) -> bool:
        """Whether windows are turned, moved or sheared, and so may look beyond the crop."""
        return bool(self.rotation or self.translation or self.shear)

    @property
    def side(self) -> int:
        """Side in pixels of a square of what a window sees, that has as many pixels as the view."""
        angle, slant = math.radians(min(self.rotation, 45)), math.tan(math.radians(self.shear))
        return math.ceil(self.size * (math.cos(angle) + math.sin(angle)) * (1 + slant + slant**2) - 1e-6)

    def flipped(
        self, images: Float[Tensor, "batch channels size size"], params: dict[str, Tensor]
    ) -> Float[Tensor, "batch channels size size"]:
        """The flips alone, of images that are the crops."""
        if "flip" in params:
            for axis, flips in ((-1, params["flip"][:, 0]), (-2, params["flip"][:, 1])):
                images = torch.where(flips[:, None, None, None], images.flip(axis), images)
        return images

    def compute_transformation(self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any]) -> Tensor:
        """3 x 3 matrices from image to view pixels, whose centres are integers as in kornia."""
        window = window_matrix(params).to(input)
        window = torch.cat([window, window.new_tensor([0.0, 0.0, 1.0]).expand(len(window), 1, 3)], 1)
        image = _to_pixels(input.shape[-2], input.shape[-1]).to(input)
        view = _to_pixels(self.size, self.size).to(input)
        return _product(view, torch.linalg.inv(_product(image, window)))


def window_matrix(params: dict[str, Tensor]) -> Float[Tensor, "batch 2 3"]:
    """Affine maps from view to image coordinates, both -1 to 1 between the outer pixel edges.

    `extent` is the window's share of the image's width and height, `centre` its centre; `flip` mirrors, `angle`
    (degrees) turns the content counter-clockwise, `shear` (degrees) slants it, `translation` moves it right and down
    by a share of the view's side.
    """
    extent, centre = params["extent"], params["centre"]
    linear = torch.diag_embed(extent)
    if "angle" in params:
        angle = torch.deg2rad(params["angle"])
        cos, sin = angle.cos(), angle.sin()
        linear = _product(linear, _matrix(cos, -sin, sin, cos))
    if "shear" in params:
        x, y = torch.deg2rad(params["shear"]).tan().unbind(-1)
        linear = _product(linear, _matrix(torch.ones_like(x), x, y, 1 + x * y))
    if "flip" in params:
        linear = torch.where(params["flip"].unsqueeze(1), -linear, linear)
    if "translation" in params:
        centre = centre - 2 * _product(linear, params["translation"].unsqueeze(-1)).squeeze(-1)
    return torch.cat([linear, centre.unsqueeze(-1)], -1)


def box_extents(
    area: Float[Tensor, " batch"],
    ratio: Float[Tensor, " batch"],
    area_range: tuple[float, float],
    ratio_range: tuple[float, float],
    aspects: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch 2"]:
    """Relative sizes of random boxes of uniform area and log-uniform aspect ratio that fit.

    `area` and `ratio` are numbers in [0, 1); `aspects` are width over height of what the boxes lie in, None for 1.
    """
    area = area_range[0] + area * (area_range[1] - area_range[0])
    room, shape = area.log().neg(), 0.0 if aspects is None else aspects.log()
    low = torch.clamp(shape - room, min=math.log(ratio_range[0]))
    high = torch.clamp(shape + room, max=math.log(ratio_range[1]))
    if aspects is not None or not ratio_range[0] <= 1 <= ratio_range[1]:
        # An image more elongated than the range allows: the box keeps the image's own elongation as far as it must.
        high, low = torch.maximum(high, shape - room), torch.minimum(low, shape + room)
    return _extents(area, low + ratio * (high - low) - shape).clamp(max=1.0)


def first_that_fits(
    areas: Float[Tensor, "attempts batch"],
    ratios: Float[Tensor, "attempts batch"],
    area_range: tuple[float, float],
    ratio_range: tuple[float, float],
    aspects: Float[Tensor, " batch"],
) -> Float[Tensor, "batch 2"]:
    """Relative sizes of the first random boxes that fit, as torchvision draws them.

    Arguments as of `box_extents`, whose boxes replace those of which no attempt fits.
    """
    low, high = map(math.log, ratio_range)
    area = area_range[0] + areas * (area_range[1] - area_range[0])
    extents = _extents(area, low + ratios * (high - low) - aspects.log())
    # The number of attempts before the first that fits.
    failed = (extents.amax(-1) <= 1).cumsum(0).eq(0).sum(0)
    index = failed.clamp(max=len(areas) - 1)[None, :, None].expand(1, -1, 2)
    fitted = box_extents(areas[0], ratios[0], area_range, ratio_range, aspects)
    return torch.where((failed < len(areas))[:, None], extents.gather(0, index)[0], fitted)


def _extents(area: Tensor, log_ratio: Tensor) -> Float[Tensor, "*batch 2"]:
    half = log_ratio / 2
    width, height = area.sqrt() * half.exp(), area.sqrt() * half.neg().exp()
    return torch.stack([width, height], -1)


def crop_boxes(window: Float[Tensor, "batch 2 3"], padding: str) -> Float[Tensor, "batch 4"]:
    """Boxes of what windows see of their images: left, top, right, bottom, as shares of width and height."""
    centre, reach = window[..., 2], window[..., :2].abs().sum(-1)
    low, high = centre - reach, centre + reach
    if padding == "reflection":
        low, high = torch.minimum(low, 2 - high), torch.maximum(high, -2 - low)
    # Of a window beyond the image's edge, the edge.
    low, high = low.clamp(-1, 1 - LEAST), high.clamp(-1 + LEAST, 1)
    return torch.cat([low, torch.maximum(high, low + LEAST)], -1) / 2 + 0.5


def within(window: Float[Tensor, "batch 2 3"], boxes: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch 2 3"]:
    """Maps of windows into boxes of their images, instead of the whole images."""
    low, high = (2 * boxes - 1).chunk(2, -1)
    half = (high - low)[..., None] / 2
    window = window - torch.cat([torch.zeros_like(window[..., :2]), ((low + high) / 2)[..., None]], -1)
    return window / half


def resample(
    images: Float[Tensor, "batch channels height width"],
    window: Float[Tensor, "batch 2 3"],
    size: int,
    *,
    mode: str = "bilinear",
    padding: str = "border",
) -> Float[Tensor, "batch channels size size"]:
    """The images seen through their windows, as `size` x `size` views.

    Bilinear sampling reads 2 x 2 pixels and so skips some when a window spans more than twice as many pixels as the
    view has. Such a window is read from a copy of the image reduced by area (2, 4, ... times: the level at which it
    spans one to two pixels per pixel). Without rotation no frequency above the view's own passes unweakened.
    """
    grid = _grid(window, size)
    # The reduction that any window might need, known without a look at the windows: it costs no synchronisation.
    levels = max(0, math.ceil(math.log2(max(images.shape[-2:]) / size)) - 1) if mode == "bilinear" else 0
    views = F.grid_sample(images, grid, mode=mode, padding_mode=padding, align_corners=False)
    if not levels:
        return views
    # Pixels of the image per pixel of the view, along the view's axis that is reduced most.
    pixels = torch.stack([window[:, 0, :2] * images.shape[-1], window[:, 1, :2] * images.shape[-2]], 1)
    step = (pixels.square().sum(1).sqrt() / size).amax(1)
    for level in range(1, levels + 1):
        images = F.adaptive_avg_pool2d(images, (images.shape[-2] // 2, images.shape[-1] // 2))
        reduced = F.grid_sample(images, grid, mode=mode, padding_mode=padding, align_corners=False)
        views = torch.where((step > 2**level)[:, None, None, None], reduced, views)
    return views


def _grid(window: Tensor, size: int) -> Float[Tensor, "batch size size 2"]:
    # x and y in two planes, the layout which grid_sample reads fastest; affine_grid takes three times as long.
    centres = (torch.arange(size, device=window.device, dtype=window.dtype) * 2 + 1) / size - 1
    columns = window[:, :, :1] * centres
    rows = window[:, :, 1:2] * centres + window[:, :, 2:]
    return (columns.unsqueeze(2) + rows.unsqueeze(3)).permute(0, 2, 3, 1)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Float[Tensor, "batch 2 2"]:
    return torch.stack([torch.stack([a, b], -1), torch.stack([c, d], -1)], -2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    # Not @: a GPU that rounds the factors of matrix products to 11 bits would move the pixels of a large image.
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def _to_pixels(height: int, width: int) -> Tensor:
    # From coordinates between -1 and 1 to pixel indices.
    return torch.tensor([[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2], [0, 0, 1]])
