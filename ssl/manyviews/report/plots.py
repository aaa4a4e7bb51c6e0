"""Training curves, histograms and maps, as figures and as SVG in the colours of the page."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator
from torch import Tensor

from manyviews.evaluators.drawing import FAINT, FIRST, INK, SECOND, THIRD, new_axes
from manyviews.evaluators.lettering import lettering, shortened
from manyviews.system.files import spelled

SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
THEME = {INK: "ink", FAINT: "faint", FIRST: "first", SECOND: "second", THIRD: "third"}
"""Variables of the page's style that replace these colours, for dark mode."""
PALETTE = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#8f6fc0", "#9c755f"),
    *("#e377a8", "#3aa6b0", "#b5a22e", "#6b86d6", "#c0504d", "#7fae8a"),
)
"""Colours of classes: each is legible on white and on black."""
OTHER = "#8a8f98"
"""The colour of all classes beyond the palette, and of images without a class."""
MOST_POINTS = 300
"""Most points of a curve: more cannot be seen on a screen."""
BINS = 60
CURVE_WIDTH = 3.4
"""Inches."""
TICK_PAD, TICK_LETTER = 8.0, 5.3
"""Width of the margin beside a tick label, and of one of its letters, in points."""
KINDS: Mapping[tuple[str, ...], tuple[str, str]] = {
    ("loss",): ("loss", "The objective's loss. Compare its height between runs of the same objective alone."),
    ("information", "ceiling"): (
        "information",
        "Information that the loss proves, below its dashed ceiling; at 0 positives look like negatives.",
    ),
    ("knn",): ("kNN monitor", "kNN accuracy on held-out labels of training images; higher is better."),
    ("embedding_std",): ("spread", "1 if embeddings point everywhere, 0 if they have collapsed to a point."),
    ("effective_rank",): ("effective rank", "Number of directions that embeddings use; near 1 they are a line."),
    ("positive_similarity",): ("similarity of positives", "The mean cosine of two views of an image."),
    ("rate",): ("learning rate", "After its schedule."),
    ("images_per_second",): ("images per second", "Of training alone."),
}
"""Titles and meanings of the panels that are shown first, by their metrics."""
MOST_PANELS = 100
"""Most panels of other metrics: drawing one takes a moment."""
LEFT_OUT = {"step", "epoch", "seconds", "ceiling"}
"""Metrics without a panel: axes, or part of another panel."""


class Panel(NamedTuple):
    """One small plot of a metric."""

    title: str
    last: str
    meaning: str
    svg: Markup


