"""Random views of a batch of images; draws are a function of seed, epoch, id and view."""

from functools import cache
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from manyviews.config import Settings
from manyviews.data.images import Crops, Interpolation, Pictures
from manyviews.system.keyed_random import uniform_sequences
from manyviews.views.colour import RandomColour, blur, erase, random_gamma, solarize
from manyviews.views.geometry import RandomWindow, box_extents, window_matrix
from manyviews.views.normalisation import MEAN, STD, renormalised
from manyviews.views.windows import Windows

# First draw of each stage, with room to grow: a parameter that is added or left out does not change the other draws.
WINDOW, COLOUR, GAMMA, EFFECTS, MORE = 0, 16, 32, 48, 64
ERASED_RATIO = (0.3, 1 / 0.3)
GEOMETRY = {"flip", "vertical_flip", "rotation", "translation", "shear", "padding"}
LOCAL_SCALE = (0.05, 0.14)
"""Shares of the area that local views show (Caron et al. 2020, section 4.1), and what global ones then start from."""
CROPPED_FROM, CROP_PCT = 160, 0.875
"""Side of a view from which the standard view leaves out the image's margins, and what it shows of the shorter side."""
Mean = Annotated[float, Field(ge=0, le=255)]
Std = Annotated[float, Field(gt=0, le=1e4)]


