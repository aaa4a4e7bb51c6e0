"""The view that evaluation sees, as timm's transform: the shorter side resized, then the centre cropped."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from manyviews.config import Settings
from manyviews.data.images import Crops, Images, Interpolation, Pictures
from manyviews.data.pictures import reads_crops
from manyviews.system.precision import exact
from manyviews.views.normalisation import MEAN, STD, normalised
from manyviews.views.pipeline import ViewsSettings

CropMode = Literal["center", "squash"]
ROUNDING = 1e-4
"""What a resized side may lack to a whole pixel by the rounding of its aspect ratio."""


@dataclass(frozen=True)
class StandardView:
    """Turns pictures into a backbone's input; a `Cropper` of one crop per image.

    The shorter side is resized to floor(size / crop_pct) pixels and the central square of `size` is cropped, in whole
    pixels as `timm.data.create_transform` does. An image that is decoded as needed is cropped from the file; of one in
    memory, which is squeezed into a square, the crop is resampled with the same antialiased filter.

    Examples:
        >>> view = StandardView(4, channels=3)
        >>> view(Pictures((torch.zeros(1, 1, 8, 8, dtype=torch.uint8),))).shape
        torch.Size([1, 3, 4, 4])
    """

    size: int
    """Side of the input, in pixels."""
    channels: int
    """Input channels; grey images are repeated to 3."""
    mean: float | tuple[float, ...] = MEAN
    """Mean of the input in [0, 1], one for all channels or one for each."""
    std: float | tuple[float, ...] = STD
    """Standard deviation of the input, likewise."""
    interpolation: Interpolation = "bicubic"
    """How images of another size are resized."""
    crop_pct: float = 1.0
    """Share of the resized side that is cropped, at most 1."""
    crop_mode: CropMode = "center"
    """squash: both sides are resized to floor(size / crop_pct), whatever the aspect ratio."""

    @torch.no_grad()
    def __call__(self, pictures: Pictures) -> Float[Tensor, "batch channels size size"]:
        """The input of a backbone, on the device of the pictures."""
        pixels = pictures.squares[0][0].to(torch.float32) if pictures.cropped else self._resampled(pictures)
        return normalised(pixels, self.mean, self.std).expand(-1, self.channels, -1, -1)

    def bytes(self, pictures: Pictures) -> UInt8[Tensor, "batch _ size size"]:
        """The view as pixels from 0 to 255, to be looked at."""
        pixels = replace(self, channels=-1, mean=0.0, std=1 / 255)(pictures)
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def crops(
        self, ids: Int64[Tensor, " batch"], epoch: int, aspects: Float[Tensor, " batch"] | None
    ) -> tuple[Crops, ...]:
        """The central box of each image; the same in every epoch."""
        aspects = torch.ones(len(ids), dtype=torch.float64) if aspects is None else aspects
        return (Crops(self.boxes(aspects).unsqueeze(0), self.size),)

    def boxes(self, aspects: Float[Tensor, " batch"]) -> Float[Tensor, "batch 4"]:
        """Left, top, right and bottom of the crop, as shares of width and height."""
        side = math.floor(self.size / self.crop_pct)
        shape = torch.ones_like(aspects) if self.crop_mode == "squash" else aspects
        resized = (side * torch.stack([shape, 1 / shape], 1).clamp(min=1) + ROUNDING).floor()
        first = ((resized - self.size) / 2).round()
        return torch.cat([first, first + self.size], 1) / resized.repeat(1, 2)

    @property
    def described(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The entries of timm's `pretrained_cfg` from which its `create_transform` makes this view."""
        mean, std = (value if isinstance(value, tuple) else (value,) * self.channels for value in (self.mean, self.std))
        entries = {name: getattr(self, name) for name in ("interpolation", "crop_pct", "crop_mode")}
        return {"input_size": (self.channels, self.size, self.size), "mean": mean, "std": std, **entries}

    def _resampled(self, pictures: Pictures) -> Float[Tensor, "batch _ size size"]:
        """The crops of whole images, from 0 to 255."""
        (squares,), aspects = pictures.squares, pictures.aspects
        if aspects is None and self.crop_pct == 1:
            pixels, size = squares.to(torch.float32), (self.size, self.size)
            if squares.shape[-2:] != size:
                pixels = F.interpolate(pixels, size, mode=self.interpolation, antialias=True).clamp_(0, 255)
            return pixels
        aspects = torch.ones(1, device=squares.device) if aspects is None else aspects
        left, top, right, bottom = self.boxes(aspects).to(torch.float32).unbind(1)
        columns = resampling(left, right, squares.shape[-1], self.size, self.interpolation)
        rows = resampling(top, bottom, squares.shape[-2], self.size, self.interpolation)
        count = len(squares)
        with torch.autocast(squares.device.type, enabled=False), exact():
            pixels = torch.einsum("bchw,bow->bhco", squares.float(), columns.expand(count, -1, -1))
            pixels = torch.einsum("bhco,bph->bcpo", pixels, rows.expand(count, -1, -1))
        # Bicubic interpolation overshoots at edges, where an 8-bit image would not.
        return pixels.clamp_(0, 255)


