"""Features of two random views of the same images: what alignment is measured on."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from manyviews.data.images import Images
from manyviews.features.encoding import evaluation_mode
from manyviews.views import MEAN, STD, Views


@torch.inference_mode()
def two_views(
    backbone: nn.Module,
    views: Views,
    images: Images,
    ids: Int64[Tensor, " chosen"],
    *,
    channels: int,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> tuple[Float[Tensor, "chosen width"], Float[Tensor, "chosen width"]]:
    """The features of the first two views, of so many channels, of the images that `ids` names, float32 on the CPU.

    Views are a function of their seed and the images' ids: those of the first epoch of a run that saw these images.
    """
    first, second = [], []
    with evaluation_mode(backbone):
        for part in ids.split(batch_size):
            # Grey images are shown in grey to a backbone that has learned from colour.
            pixels = images.read(part).to(device).expand(-1, channels, -1, -1)
            made = views(pixels, part.to(device), 0)
            first.append(backbone(made[0]).float().cpu())
            second.append(backbone(made[1]).float().cpu())
    return torch.cat(first), torch.cat(second)


class Pixels(nn.Module):
    """A backbone that has learned nothing and changes nothing: the pixels of a view, in [0, 1] and flattened."""

    def forward(self, views: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch pixels"]:
        """The pixels as they were before they were normalised for an encoder."""
        return views.mul(STD).add(MEAN).flatten(1)
