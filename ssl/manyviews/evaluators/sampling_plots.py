"""Draws the distances that samplers choose, and the variance of the gradient: figures 2 and 3 of Wu et al. 2017."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from manyviews.evaluators.drawing import FAINT, FIRST, INK, SECOND, THIRD, style
from manyviews.evaluators.sampling import BINS, NOISE, OWN, SamplingFigures, gradient_variance
from manyviews.objectives.mining import density

NOISES = (0.1, NOISE, 1.0)
EDGES = np.linspace(0, 2, BINS + 1)
TICKS = (0, 0.5, 1, 1.5, 2)
MIDDLES = (EDGES[1:] + EDGES[:-1]) / 2


def sampling_figure(figures: SamplingFigures) -> Figure:
    """Draws a row for the positives, the negatives and each sampler's choice, and the variance beside them."""
    rows: list[tuple[str, Sequence[int], str]] = [
        ("positives", figures.positives, THIRD),
        ("all negatives", figures.negatives, FIRST),
        *((name, own, FIRST) for name, own in figures.chosen.items() if name != OWN),
    ]
    own = figures.chosen.get(OWN)
    rows += [(f"{OWN}: {figures.own.replace('_', ' ')}", own, SECOND)] if own is not None else []
    figure = Figure(figsize=(7.6, 0.9 + 0.5 * len(rows)), layout=ConstrainedLayoutEngine(h_pad=0.02, hspace=0.0))
    grid = figure.add_gridspec(len(rows), 2, width_ratios=(1.45, 1))
    uniform = density(torch.from_numpy(MIDDLES), figures.dim).numpy() if figures.dim > 1 else None
    for number, (name, row, colour) in enumerate(rows):
        axes = figure.add_subplot(grid[number, 0])
        _draw_row(axes, name, row, colour, uniform, figures.dim)
        axes.tick_params(labelbottom=number == len(rows) - 1)
        if not number:
            axes.set_title(_title(figures), color=INK, fontsize=9, loc="left")
            axes.text(0.99, 0.62, "= variance", transform=axes.transAxes, color=INK, fontsize=7, va="top", ha="right")
    if uniform is not None:
        axes.legend(frameon=False, fontsize=7, labelcolor=INK, loc="center left", borderaxespad=0)
    axes.set_xlabel("distance of unit embeddings", color=INK, fontsize=9)
    _draw_variance(figure.add_subplot(grid[:, 1]), figures)
    return figure


def mean_variance(row: Sequence[int], dim: int) -> float:
    """Mean variance of the gradient's direction over counted distances, under noise of `NOISE`; NaN without any."""
    weights = np.asarray(row, dtype=np.float64)
    return float(gradient_variance(MIDDLES, dim, NOISE) @ weights / weights.sum()) if weights.sum() else float("nan")


def _title(figures: SamplingFigures) -> str:
    part = "" if figures.whole else " of a larger batch"
    directions = "" if figures.normalized else ", compared by length too"
    return f"step {figures.step:,}: {figures.embeddings:,} embeddings{part}, {figures.dim} dimensions{directions}"


def _draw_row(axes: Axes, name: str, row: Sequence[int], colour: str, uniform: np.ndarray | None, dim: int) -> None:
    style(axes)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 2)
    axes.set_xticks(TICKS)
    axes.set_yticks([])
    heights, top = np.asarray(row, dtype=np.float64), 1.0
    if heights.sum():
        heights *= BINS / (2 * heights.sum())
        top = max(top, heights.max())
        axes.stairs(heights, EDGES, color=colour, fill=True, alpha=0.3)
        axes.stairs(heights, EDGES, color=colour, linewidth=1.0)
    if uniform is not None:
        axes.plot(MIDDLES, uniform, color=FAINT, linewidth=1.1, linestyle="--", label="q(d), uniform")
        top = max(top, float(uniform[1:-1].max()))
    axes.set_ylim(0, 1.15 * top)
    variance = mean_variance(row, dim)
    text = "none" if np.isnan(variance) else f"{variance:.2f}"
    axes.text(0.01, 0.9, name, transform=axes.transAxes, color=INK, fontsize=8, va="top")
    axes.text(0.99, 0.9, text, transform=axes.transAxes, color=INK, fontsize=8, va="top", ha="right")


def _draw_variance(axes: Axes, figures: SamplingFigures) -> None:
    style(axes)
    distances = np.linspace(0, 2, 201)
    for noise, linestyle in zip(NOISES, (":", "-", "--"), strict=True):
        variance = gradient_variance(distances, figures.dim, noise)
        axes.plot(distances, variance, color=INK, linestyle=linestyle, linewidth=1.2, label=f"noise {noise:g}")
    if figures.simulated:
        found = np.asarray(figures.simulated)
        axes.plot(found[:, 0], found[:, 1], "o", color=FIRST, markersize=3.5, label=f"simulated, {NOISE:g}")
    axes.set_xlim(0, 2)
    axes.set_xticks(TICKS)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("distance of the negative", color=INK, fontsize=9)
    axes.set_title("variance of the gradient's direction", color=INK, fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
