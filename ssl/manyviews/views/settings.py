"""What a view may do to an image, and how that follows from the image's size and channels."""

from typing import Any, Literal

from pydantic import Field, model_validator

from manyviews.config import Settings
from manyviews.views.colour import RandomColour, RandomTone
from manyviews.views.effects import RandomEffects
from manyviews.views.geometry import RandomWindow
from manyviews.views.pipeline import MEAN, STD, Views


class ViewsSettings(Settings):
    """Views of an image: random crops with changed colours; what is null follows the image size and channels."""

    num_views: int = Field(2, ge=1, le=256)
    """Views per image."""
    size: int | None = Field(None, ge=8, le=4096)
    """Side of a view in pixels; null is the size of the data."""
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

    def resolve(self, *, size: int, channels: int) -> "ViewsSettings":
        """The same settings with every null filled in for images of this size and number of channels.

        From 64 pixels on, SimCLR's ImageNet recipe (Chen et al. 2020, appendix A), its crops from 0.2 of the area
        below 160 pixels. Below, its CIFAR recipe (half the colour strength, no blur). Small single-channel images get
        gentle crops, for what they show (a glyph, a garment) fills the picture, and gamma in place of contrast, which
        would lift their black ground (on Fashion-MNIST, gamma is worth two points of kNN accuracy, contrast none).

        Raises:
            ValueError: Colours are to change where there are none.
        """
        view, colours = self.size or size, channels == 3
        strength = 1.0 if view >= 64 else 0.5
        smallest = 0.08 if view >= 160 else 0.2 if view >= 64 or colours else 0.6
        preset: dict[str, Any] = {
            "size": size,
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
        return filled

    def build(self, *, size: int, channels: int, seed: int) -> Views:
        """The views of images of this size and number of channels; `seed` keys every draw.

        Raises:
            ValueError: See `resolve`.
        """
        full = self.resolve(size=size, channels=channels)
        view, crop_scale = full.size, full.crop_scale
        assert view is not None
        assert crop_scale is not None
        tone = RandomTone(full.gamma or 0.0, full.colour_probability)
        window = RandomWindow(
            view,
            scale=crop_scale,
            ratio=full.crop_ratio,
            flip=full.flip,
            vertical_flip=full.vertical_flip,
            rotation=full.rotation,
            translation=full.translation,
            shear=full.shear,
            padding=full.padding,
        )
        colour = RandomColour(
            brightness=full.brightness or 0.0,
            contrast=full.contrast or 0.0,
            saturation=full.saturation or 0.0,
            hue=full.hue or 0.0,
            jitter_probability=full.colour_probability,
            greyscale_probability=full.greyscale or 0.0,
            clip=full.clip,
            white=255.0,
            mean=MEAN,
            std=STD,
        )
        effects = RandomEffects(
            blur=full.blur or 0.0,
            blur_sigma=full.blur_sigma,
            blur_kernel=max(3, (view // 10) | 1),
            solarize=full.solarize,
            middle=(0.5 - MEAN) / STD,
            erase=full.erase,
            erase_scale=full.erase_scale,
            erase_fill=(full.erase_fill - MEAN) / STD,
        )
        return Views(tone, window, colour, effects, num_views=self.num_views, seed=seed)


def enlarged(size: int, stored: int, data: Settings) -> str | None:
    """What is to be known where images are seen larger than they are stored; None where they are not.

    Args:
        size: side of what is seen, in pixels.
        stored: side of the stored images.
        data: where they come from.
    """
    if size <= stored:
        return None
    cure = (
        f"data.size={size} keeps as many pixels of them as the files have"
        if "size" in type(data).model_fields
        else f"these images have no more pixels, and data.size is for folders; a size of {stored} costs less"
    )
    return f"images are enlarged from {stored} to {size} pixels, which adds cost and no detail: {cure}"
