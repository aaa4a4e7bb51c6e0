"""Normalisation of views by a mean and a standard deviation of values in [0, 1]."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

# The encoder's input is (value in [0, 1] - MEAN) / STD in every channel, so it lies in [-2, 2]. Fixed, so that an
# exported backbone's transform is known without the data; networks with batch norm do not care for more.
MEAN, STD = 0.5, 0.25


def normalised(
    pixels: Float[Tensor, "batch _ height width"], mean: float | tuple[float, ...], std: float | tuple[float, ...]
) -> Float[Tensor, "batch channels height width"]:
    """Pixels from 0 to 255, normalised by a mean and a standard deviation of values in [0, 1]; may work in place.

    With one for each channel, grey images get as many channels.

    Examples:
        >>> normalised(torch.zeros(1, 1, 1, 1), MEAN, STD).item()
        -2.0
    """
    if isinstance(mean, float) and isinstance(std, float):
        return pixels.mul_(1 / (255 * std)).sub_(mean / std)
    return (pixels / 255 - _per_channel(mean, pixels.device)) / _per_channel(std, pixels.device)


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
    new_mean, new_std = (_per_channel(value, views.device) for value in (mean, std))
    return views * (STD / new_std) + (MEAN - new_mean) / new_std


def restored(
    views: Float[Tensor, "*views channels height width"],
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
) -> Float[Tensor, "*views channels height width"]:
    """The values in [0, 1] of views that were normalised by this mean and standard deviation.

    Examples:
        >>> restored(torch.zeros(1, 1, 1, 1), MEAN, STD).item()
        0.5
    """
    new_mean, new_std = (_per_channel(value, views.device) for value in (mean, std))
    return views.mul(new_std).add(new_mean)


@cache
def _per_channel(values: float | tuple[float, ...], device: torch.device) -> Float[Tensor, "channels 1 1"]:
    """Numbers for the channels of images, copied to a device once."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device).view(-1, 1, 1)
