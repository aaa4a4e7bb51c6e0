"""Blur, solarisation and erasing, each with its own parameters per image."""

import torch
from jaxtyping import Bool, Float
from kornia.filters import gaussian_blur2d
from torch import Tensor


def blur(
    images: Float[Tensor, "batch channels height width"],
    applied: Bool[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
    kernel: int,
) -> Float[Tensor, "batch channels height width"]:
    """Gaussian blur (kornia's) where `applied`; `sigma` is each image's standard deviation in pixels."""
    sigma = sigma[:, None].expand(-1, 2)
    # On an accelerator the number of rows is not known here without waiting for it, so all of them are computed.
    if images.device.type != "cpu":
        return torch.where(applied[:, None, None, None], gaussian_blur2d(images, kernel, sigma), images)
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
