"""Colours and axes of the figures of pages and TensorBoard."""

from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, FIRST, SECOND, THIRD = "#1f2328", "#9aa1a9", "#2f6fb5", "#c9662b", "#3a8f63"


def new_axes(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> tuple[Figure, Axes]:
    """Makes a figure of some inches with one axes in the style of the pages."""
    figure = Figure(figsize=(width, height), layout=layout)
    axes = figure.add_subplot()
    style(axes)
    return figure, axes


def style(axes: Axes) -> None:
    """Gives axes the style of the pages: two spines, faint lines across, small letters."""
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.grid(visible=True, axis="y", color=FAINT, alpha=0.35, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
        spine.set_linewidth(0.6)
