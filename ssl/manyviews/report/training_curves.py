"""The curves of a run's metrics as small panels: the usual ones first, then whatever else its objective wrote."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from manyviews.report import plots
from manyviews.system.files import spelled


class Kind(NamedTuple):
    """A panel that is shown first: its metrics, its title, and what it means."""

    keys: tuple[str, ...]
    title: str
    meaning: str


KINDS = (
    Kind(("loss",), "loss", "What is minimised. Its height means something only beside runs of the same objective."),
    Kind(
        ("information", "ceiling"),
        "information",
        "What the loss shows of its dashed ceiling, the most that it can; at 0 positives are not told from negatives.",
    ),
    Kind(("knn",), "kNN monitor", "kNN accuracy on held-out labels of training images; higher is better."),
    Kind(("embedding_std",), "spread", "1 where embeddings point everywhere, 0 where they have collapsed to a point."),
    Kind(("effective_rank",), "effective rank", "How many directions the embeddings use; near 1 they are a line."),
    Kind(("positive_similarity",), "similarity of positives", "The mean cosine of two views of an image."),
    Kind(("rate",), "learning rate", "After its schedule."),
    Kind(("images_per_second",), "images per second", "Of training alone."),
)
MOST_PANELS = 100
"""Of other metrics: each takes a moment to draw."""
LEFT_OUT = {"step", "epoch", "seconds", "ceiling"}
"""What other curves are drawn over, or belongs to another panel."""


class Panel(NamedTuple):
    """One small plot."""

    title: str
    last: str
    """The newest value."""
    meaning: str
    svg: Markup


def panels(metrics: Sequence[dict[str, float]]) -> tuple[list[Panel], list[Panel]]:
    """The usual panels, and those of all other metrics; a metric that never was a finite number has none."""
    found = [panel for kind in KINDS if (panel := _panel(metrics, kind)) is not None]
    known = LEFT_OUT.union(*(kind.keys for kind in KINDS))
    others = sorted({key for line in metrics for key in line} - known)[:MOST_PANELS]
    more = [_panel(metrics, Kind((key,), spelled(key.replace("_", " ")), "")) for key in others]
    return found, [panel for panel in more if panel is not None]


def is_thinned(metrics: Sequence[dict[str, float]]) -> bool:
    """Whether some curve has more values than are drawn."""
    return sum("loss" in line for line in metrics) > plots.MOST_POINTS


def _panel(metrics: Sequence[dict[str, float]], kind: Kind) -> Panel | None:
    lines = {}
    for key in kind.keys:
        values = [(line["step"], line[key]) for line in metrics if key in line]
        if any(math.isfinite(value) for _, value in values):
            lines[key.replace("_", " ")] = [step for step, _ in values], [value for _, value in values]
    if not lines or kind.keys[0].replace("_", " ") not in lines:
        return None
    first = next(iter(lines.values()))[1]
    last = next(value for value in reversed(first) if math.isfinite(value))
    newest = f"{100 * last:.1f} %" if kind.keys == ("knn",) else f"{last:.4g}" if abs(last) < 1000 else f"{last:,.0f}"
    svg = plots.as_svg(plots.curves(lines), kind.title)
    return Panel(kind.title, newest, kind.meaning, Markup(svg))