class Thinned(NamedTuple):
    """A curve of few points, each the mean of a stretch of steps, with its extremes."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def thin(steps: Sequence[float], values: Sequence[float], most: int = MOST_POINTS) -> Thinned:
    """Averages the finite values of a curve over stretches of steps; NaN without any."""
    parts = np.array_split(np.arange(len(steps)), min(most, len(steps))) if len(steps) else []
    rows = []
    for part in parts:
        own = np.asarray([values[index] for index in part if math.isfinite(values[index])])
        step = float(np.mean([steps[index] for index in part]))
        rows.append((step, own.mean(), own.min(), own.max()) if len(own) else (step, *[math.nan] * 3))
    return Thinned(*np.asarray(rows, dtype=np.float64).reshape(-1, 4).T)


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Plots curves over the steps, by name: the first solid, the others dashed; at most three."""
    # An automatic layout would take longer than drawing.
    figure, axes = new_axes(CURVE_WIDTH, 1.9, layout=None)
    for number, ((name, (steps, values)), colour) in enumerate(
        zip(lines.items(), (FIRST, SECOND, THIRD), strict=False)
    ):
        seen = thin(steps, values)
        finite = np.isfinite(seen.mean)
        marker = "o" if finite.sum() <= 12 else None
        style = "--" if number else "-"
        axes.plot(
            seen.steps, seen.mean, color=colour, linewidth=1.4, linestyle=style, label=name, marker=marker, markersize=3
        )
        if len(steps) > len(seen.steps):
            axes.fill_between(seen.steps, seen.low, seen.high, color=colour, alpha=0.18, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    # A margin for the longest tick label.
    formatter = axes.yaxis.get_major_formatter()
    longest = max((len(text) for text in formatter.format_ticks(axes.get_yticks().tolist())), default=0)
    figure.subplots_adjust((TICK_PAD + TICK_LETTER * longest) / (72 * CURVE_WIDTH), 0.13, 0.97, 0.92)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")
    return figure


def histogram(values: Mapping[str, Float[Tensor, " _"]], mark: tuple[str, float] | None = None) -> Figure:
    """Plots the distribution of cosines, each kind with an area of 1, and marks one value."""
    figure, axes = new_axes(5.4, 2.6)
    low = min(float(own.min()) for own in values.values())
    low = math.floor(20 * min(low, mark[1] if mark else 1.0) - 1e-6) / 20
    edges = np.linspace(max(low, -1.0), 1.0, BINS + 1) if low < 1 else np.linspace(0.95, 1.0, BINS + 1)
    for (name, own), colour in zip(values.items(), (FIRST, SECOND, THIRD), strict=False):
        # Rounding puts the cosine of equal features a hair above 1.
        heights, _ = np.histogram(own.clamp(float(edges[0]), 1.0).numpy(), edges, density=True)
        style = "-" if colour == FIRST else "--"
        axes.stairs(heights, edges, color=colour, fill=True, alpha=0.22)
        axes.stairs(heights, edges, color=colour, linewidth=1.3, linestyle=style, label=name)
    if mark is not None:
        axes.axvline(mark[1], color=THIRD, linewidth=1.4, linestyle=":", label=mark[0])
    axes.set_xlabel("cosine of two images' features", color=INK, fontsize=9)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")
    return figure


def roc(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    equal_errors: Mapping[str, float],
    mark: tuple[str, float],
) -> Figure:
    """Plots ROC curves: true accepts over the logarithm of false accepts, by name.

    A point on each curve is its equal error rate, on the dotted line where false accepts equal false rejects; `mark` is
    a vertical line.
    """
    figure, axes = new_axes(6.4, 3.6)
    least = min((rate for rates, _ in curves.values() for rate in rates if rate > 0), default=0.1)
    least = min(least, 0.1)
    chance = np.geomspace(least, 1, 200)
    axes.plot(chance, 1 - chance, color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)))
    for (name, (false, true)), colour, style in zip(
        curves.items(), (FIRST, SECOND, THIRD, FAINT), ("-", "--", "-.", "-"), strict=False
    ):
        # Before the first wrong one, those that are accepted stand at the left end.
        axes.plot(np.maximum(false, least), true, color=colour, linewidth=1.5, linestyle=style)
        error = equal_errors[name]
        axes.plot([max(error, least)], [1 - error], "o", color=colour, markersize=5)
        label = f"{name}: EER {100 * error:.1f} %"
        axes.plot([], [], "o", color=colour, linewidth=1.5, linestyle=style, markersize=5, label=label)
    axes.axvline(max(mark[1], least), color=INK, linewidth=1.1, linestyle=":", label=mark[0])
    axes.set_xscale("log")
    axes.set_xlim(least, 1)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g} %")
    axes.yaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g} %")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("false accept rate", color=INK, fontsize=9)
    axes.set_ylabel("true accept rate", color=INK, fontsize=9)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def scatter(points: Float[Tensor, "points 2"], colours: Sequence[str], names: Mapping[str, str]) -> Figure:
    """Plots a map, a point for each image; `names` are the legend's entries and colours."""
    figure, axes = new_axes(7.0, 5.2)
    axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=9, c=list(colours), linewidths=0, alpha=0.85)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for number, colour in enumerate(names.values()):
        axes.plot([], [], "o", color=colour, markersize=5, label=str(number))
    if names:
        with lettering(names):
            legend = axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
            # Not as labels: matplotlib omits those that begin with an underscore.
            for text, name in zip(legend.get_texts(), names, strict=True):
                text.set_text(shortened(name))
    return figure


def as_svg(figure: Figure, description: str) -> str:
    """Returns a figure as an SVG element with the page's colours and fonts; deterministic."""
    text = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}), warnings.catch_warnings():
        # matplotlib warns if a layout does not fit into a small figure.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(text.getvalue())
    for parent in list(root.iter()):
        # Identifiers would be repeated in every figure of the page.
        if parent.tag == f"{{{SVG}}}g":
            parent.attrib.pop("id", None)
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    width, height = figure.get_size_inches() * 72
    root.attrib.clear()
    root.attrib.update({"class": "plot", "role": "img", "viewBox": f"0 0 {width:g} {height:g}"})
    svg = ElementTree.tostring(root, encoding="unicode")
    for colour, name in THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def panels(metrics: Sequence[dict[str, float]]) -> tuple[list[Panel], list[Panel]]:
    """Plots the panels of `KINDS`, and of all other metrics with a finite value."""
    first = [_panel(metrics, keys, title, meaning) for keys, (title, meaning) in KINDS.items()]
    others = sorted({key for line in metrics for key in line} - LEFT_OUT.union(*KINDS))[:MOST_PANELS]
    more = [_panel(metrics, (key,), spelled(key.replace("_", " ")), "") for key in others]
    return [panel for panel in first if panel is not None], [panel for panel in more if panel is not None]


def is_thinned(metrics: Sequence[dict[str, float]]) -> bool:
    """Returns whether a curve has more values than points."""
    return sum("loss" in line for line in metrics) > MOST_POINTS


def _panel(metrics: Sequence[dict[str, float]], keys: tuple[str, ...], title: str, meaning: str) -> Panel | None:
    lines = {}
    for key in keys:
        values = [(line["step"], line[key]) for line in metrics if key in line]
        if any(math.isfinite(value) for _, value in values):
            lines[key.replace("_", " ")] = [step for step, _ in values], [value for _, value in values]
    if keys[0].replace("_", " ") not in lines:
        return None
    first = next(iter(lines.values()))[1]
    last = next(value for value in reversed(first) if math.isfinite(value))
    newest = f"{100 * last:.1f} %" if keys == ("knn",) else f"{last:.4g}" if abs(last) < 1000 else f"{last:,.0f}"
    return Panel(title, newest, meaning, Markup(as_svg(curves(lines), title)))
