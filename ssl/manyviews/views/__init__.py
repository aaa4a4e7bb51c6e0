"""Views: a batch of images becomes V augmented views of each, on the device, by draws that are a pure function."""

from manyviews.views.colour import RandomColour
from manyviews.views.geometry import RandomWindow
from manyviews.views.pipeline import MEAN, STD, Interpolation, Views, ViewsSettings, enlarged, plain

__all__ = [
    "MEAN",
    "STD",
    "Interpolation",
    "RandomColour",
    "RandomWindow",
    "Views",
    "ViewsSettings",
    "enlarged",
    "plain",
]
