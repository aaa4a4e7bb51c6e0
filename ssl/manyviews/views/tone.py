"""From stored bytes to floats, once per view, with a gamma curve on the way."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn


class RandomTone(nn.Module):
    """Raises the values to a power that is log-uniform in [exp(-gamma), exp(gamma)], with a probability.

    A byte has 256 values, so the power is taken of a table of 256 per view and looked up: a quarter of the cost of
    powers of all pixels. For that it comes first, on the stored pixels.
    """

    num_draws = 2

    def __init__(self, gamma: float, probability: float) -> None:
        super().__init__()
        self.gamma, self.probability = gamma, probability

    def forward(
        self, images: UInt8[Tensor, "batch channels height width"], draws: Float[Tensor, "draws views batch"]
    ) -> Float[Tensor, "views batch channels height width"]:
        """One float copy of the images per view, in [0, 255], with exponents from numbers in [0, 1)."""
        if not self.gamma:
            return images.new_empty((draws.shape[1], *images.shape), dtype=torch.float32).copy_(images)
        exponent = torch.where(draws[0] < self.probability, ((2 * draws[1] - 1) * self.gamma).exp(), 1.0)
        return look_up(images, exponent)


def look_up(
    images: UInt8[Tensor, "batch channels height width"], exponent: Float[Tensor, "views batch"]
) -> Float[Tensor, "views batch channels height width"]:
    """255 (image / 255) ** exponent, for each view and image its own exponent."""
    # exp(exponent log x) is three times as fast as a power; the logarithm of 0 is -inf, and its exponential 0 again.
    logarithms = (torch.arange(256, device=images.device) / 255).log()
    tables = (exponent.unsqueeze(-1) * logarithms).exp_().mul_(255)
    pixels = images.flatten(1).long().expand(len(exponent), -1, -1)
    return tables.gather(2, pixels).view(len(exponent), *images.shape)
