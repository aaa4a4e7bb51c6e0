"""Colour changes by a table per view and a matrix per image; blur, solarisation, erasing."""

import math
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from kornia.augmentation import IntensityAugmentationBase2D
from kornia.filters import filter2d_separable, gaussian_blur2d
from torch import Tensor

# Rows: luma (ITU-R BT.601) and the two chroma axes of YIQ. A grey pixel has no chroma; a hue shift turns the chroma.
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def random_gamma(
    images: UInt8[Tensor, "batch channels height width"],
    draws: Float[Tensor, "2 views batch"],
    gamma: float,
    probability: float,
) -> Float[Tensor, "views batch channels height width"]:
    """Raises each image to a power log-uniform in [exp(-gamma), exp(gamma)], for each view.

    `draws` are in [0, 1): the first is compared with `probability`, the second gives the power. Returns values in
    [0, 255]. A byte has 256 values, so the power is taken of
    a table of 256 per view: a quarter of the cost of powers of all pixels. It therefore works on the stored pixels.
    """
    if not gamma:
        return images.new_empty((draws.shape[1], *images.shape), dtype=torch.float32).copy_(images)
    exponent = torch.where(draws[0] < probability, ((2 * draws[1] - 1) * gamma).exp(), 1.0)
    return look_up(images, exponent)