def standard_view(settings: ViewsSettings, channels: int) -> StandardView:
    """The standard view of a run, from resolved settings; what those of an older run lack is as it was then."""
    assert settings.size is not None
    mean, std = settings.mean, settings.std
    return StandardView(
        settings.size,
        channels,
        MEAN if mean is None else mean,
        STD if std is None else std,
        crop_pct=settings.crop_pct or 1.0,
    )


def resampling(
    first: Float[Tensor, " batch"],
    last: Float[Tensor, " batch"],
    source: int,
    size: int,
    interpolation: Interpolation,
) -> Float[Tensor, "batch size source"]:
    """Weights that resize from `first` to `last`, shares of `source` pixels, to `size` pixels with antialiasing.

    Pillow's filters (`Resample.c`) and torch's, as a matrix: a triangle or the cubic of Keys 1981 with a = −0.5, as
    wide as 1 or 2 pixels of the result, at least of the source, and normalised, so that it ends at the image's edge.

    Examples:
        >>> resampling(torch.zeros(1), torch.ones(1), 4, 2, "bilinear")[0, 0].tolist()
        [0.4285714328289032, 0.4285714328289032, 0.1428571492433548, 0.0]
    """
    step = ((last - first) * source / size)[:, None]
    centres = first[:, None] * source + (torch.arange(size, device=first.device) + 0.5) * step
    distance = torch.arange(source, device=first.device) + 0.5 - centres[:, :, None]
    distance = distance.abs_().div_(step.clamp(min=1)[:, :, None])
    weights = _triangle(distance) if interpolation == "bilinear" else _cubic(distance)
    return weights / weights.sum(2, keepdim=True)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    inner = (1.5 * distance - 2.5) * distance.square() + 1
    outer = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return torch.where(distance < 1, inner, torch.where(distance < 2, outer, 0.0))


def enlarged(size: int, images: Images, data: Settings) -> str | None:
    """A warning if most images in memory have fewer pixels than a view of `size` pixels takes, else None.

    `data` are the settings of their source.
    """
    longest = 1.0 if images.aspects is None else float(torch.maximum(images.aspects, 1 / images.aspects).median())
    # Along the longer side, which is squeezed.
    kept = math.floor(images.size / longest)
    if size <= kept or reads_crops(images):
        return None
    cure = f"these images have no more pixels, and data.size is for folders; a size of {kept} costs less"
    if "size" in type(data).model_fields:
        needed = math.ceil(size * longest)
        cure = f"data.size={needed} keeps as many pixels of them as the files have"
        cure += (
            ", and data.memory=0 crops from the files" if longest > 1 and "memory" in type(data).model_fields else ""
        )
    return f"images are enlarged from {kept} to {size} pixels, which adds cost and no detail: {cure}"
