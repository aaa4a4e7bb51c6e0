"""Random views of a batch of images; draws are a function of seed, epoch, id and view."""

from functools import cache
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from manyviews.config import Settings
from manyviews.data.images import Interpolation
from manyviews.system.keyed_random import uniform_sequences
from manyviews.views.colour import RandomColour, blur, erase, random_gamma, solarize
from manyviews.views.geometry import RandomWindow, box_extents

# The encoder's input is (value in [0, 1] - MEAN) / STD in every channel, so it lies in [-2, 2]. Fixed, so that an
# exported backbone's transform is known without the data; networks with batch norm do not care for more.
MEAN, STD = 0.5, 0.25

# First draw of each stage, with room to grow: a parameter that is added or left out does not change the other draws.
WINDOW, COLOUR, GAMMA, EFFECTS = 0, 16, 32, 48
ERASED_RATIO = (0.3, 1 / 0.3)
GAP = 2
"""White pixels between the images of a preview."""
CROPPED_FROM, CROP_PCT = 160, 0.875
"""Side of a view from which the standard view leaves out the image's margins, and what it shows of the shorter side."""
Mean = Annotated[float, Field(ge=-1e4, le=1e4)]
Std = Annotated[float, Field(gt=0, le=1e4)]


class ViewsSettings(Settings):
    """Random crops with changed colours; null settings follow the image size and channels."""

    num_views: int = Field(2, ge=1, le=256)
    """Views per image."""
    size: int | None = Field(None, ge=8, le=4096)
    """Side of a view in pixels; null is the size of the data."""
    crop_pct: float | None = Field(None, gt=0, le=1)
    """Share of the shorter side that evaluation shows: it is resized to size / crop_pct, then the centre is cropped;
    null: 0.875 from 160 pixels on, else 1."""
    mean: Mean | tuple[Mean, ...] | None = None
    """Mean of the encoder's input in [0, 1], one for all channels or one for each; null: that which the weights were
    trained with, with encoder.pretrained=true, else 0.5."""
    std: Std | tuple[Std, ...] | None = None
    """Standard deviation of the encoder's input, likewise; else 0.25."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of the image's area that a crop shows."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width over height of a crop."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    vertical_flip: float = Field(0.0, ge=0, le=1)
    """Probability of a vertical flip."""
    rotation: float = Field(0.0, ge=0, le=180)
    """Largest rotation in degrees, either way."""
    translation: float = Field(0.0, ge=0, le=1)
    """Largest movement as a share of the view's side, either way."""
    shear: float = Field(0.0, ge=0, le=60)
    """Largest shear in degrees, either way, along both axes."""
    padding: Literal["zeros", "border", "reflection"] = "border"
    """What lies beyond the image's edge, where rotation, translation or shear look."""
    brightness: float | None = Field(None, ge=0, le=100)
    """Strength x: the brightness factor is uniform in 1 - x to 1 + x."""
    contrast: float | None = Field(None, ge=0, le=100)
    """Strength x: the contrast factor is uniform in 1 - x to 1 + x."""
    saturation: float | None = Field(None, ge=0, le=100)
    """Strength x: the saturation factor is uniform in 1 - x to 1 + x; needs three channels."""
    hue: float | None = Field(None, ge=0, le=0.5)
    """Largest hue shift in turns, either way; needs three channels."""
    gamma: float | None = Field(None, ge=0, le=3)
    """Strength x: values are raised to a power log-uniform in exp(-x) to exp(x)."""
    colour_probability: float = Field(0.8, ge=0, le=1)
    """Probability that brightness, contrast, saturation and hue change at all, and that gamma does."""
    greyscale: float | None = Field(None, ge=0, le=1)
    """Probability of losing the colours; needs three channels."""
    clip: bool = True
    """Clip values to black and white after the changes of colour."""
    blur: float | None = Field(None, ge=0, le=1)
    """Probability of a Gaussian blur (kernel: the odd number next to a tenth of the side)."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels."""
    solarize: float = Field(0.0, ge=0, le=1)
    """Probability of inverting what is brighter than middle grey."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability of erasing one box."""
    erase_scale: tuple[float, float] = (0.02, 0.33)
    """Smallest and largest share of the view's area that is erased."""
    erase_fill: float = Field(0.5, ge=0, le=1)
    """Grey value of the erased box, from 0 (black) to 1 (white)."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> "ViewsSettings":
        for name, low, high in (
            ("crop_scale", 1e-4, 1.0),
            ("crop_ratio", 1e-2, 1e2),
            ("blur_sigma", 1e-3, 1e3),
            ("erase_scale", 0.0, 1.0),
        ):
            pair = getattr(self, name)
            if pair is not None and not low <= pair[0] <= pair[1] <= high:
                raise ValueError(f"{name} is {list(pair)}; it must be [smallest, largest] between {low:g} and {high:g}")
        return self

    def resolve(
        self,
        *,
        size: int,
        channels: int,
        mean: float | tuple[float, ...] = MEAN,
        std: float | tuple[float, ...] = STD,
    ) -> "ViewsSettings":
        """Fills in every null for images of this size and number of channels.

        `mean` and `std` are those of the encoder's weights.

        From 64 pixels on, SimCLR's ImageNet recipe (Chen et al. 2020, appendix A), its crops from 0.2 of the area
        below 160 pixels. Below, its CIFAR recipe (half the colour strength, no blur). Small single-channel images get
        gentle crops, for what they show (a glyph, a garment) fills the picture, and gamma in place of contrast, which
        would lift their black ground (on Fashion-MNIST, gamma is worth two points of kNN accuracy, contrast none).

        Raises:
            ValueError: saturation, hue or greyscale are set for images without three channels, or `mean` or `std` have
                other channels than the images.
        """
        view, colours = self.size or size, channels == 3
        strength = 1.0 if view >= 64 else 0.5
        smallest = 0.08 if view >= 160 else 0.2 if view >= 64 or colours else 0.6
        preset: dict[str, Any] = {
            "size": size,
            "crop_pct": CROP_PCT if view >= CROPPED_FROM else 1.0,
            "mean": mean,
            "std": std,
            "crop_scale": (smallest, 1.0),
            "brightness": 0.8 * strength,
            "contrast": 0.8 * strength if colours or view >= 64 else 0.0,
            "gamma": 0.0 if colours or view >= 64 else 0.7,
            "saturation": 0.8 * strength if colours else 0.0,
            "hue": 0.2 * strength if colours else 0.0,
            "greyscale": 0.2 if colours else 0.0,
            "blur": 0.5 if view >= 64 else 0.0,
        }
        filled = self.model_copy(update={name: value for name, value in preset.items() if getattr(self, name) is None})
        for name in ("saturation", "hue", "greyscale"):
            if not colours and getattr(filled, name):
                raise ValueError(
                    f"views.{name} is {getattr(filled, name):g}, but images of {channels} channel"
                    f"{'s have' if channels > 1 else ' have'} no colours; leave it out or set it to 0"
                )
        for name in ("mean", "std"):
            values = getattr(filled, name)
            if isinstance(values, tuple) and len(values) != channels:
                raise ValueError(
                    f"views.{name} has {len(values)} numbers, and the images have {channels} channels; give one for "
                    "each channel, or one for all"
                )
        return filled

    def build(self, *, size: int, channels: int, seed: int) -> "Views":
        """Builds the views for images of this size and number of channels; raises as `resolve`."""
        return Views(self.resolve(size=size, channels=channels), seed)


class Views(nn.Module):
    """V random views per image in one stacked pass; `ViewsSettings.build` makes it.

    Every draw is a pure function of (seed, epoch, image id, view, parameter): a view is the same in any batch, on any
    rank, with any number of workers and after a resume. There is no random state, and the global one is not touched.

    Examples:
        >>> views = ViewsSettings().build(size=32, channels=3, seed=0)
        >>> views(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.arange(5), epoch=0).shape
        torch.Size([2, 5, 3, 32, 32])
    """

    def __init__(self, settings: ViewsSettings, seed: int) -> None:
        super().__init__()
        self.settings, self.seed, self.num_views = settings, seed, settings.num_views
        assert settings.size is not None
        assert settings.crop_scale is not None
        assert settings.mean is not None
        assert settings.std is not None
        self.normalisation = settings.mean, settings.std
        self.window = RandomWindow(
            settings.size,
            scale=settings.crop_scale,
            ratio=settings.crop_ratio,
            flip=settings.flip,
            vertical_flip=settings.vertical_flip,
            rotation=settings.rotation,
            translation=settings.translation,
            shear=settings.shear,
            padding=settings.padding,
        )
        self.colour = RandomColour(
            brightness=settings.brightness or 0.0,
            contrast=settings.contrast or 0.0,
            saturation=settings.saturation or 0.0,
            hue=settings.hue or 0.0,
            jitter_probability=settings.colour_probability,
            greyscale_probability=settings.greyscale or 0.0,
            clip=settings.clip,
            white=255.0,
            mean=MEAN,
            std=STD,
        )
        self.blur_kernel = max(3, (settings.size // 10) | 1)
        effects = 8 if settings.blur or settings.solarize or settings.erase else 0
        stages = {GAMMA: 2, WINDOW: self.window.num_draws, COLOUR: self.colour.num_draws, EFFECTS: effects}
        self.sections = list(stages.values())
        numbers = torch.cat([torch.arange(first, first + count) for first, count in stages.items()])
        self.register_buffer("numbers", numbers, persistent=False)

    @torch.no_grad()
    def forward(
        self, images: UInt8[Tensor, "batch channels height width"], ids: Int64[Tensor, " batch"], epoch: int
    ) -> Float[Tensor, "views batch channels size size"]:
        """Views, normalised to the encoder's input; `ids` are the images' own, not their labels."""
        with torch.autocast(images.device.type, enabled=False):
            keys = [(self.seed, epoch, view) for view in range(self.num_views)]
            draws = uniform_sequences(ids.to(images.device), keys, self.get_buffer("numbers"))
            gamma, window, colour, effects = torch.split(draws, self.sections)
            views = random_gamma(images, gamma, self.settings.gamma or 0.0, self.settings.colour_probability)
            views = views.flatten(0, 1)
            # The transforms themselves, without kornia's bookkeeping around them, which would take a tenth of the time.
            params = self.window.interpret(window.flatten(1), aspect=images.shape[3] / images.shape[2])
            views = self.window.apply_transform(views, params, self.window.flags)
            views = self.colour.apply_transform(views, self.colour.interpret(colour.flatten(1)), self.colour.flags)
            views = self._effects(views, effects.flatten(1))
            # The stages before know black and white by the pipeline's own mean and deviation.
            views = renormalised(views, *self.normalisation)
            stacked: Tensor = views.unflatten(0, (self.num_views, len(images)))
            return stacked

    def preview(
        self, images: UInt8[Tensor, "batch channels height width"], ids: Int64[Tensor, " batch"], *, epochs: int = 4
    ) -> UInt8[Tensor, "3 rows columns"]:
        """One row per image: the original, then its views of the first epochs, enlarged if small."""
        original = plain(images, self.window.size).unsqueeze(0)
        columns = torch.cat([original, *(self(images, ids, epoch) for epoch in range(epochs))])
        columns = ((columns * STD + MEAN) * 255).round().clamp(0, 255).to(torch.uint8)
        if columns.shape[2] != 3:
            columns = columns.float().mean(2, keepdim=True).byte().expand(-1, -1, 3, -1, -1)
        zoom = max(1, 64 // self.window.size)
        columns = columns.repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)
        framed = F.pad(columns, (GAP, 0, GAP, 0), value=255)
        picture = framed.permute(2, 1, 3, 0, 4).flatten(3, 4).flatten(1, 2)
        return F.pad(picture, (0, GAP, 0, GAP), value=255)

    def _effects(self, views: Tensor, draws: Tensor) -> Tensor:
        """Blur, solarisation and one erased box, in this order; may work in place."""
        settings = self.settings
        if settings.blur:
            low, high = settings.blur_sigma
            views = blur(views, draws[0] < settings.blur, low + draws[1] * (high - low), self.blur_kernel)
        if settings.solarize:
            views = solarize(views, draws[2] < settings.solarize, (0.5 - MEAN) / STD)
        if settings.erase:
            extent = box_extents(draws[4], draws[5], settings.erase_scale, ERASED_RATIO)
            centre = (2 * draws[6:8].T - 1) * (1 - extent)
            views = erase(views, draws[3] < settings.erase, extent, centre, (settings.erase_fill - MEAN) / STD)
        return views


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


def enlarged(size: int, stored: int, data: Settings) -> str | None:
    """A warning if images are viewed at `size` pixels and stored at fewer, else None.

    `data` are the settings of their source.
    """
    if size <= stored:
        return None
    cure = (
        f"data.size={size} keeps as many pixels of them as the files have"
        if "size" in type(data).model_fields
        else f"these images have no more pixels, and data.size is for folders; a size of {stored} costs less"
    )
    return f"images are enlarged from {stored} to {size} pixels, which adds cost and no detail: {cure}"
