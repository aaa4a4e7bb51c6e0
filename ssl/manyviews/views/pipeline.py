"""A batch of images becomes V views of each, on the images' device."""

from typing import Literal, cast

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from manyviews.system.keyed_random import uniform_sequences
from manyviews.views.colour import RandomColour, RandomTone
from manyviews.views.effects import RandomEffects
from manyviews.views.geometry import RandomWindow

# The encoder's input is (value in [0, 1] - MEAN) / STD in every channel, so it lies in [-2, 2]. Fixed, so that an
# exported backbone's transform is known without the data; networks with batch norm do not care for more.
MEAN, STD = 0.5, 0.25
Interpolation = Literal["bilinear", "bicubic"]

# Where each stage's parameters stand in the sequence of draws, with room to grow: one that is added or left out does
# not change the draws of the others.
WINDOW, COLOUR, TONE, EFFECTS = 0, 16, 32, 48
GAP = 2


class Views(nn.Module):
    """V random views per image, in one stacked pass with parameters per image; `ViewsSettings.build` makes it.

    Every draw is a pure function of (seed, epoch, image id, view, parameter): a view is the same in any batch, on any
    rank, with any number of workers and after a resume. There is no random state, and the global one is not touched.
    """

    def __init__(
        self,
        tone: RandomTone,
        window: RandomWindow,
        colour: RandomColour,
        effects: RandomEffects,
        *,
        num_views: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.tone, self.window, self.colour, self.effects = tone, window, colour, effects
        self.num_views, self.seed = num_views, seed
        self.sections = [tone.num_draws, window.num_draws, colour.num_draws, effects.num_draws]
        firsts = (TONE, WINDOW, COLOUR, EFFECTS)
        numbered = [torch.arange(first, first + num) for first, num in zip(firsts, self.sections, strict=True)]
        self.register_buffer("numbers", torch.cat(numbered), persistent=False)

    @torch.no_grad()
    def forward(
        self, images: UInt8[Tensor, "batch channels height width"], ids: Int64[Tensor, " batch"], epoch: int
    ) -> Float[Tensor, "views batch channels size size"]:
        """Views of the images, normalised to the encoder's input; `ids` are the images' own, not their labels."""
        with torch.autocast(images.device.type, enabled=False):
            return self._views(images, ids, epoch)

    def _views(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        keys = [(self.seed, epoch, view) for view in range(self.num_views)]
        draws = uniform_sequences(ids.to(images.device), keys, self.get_buffer("numbers"))
        tone, window, colour, effects = torch.split(draws, self.sections)
        views = self.tone(images, tone).flatten(0, 1)
        # The transforms themselves, without kornia's bookkeeping around them, which would take a tenth of the time.
        placed = self.window.interpret(window.flatten(1), aspect=images.shape[3] / images.shape[2])
        views = self.window.apply_transform(views, placed, self.window.flags)
        coloured = self.colour.interpret(colour.flatten(1))
        views = self.colour.apply_transform(views, coloured, self.colour.flags)
        views = self.effects(views, effects.flatten(1))
        return cast("Tensor", views.unflatten(0, (self.num_views, len(images))))

    def preview(
        self, images: UInt8[Tensor, "batch channels height width"], ids: Int64[Tensor, " batch"], *, epochs: int = 4
    ) -> UInt8[Tensor, "3 rows columns"]:
        """A picture with one row per image: the original, then its views of the first epochs; small images enlarged."""
        original = plain(images, self.window.size).unsqueeze(0)
        columns = torch.cat([original, *(self(images, ids, epoch) for epoch in range(epochs))])
        columns = ((columns * STD + MEAN) * 255).round().clamp(0, 255).to(torch.uint8)
        columns = (
            columns if columns.shape[2] == 3 else columns.float().mean(2, keepdim=True).byte().expand(-1, -1, 3, -1, -1)
        )
        columns = columns.repeat_interleave(max(1, 64 // self.window.size), 3).repeat_interleave(
            max(1, 64 // self.window.size), 4
        )
        framed = F.pad(columns, (GAP, 0, GAP, 0), value=255)
        picture = framed.permute(2, 1, 3, 0, 4).flatten(3, 4).flatten(1, 2)
        return F.pad(picture, (0, GAP, 0, GAP), value=255)


@torch.no_grad()
def plain(
    images: UInt8[Tensor, "batch channels height width"],
    size: int,
    *,
    mean: float | tuple[float, ...] = MEAN,
    std: float | tuple[float, ...] = STD,
    interpolation: Interpolation = "bilinear",
) -> Float[Tensor, "batch _ size size"]:
    """The view for evaluation: the whole image, resized (antialiased) if it must be, and normalised.

    By default as the views are; or by a mean and a standard deviation of values in [0, 1] for each channel, as other
    backbones were trained. Grey images then get as many channels as there are means.
    """
    scaled = images.to(torch.float32)
    if images.shape[-2:] != (size, size):
        scaled = F.interpolate(scaled, (size, size), mode=interpolation, antialias=True)
        if interpolation == "bicubic":
            scaled = scaled.clamp_(0, 255)  # it overshoots at edges, where an 8-bit image would not
    if isinstance(mean, float) and isinstance(std, float):
        return scaled.mul_(1 / (255 * std)).sub_(mean / std)
    means, deviations = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (mean, std))
    return (scaled / 255 - means) / deviations