class RandomColour(IntensityAugmentationBase2D):
    """Colour jitter and greyscale as one 3 x 4 matrix per image.

    Images without three channels have only brightness and contrast.

    The meanings are torchvision's and those of kornia's ColorJitter: brightness multiplies, contrast blends with the
    view's mean grey, saturation blends with the pixel's own grey, each by a factor uniform in [1 - x, 1 + x]. Two
    things differ. Hue turns the chroma in YIQ by up to `hue` turns and keeps the luma, where torchvision turns the hue
    angle in HSV. And values are clamped to [0, 1] once, at the end, not after each step; without clamping the four
    steps commute, so that there is no order to draw.

    A kornia augmentation: usable in `AugmentationSequential` and with `params=`. Values in [0, white] come out as
    ([0, 1] - mean) / std: both scalings ride in the matrix and cost nothing.

    Raises:
        ValueError: saturation, hue or greyscale for images without three channels.
    """

    num_draws = 6

    def __init__(
        self,
        *,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        jitter_probability: float = 1.0,
        greyscale_probability: float = 0.0,
        clip: bool = True,
        white: float = 1.0,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__(p=1.0)
        self.factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.hue = hue
        self.jitter_probability, self.greyscale_probability = jitter_probability, greyscale_probability
        self.flags = {"clip": clip, "white": white, "mean": mean, "std": std}

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Parameters from torch's global generator, as kornia's own augmentations draw them."""
        return self.interpret(torch.rand(self.num_draws, batch_shape[0]))

    def interpret(self, draws: Float[Tensor, "draws batch"]) -> dict[str, Tensor]:
        """Parameters from draws in [0, 1); neutral where an image is not changed."""
        jitter, grey, hue, *factors = draws
        jittered = jitter < self.jitter_probability
        parameters = {}
        for (name, strength), draw in zip(self.factors.items(), factors, strict=True):
            if strength:
                low = max(0.0, 1 - strength)
                parameters[name] = torch.where(jittered, low + draw * (1 + strength - low), 1.0)
        if self.hue:
            parameters["hue"] = torch.where(jittered, (2 * hue - 1) * self.hue, 0.0)
        if self.greyscale_probability:
            coloured = (grey >= self.greyscale_probability).to(draws.dtype)
            parameters["saturation"] = parameters.get("saturation", 1.0) * coloured
        return parameters

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """The images [batch, channels, height, width] with their colours changed, and normalised."""
        return adjust(input, params, clip=flags["clip"], white=flags["white"], mean=flags["mean"], std=flags["std"])


def adjust(
    images: Float[Tensor, "batch channels height width"],
    params: dict[str, Tensor],
    *,
    clip: bool = True,
    white: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> Float[Tensor, "batch channels height width"]:
    """Changes brightness, contrast, saturation and hue (in turns) of images in [0, white].

    Clamped to [0, 1] once (if `clip`), then normalised by `mean` and `std`. What is missing in `params` is left alone.
    """
    channels = images.shape[1]
    if channels != 3 and ("saturation" in params or "hue" in params):
        raise ValueError(f"saturation, hue and greyscale need 3 channels; the images have {channels}")
    neutral = images.new_ones(len(images))
    scale = params.get("brightness", neutral).to(images) / (white * std)
    offset = neutral * (-mean / std)
    if "contrast" in params:
        contrast = params["contrast"].to(images)
        offset = offset + (1 - contrast) * scale * _mean_grey(images)
        scale = scale * contrast
    if "saturation" in params or "hue" in params:
        saturation, hue = params.get("saturation", neutral).to(images), params.get("hue", 0 * neutral).to(images)
        matrix = _per_image(scale).squeeze(-1) * chroma_matrix(saturation, hue)
        changed = torch.bmm(matrix, images.flatten(2)).view_as(images)
    else:
        changed = images * _per_image(scale)
    changed = changed.add_(_per_image(offset))
    return changed.clamp_(-mean / std, (1 - mean) / std) if clip else changed


def look_up(
    images: UInt8[Tensor, "batch channels height width"], exponent: Float[Tensor, "views batch"]
) -> Float[Tensor, "views batch channels height width"]:
    """255 (image / 255) ** exponent, for each view and image its own exponent."""
    # exp(exponent log x) is three times as fast as a power; the logarithm of 0 is -inf, and its exponential 0 again.
    logarithms = (torch.arange(256, device=images.device) / 255).log()
    tables = (exponent.unsqueeze(-1) * logarithms).exp_().mul_(255)
    pixels = images.flatten(1).long().expand(len(exponent), -1, -1)
    return tables.gather(2, pixels).view(len(exponent), *images.shape)


def chroma_matrix(saturation: Float[Tensor, " batch"], hue: Float[Tensor, " batch"]) -> Float[Tensor, "batch 3 3"]:
    """Matrices that keep the luma, scale the chroma by `saturation` and turn it by `hue` turns."""
    luma, chroma, turn = _chroma_basis(saturation.device, saturation.dtype)
    along, across = saturation * (2 * math.pi * hue).cos(), saturation * (2 * math.pi * hue).sin()
    matrix: Tensor = luma + along[:, None, None] * chroma + across[:, None, None] * turn
    return matrix


@cache
def _chroma_basis(device: torch.device, dtype: torch.dtype) -> Float[Tensor, "3 3 3"]:
    to_yiq = torch.tensor(YIQ, dtype=torch.float64)
    # A positive shift goes from red through yellow to green, as in HSV.
    axes = torch.tensor([[[1, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0], [0, 0, 1]],
                         [[0, 0, 0], [0, 0, 1], [0, -1, 0]]], dtype=torch.float64)  # fmt: skip
    basis: Tensor = torch.linalg.inv(to_yiq) @ axes @ to_yiq
    return basis.to(device, dtype)


def _mean_grey(images: Tensor) -> Float[Tensor, " batch"]:
    means = images.mean((2, 3))
    if means.shape[1] != 3:
        return means.mean(1)
    grey: Tensor = means[:, 0] * YIQ[0][0] + means[:, 1] * YIQ[0][1] + means[:, 2] * YIQ[0][2]
    return grey


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def blur(
    images: Float[Tensor, "batch channels height width"],
    applied: Bool[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
    kernel: int,
) -> Float[Tensor, "batch channels height width"]:
    """Gaussian blur (kornia's) where `applied`; `sigma` is per image, in pixels."""
    # On an accelerator the number of rows is not known here without waiting for it, so all of them are computed.
    if images.device.type != "cpu":
        # kornia's function waits for the device, to check sigma.
        offsets = torch.arange(kernel, device=images.device) - kernel // 2
        weights = (-offsets.square() / (2 * sigma[:, None].square())).exp()
        weights = weights / weights.sum(1, keepdim=True)
        return torch.where(applied[:, None, None, None], filter2d_separable(images, weights, weights), images)
    sigma = sigma[:, None].expand(-1, 2)
    rows = applied.nonzero().squeeze(1)
    return images.index_copy(0, rows, gaussian_blur2d(images[rows], kernel, sigma[rows])) if len(rows) else images


def solarize(
    images: Float[Tensor, "batch channels height width"], applied: Bool[Tensor, " batch"], middle: float
) -> Float[Tensor, "batch channels height width"]:
    """Inverts values above `middle` where `applied`."""
    inverted = middle - (images - middle).abs()
    return torch.where(applied[:, None, None, None], inverted, images)


def erase(
    images: Float[Tensor, "batch channels height width"],
    applied: Bool[Tensor, " batch"],
    extent: Float[Tensor, "batch 2"],
    centre: Float[Tensor, "batch 2"],
    fill: float,
) -> Float[Tensor, "batch channels height width"]:
    """Fills a box in each image where `applied`, in place.

    `extent` is the box's share of width and height, `centre` its centre from -1 to 1; a pixel is filled if its centre
    lies inside.
    """
    reach = extent * applied[:, None]
    columns, rows = (
        (centre[:, axis, None] - ((torch.arange(side, device=images.device) * 2 + 1) / side - 1)).abs()
        < reach[:, axis, None]
        for axis, side in ((0, images.shape[3]), (1, images.shape[2]))
    )
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), fill)
