"""Normalisation of views by a mean and a standard deviation of values in [0, 1]."""

from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from manyviews.data.images import Interpolation

# The encoder's input is (value in [0, 1] - MEAN) / STD in every channel, so it lies in [-2, 2]. Fixed, so that an
# exported backbone's transform is known without the data; networks with batch norm do not care for more.
MEAN, STD = 0.5, 0.25


@torch.no_grad()
def plain(
    images: UInt8[Tensor, "batch channels height width"],
    size: int,
    *,
    mean: float | tuple[float, ...] = MEAN,
    std: float | tuple[float, ...] = STD,
    interpolation: Interpolation = "bilinear",
) -> Float[Tensor, "batch _ size size"]:
    """The view for evaluation: the whole image, resized with antialiasing and normalised.

    By default as the views are; or by a mean and a standard deviation of values in [0, 1] for each channel, as other
    backbones were trained. Grey images then get as many channels as there are means.

    Examples:
        >>> plain(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4).unique()
        tensor([-2.])
    """
    scaled = images.to(torch.float32)
    if images.shape[-2:] != (size, size):
        scaled = F.interpolate(scaled, (size, size), mode=interpolation, antialias=True)
        if interpolation == "bicubic":
            scaled = scaled.clamp_(0, 255)  # it overshoots at edges, where an 8-bit image would not
    if isinstance(mean, float) and isinstance(std, float):
        return scaled.mul_(1 / (255 * std)).sub_(mean / std)
    return (scaled / 255 - per_channel(mean, images.device)) / per_channel(std, images.device)


def renormalised(
    views: Float[Tensor, "batch _ height width"], mean: float | tuple[float, ...], std: float | tuple[float, ...]
) -> Float[Tensor, "batch channels height width"]:
    """Views normalised by `MEAN` and `STD`, normalised by others instead; the same tensor for the same ones.

    Examples:
        >>> renormalised(torch.zeros(1, 1, 1, 1), 0.0, 1.0).item()
        0.5
    """
    if (mean, std) == (MEAN, STD):
        return views
    new_mean, new_std = (per_channel(value, views.device) for value in (mean, std))
    return views * (STD / new_std) + (MEAN - new_mean) / new_std


@cache
def per_channel(values: float | tuple[float, ...], device: torch.device) -> Float[Tensor, "channels 1 1"]:
    """Numbers for the channels of images, copied to a device once."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device).view(-1, 1, 1)