class ViewsSettings(Settings):
    """Random crops with changed colours; null settings follow the image size and channels."""

    num_views: int = Field(2, ge=1, le=256)
    """Views per image."""
    size: int | None = Field(None, ge=8, le=4096)
    """Side of a view in pixels; null is the size of the data."""
    local: int = Field(0, ge=0, le=256)
    """Further views per image that show a small part of it (multi-crop, Caron et al. 2020): they are compared with the
    views of num_views, and no view with them."""
    local_size: int | None = Field(None, ge=8, le=4096)
    """Side of a local view in pixels; null: 3/7 of that of a view, as 96 of 224."""
    local_scale: tuple[float, float] | None = None
    """Smallest and largest share of the image's area that a local view shows; null: 0.05 to 0.14, and then the other
    views start at 0.14."""
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
            ("local_scale", 1e-4, 1.0),
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
            "crop_scale": (max(smallest, LOCAL_SCALE[1]) if self.local else smallest, 1.0),
            "local_size": max(8, round(view * 3 / 7)) if self.local else None,
            "local_scale": LOCAL_SCALE if self.local else None,
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
    """Random views per image, in one stacked pass for each size; `ViewsSettings.build` makes it.

    Every draw is a pure function of (seed, epoch, image id, view, parameter): a view is the same in any batch, on any
    rank, with any number of workers and after a resume. There is no random state, and the global one is not touched.

    It is a `Cropper`: where images are decoded as they are needed, crops are made then, and the rest on the device.

    Examples:
        >>> views = ViewsSettings(local=4).build(size=32, channels=3, seed=0)
        >>> images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
        >>> [list(group.shape) for group in views(images, torch.arange(5), epoch=0)]
        [[2, 5, 3, 32, 32], [4, 5, 3, 14, 14]]
    """

    interpolation: Interpolation = "bilinear"

    def __init__(self, settings: ViewsSettings, seed: int) -> None:
        super().__init__()
        self.settings, self.seed, self.num_views = settings, seed, settings.num_views
        self.groups = [self._windows(range(settings.num_views), settings.size, settings.crop_scale)]
        if settings.local:
            numbers = range(settings.num_views, settings.num_views + settings.local)
            self.groups.append(self._windows(numbers, settings.local_size, settings.local_scale))
        self.window = self.groups[0].window
        self.normalisation = MEAN if settings.mean is None else settings.mean, settings.std or STD
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
        effects = 8 if settings.blur or settings.solarize or settings.erase else 0
        self.stages = {GAMMA: 2, WINDOW: self.window.num_draws, COLOUR: self.colour.num_draws, EFFECTS: effects}

    @torch.no_grad()
    def forward(
        self,
        images: Pictures | UInt8[Tensor, "batch channels height width"],
        ids: Int64[Tensor, " batch"],
        epoch: int,
    ) -> tuple[Float[Tensor, "_ batch channels _ _"], ...]:
        """Views of each size, normalised to the encoder's input; `ids` are the images' own, not their labels.

        A tensor is of whole square images.
        """
        pictures = Pictures((images,)) if isinstance(images, Tensor) else images
        with torch.autocast(ids.device.type, enabled=False):
            draws = self._draws(ids, epoch, pictures.aspects)
            return tuple(self._views(group, pictures, index, draws) for index, group in enumerate(self.groups))

    def crops(
        self, ids: Int64[Tensor, " batch"], epoch: int, aspects: Float[Tensor, " batch"] | None
    ) -> tuple[Crops, ...]:
        """What the views of each size show of their images."""
        draws = self._draws(ids, epoch, aspects)[WINDOW]
        return tuple(group.crops(group.draw(draws, aspects)) for group in self.groups)

    def windows(
        self, ids: Int64[Tensor, " batch"], epoch: int, aspects: Float[Tensor, " batch"] | None
    ) -> Float[Tensor, "views batch 2 3"]:
        """Maps from the coordinates of all views to those of their images, both from -1 to 1."""
        draws = self._draws(ids, epoch, aspects)[WINDOW]
        matrices = torch.cat([window_matrix(group.draw(draws, aspects)) for group in self.groups])
        return matrices.view(-1, len(ids), 2, 3)

    def _draws(self, ids: Tensor, epoch: int, aspects: Tensor | None) -> dict[int, Float[Tensor, "draws views batch"]]:
        """The draws of each stage."""
        # Images that are all square take no further draws.
        stages = self.stages | ({} if aspects is None else {MORE: self.window.more_draws})
        keys = [(self.seed, epoch, view) for group in self.groups for view in group.numbers]
        draws = uniform_sequences(ids, keys, _members(tuple(stages.items()), ids.device))
        parts = dict(zip(stages, torch.split(draws, list(stages.values())), strict=True))
        return parts | ({WINDOW: torch.cat([parts[WINDOW], parts[MORE]])} if MORE in parts else {})

    def _views(
        self, group: Windows, pictures: Pictures, index: int, draws: dict[int, Tensor]
    ) -> Float[Tensor, "views batch channels size size"]:
        params = group.draw(draws[WINDOW], pictures.aspects)
        gamma, colour, effects = (
            draws[stage][:, group.numbers.start : group.numbers.stop] for stage in (GAMMA, COLOUR, EFFECTS)
        )
        pixels = pictures.squares[0]
        if pictures.cropped:
            # Each view has pixels of its own.
            pixels, gamma = pictures.squares[index].flatten(0, 1), gamma.reshape(2, 1, -1)
        views = random_gamma(pixels, gamma, self.settings.gamma or 0.0, self.settings.colour_probability)
        views = group.look(views.flatten(0, 1), params, cropped=pictures.cropped)
        views = self.colour.apply_transform(views, self.colour.interpret(colour.flatten(1)), self.colour.flags)
        views = self._effects(views, effects.flatten(1))
        stacked: Tensor = renormalised(views, *self.normalisation).unflatten(0, (len(group.numbers), -1))
        return stacked

    def _windows(self, numbers: range, size: int | None, scale: tuple[float, float] | None) -> Windows:
        assert size is not None
        assert scale is not None
        options = self.settings.model_dump(include=GEOMETRY)
        window = RandomWindow(size, scale=scale, ratio=self.settings.crop_ratio, **options)
        return Windows(numbers, window)

    def _effects(self, views: Tensor, draws: Tensor) -> Tensor:
        """Blur, solarisation and one erased box, in this order; may work in place."""
        settings = self.settings
        if settings.blur:
            low, high = settings.blur_sigma
            sigma, kernel = low + draws[1] * (high - low), max(3, (views.shape[-1] // 10) | 1)
            views = blur(views, draws[0] < settings.blur, sigma, kernel)
        if settings.solarize:
            views = solarize(views, draws[2] < settings.solarize, (0.5 - MEAN) / STD)
        if settings.erase:
            extent = box_extents(draws[4], draws[5], settings.erase_scale, ERASED_RATIO)
            centre = (2 * draws[6:8].T - 1) * (1 - extent)
            views = erase(views, draws[3] < settings.erase, extent, centre, (settings.erase_fill - MEAN) / STD)
        return views


@cache
def _members(stages: tuple[tuple[int, int], ...], device: torch.device) -> Int64[Tensor, " members"]:
    """The members of a sequence that stages draw, from their first one on, copied to a device once."""
    with torch.inference_mode(mode=False):
        return torch.cat([torch.arange(first, first + count) for first, count in stages]).to(device)
