"""The report's section on sampling: distances that were chosen, and shares of easy, semi-hard and hard triples."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from manyviews.evaluators.drawing import FIRST, INK, SECOND, THIRD, new_axes
from manyviews.evaluators.sampling import SamplingFigures
from manyviews.evaluators.sampling_plots import sampling_figure
from manyviews.report.plots import as_svg, thin
from manyviews.run.folder import SAMPLING
from manyviews.system.files import read_json

KINDS = {"easy": THIRD, "semi_hard": FIRST, "hard": SECOND}


def read_sampling(folder: Path) -> SamplingFigures | None:
    """Reads the figures of a run's last picture; None without any, or if they are damaged."""
    file = folder / f"{SAMPLING}.json"
    try:
        return SamplingFigures.model_validate(read_json(file))
    except (OSError, ValueError):
        return None


def sampling_figures_of(folder: Path, metrics: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """Draws what a run has sampled, by name; nothing for objectives that do not sample."""
    figures = {}
    read = read_sampling(folder)
    if read is not None:
        figures["distances"] = sampling_figure(read)
    shares = shares_figure(metrics)
    if shares is not None:
        figures["shares"] = shares
    return figures


def shares_figure(metrics: Sequence[Mapping[str, float]]) -> Figure | None:
    """Stacks the shares of easy, semi-hard and hard triples over the steps; None without them."""
    lines = [line for line in metrics if all(math.isfinite(line.get(kind, math.nan)) for kind in KINDS)]
    if not lines:
        return None
    steps = [line["step"] for line in lines]
    shown = {kind: thin(steps, [line[kind] for line in lines]) for kind in KINDS}
    figure, axes = new_axes(8.4, 2.1)
    along = next(iter(shown.values())).steps
    # One line of metrics is no area.
    across = along if len(along) > 1 else np.asarray([along[0] - 0.5, along[0] + 0.5])
    means = [np.broadcast_to(curve.mean, across.shape) for curve in shown.values()]
    names = [kind.replace("_", "-") for kind in KINDS]
    axes.stackplot(across, *means, colors=list(KINDS.values()), labels=names, alpha=0.55, linewidth=0)
    axes.set_xlim(across[0], across[-1])
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        names[::-1],
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    return figure


def sampling_section(folder: Path, metrics: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Returns the values of the page's section; None without anything to show."""
    figures = sampling_figures_of(folder, metrics)
    drawn = {name: Markup(as_svg(figure, f"sampling, {name}")) for name, figure in figures.items()}
    return {"sampling": {"distances": None, "shares": None, **drawn} if drawn else None}
