"""Views: a batch of images becomes V augmented views of each, on the device, by draws that are a pure function."""

from contrastive.views.colour import RandomColour
from contrastive.views.geometry import RandomWindow
from contrastive.views.pipeline import MEAN, STD, Interpolation, Views, plain
from contrastive.views.settings import ViewsSettings, enlarged

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
