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
NAMES = {"semi_hard": "semi-hard", "within_margin": "within the margin", "distance_weighted": "distance-weighted"}
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
    rows += [(f"{OWN}: {NAMES.get(figures.own, figures.own)}", own, SECOND)] if own is not None else []
    figure = Figure(figsize=(8.4, 1.1 + 0.48 * len(rows)), layout=ConstrainedLayoutEngine(h_pad=0.02, hspace=0.0))
    figure.suptitle(_title(figures), x=0.01, ha="left", color=INK, fontsize=9)
    grid = figure.add_gridspec(len(rows), 2, width_ratios=(1.35, 1))
    uniform = density(torch.from_numpy(MIDDLES), figures.dim).numpy() if figures.dim > 1 else None
    for number, (name, row, colour) in enumerate(rows):
        axes = figure.add_subplot(grid[number, 0])
        _draw_row(axes, name, row, colour, uniform, figures.dim)
        axes.tick_params(labelbottom=number == len(rows) - 1)
        if not number:
            axes.set_title("variance", color=INK, fontsize=8, loc="right")
    axes.set_xlabel("distance of unit embeddings; dashed: q(d) of uniform points", color=INK, fontsize=9)
    _draw_variance(figure.add_subplot(grid[:, 1]), figures)
    return figure


def mean_variance(row: Sequence[int], dim: int) -> float:
    """Mean variance of the gradient's direction over counted distances, under noise of `NOISE`; NaN without any."""
    weights = np.asarray(row, dtype=np.float64)
    return float(gradient_variance(MIDDLES, dim, NOISE) @ weights / weights.sum()) if weights.sum() else float("nan")


def _title(figures: SamplingFigures) -> str:
    part = "" if figures.whole else " of a larger batch"
    directions = "" if figures.normalized else ", not normalised (distances of directions)"
    return f"step {figures.step:,}: {figures.embeddings:,} embeddings{part}, {figures.dim} dimensions{directions}"


def _draw_row(axes: Axes, name: str, row: Sequence[int], colour: str, uniform: np.ndarray | None, dim: int) -> None:
    style(axes)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 2)
    axes.set_xticks(TICKS)
    axes.set_yticks([])
    heights = np.asarray(row, dtype=np.float64)
    if heights.any():
        # Each curve by its own maximum: a narrow one beside a wide one would hide it.
        heights /= heights.max()
        axes.stairs(heights, EDGES, color=colour, fill=True, alpha=0.3)
        axes.stairs(heights, EDGES, color=colour, linewidth=1.0)
    if uniform is not None:
        scaled = uniform / uniform.max()
        axes.plot(MIDDLES, scaled, color=FAINT, linewidth=1.1, linestyle="--")
    axes.set_ylim(0, 1.2)
    variance = mean_variance(row, dim)
    text = "none" if np.isnan(variance) else f"{variance:.2f}"
    axes.set_ylabel(name, rotation="horizontal", color=INK, fontsize=8, ha="right", va="center")
    axes.text(1.02, 0.4, text, transform=axes.transAxes, color=INK, fontsize=8, va="center")


def _draw_variance(axes: Axes, figures: SamplingFigures) -> None:
    style(axes)
    distances = np.linspace(0, 2, 201)
    for noise, linestyle in zip(NOISES, (":", "-", "--"), strict=True):
        variance = gradient_variance(distances, figures.dim, noise)
        axes.plot(distances, variance, color=INK, linestyle=linestyle, linewidth=1.2, label=f"noise {noise:g}")
    if figures.simulated:
        simulated = np.asarray(figures.simulated)
        axes.plot(simulated[:, 0], simulated[:, 1], "o", color=FIRST, markersize=3.5, label=f"simulated, {NOISE:g}")
    axes.set_xlim(0, 2)
    axes.set_xticks(TICKS)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("distance of the negative", color=INK, fontsize=9)
    axes.set_title("variance of the gradient's direction", color=INK, fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
