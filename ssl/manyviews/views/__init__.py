"""Augmented views of a batch of images, on its device."""

from manyviews.data.images import Interpolation
from manyviews.views.colour import RandomColour
from manyviews.views.geometry import RandomWindow
from manyviews.views.normalisation import MEAN, STD, normalised, renormalised, restored
from manyviews.views.pipeline import Views, ViewsSettings
from manyviews.views.standard import StandardView, enlarged, standard_view

__all__ = [
    "MEAN",
    "STD",
    "Interpolation",
    "RandomColour",
    "RandomWindow",
    "StandardView",
    "Views",
    "ViewsSettings",
    "enlarged",
    "normalised",
    "renormalised",
    "restored",
    "standard_view",
]
