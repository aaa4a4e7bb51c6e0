"""Blur, solarisation and erasing, each with its own parameters per image."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn

from manyviews.views.geometry import box_extents

ERASED_RATIO = (0.3, 1 / 0.3)


class RandomEffects(nn.Module):
    """Gaussian blur, solarisation and one erased box, each with its probability, in this order.

    Works on views of any range: `middle` is the grey above which solarisation inverts, `erase_fill` fills the box.
    """

    def __init__(
        self,
        *,
        blur: float,
        blur_sigma: tuple[float, float],
        blur_kernel: int,
        solarize: float,
        middle: float,
        erase: float,
        erase_scale: tuple[float, float],
        erase_fill: float,
    ) -> None:
        super().__init__()
        # None if there is nothing to do, so that nothing is drawn.
        self.num_draws = 8 if blur or solarize or erase else 0
        self.blur, self.blur_sigma, self.blur_kernel = blur, blur_sigma, blur_kernel
        self.solarize, self.middle = solarize, middle
        self.erase, self.erase_scale, self.erase_fill = erase, erase_scale, erase_fill

    def forward(
        self, views: Float[Tensor, "batch channels height width"], draws: Float[Tensor, "draws batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The views changed, with parameters from numbers in [0, 1); they may be changed in place."""
        if self.blur:
            low, high = self.blur_sigma
            views = blur(views, draws[0] < self.blur, low + draws[1] * (high - low), self.blur_kernel)
        if self.solarize:
            views = solarize(views, draws[2] < self.solarize, self.middle)
        if self.erase:
            extent = box_extents(draws[4], draws[5], self.erase_scale, ERASED_RATIO)
            centre = (2 * draws[6:8].T - 1) * (1 - extent)
            views = erase(views, draws[3] < self.erase, extent, centre, self.erase_fill)
        return views


def blur(
    images: Float[Tensor, "batch channels height width"],
    applied: Bool[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
    kernel: int,
) -> Float[Tensor, "batch channels height width"]:
    """Gaussian blur (kornia's) of the images that `applied` names, each with its own standard deviation in pixels."""

    def blurred(images: Tensor, sigma: Tensor) -> Tensor:
        return gaussian_blur2d(images, kernel, sigma[:, None].expand(-1, 2))

    return _where(applied, blurred, images, sigma)


def solarize(
    images: Float[Tensor, "batch channels height width"], applied: Bool[Tensor, " batch"], middle: float
) -> Float[Tensor, "batch channels height width"]:
    """Inverts what is brighter than `middle` grey in the images that `applied` names."""
    inverted = middle - (images - middle).abs()
    return torch.where(applied[:, None, None, None], inverted, images)


def erase(
    images: Float[Tensor, "batch channels height width"],
    applied: Bool[Tensor, " batch"],
    extent: Float[Tensor, "batch 2"],
    centre: Float[Tensor, "batch 2"],
    fill: float,
) -> Float[Tensor, "batch channels height width"]:
    """Fills a box in each image that `applied` names, in place.

    `extent` is the box's share of width and height, `centre` its centre from -1 to 1; a pixel goes if its centre lies
    inside.
    """
    reach = extent * applied[:, None]
    columns, rows = (
        (centre[:, axis, None] - ((torch.arange(side, device=images.device) * 2 + 1) / side - 1)).abs()
        < reach[:, axis, None]
        for axis, side in ((0, images.shape[3]), (1, images.shape[2]))
    )
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), fill)


def _where(applied: Tensor, change: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    # On an accelerator the number of rows is not known here without waiting for it, so all of them are computed.
    if images.device.type != "cpu":
        return torch.where(applied[:, None, None, None], change(images, *parameters), images)
    rows = applied.nonzero().squeeze(1)
    if not len(rows):
        return images
    return images.index_copy(0, rows, change(images[rows], *(values[rows] for values in parameters)))
