"""A look at a run's features: what is found alike, what is mistaken for what, and figures of both."""

from collections.abc import Mapping
from typing import NamedTuple

from matplotlib.figure import Figure

from manyviews.evaluators.confusion import confusion_figure
from manyviews.report import plots
from manyviews.report.confusion import Confusion, confusion
from manyviews.report.findings import Findings, drawn, labels_of
from manyviews.report.hover_map import MOST, TITLES, legend
from manyviews.report.neighbours import Query, Searched, look_alikes, queries, searched
from manyviews.report.similarities import similarities


class Look(NamedTuple):
    """What the page and TensorBoard both show."""

    random: tuple[Query, ...]
    wrong: tuple[Query, ...]
    """Images that kNN, or else retrieval, got wrong."""
    alike: tuple[Query, ...]
    """Mistakes beside the image of another class that they are most like."""
    searched: Searched
    """Where the neighbours come from."""
    confusion: Confusion | None
    matrix: Figure | None
    """The confusions as a figure, where the classes are few."""
    histogram: Figure | None
    views_at: float | None
    """The mean cosine of two views of one image."""
    maps: Mapping[str, Figure]
    """The 2-D maps by title."""


def look(findings: Findings, seed: int) -> Look:
    """Looks at the learned features; whatever is drawn follows from the seed."""
    random, wrong = queries(findings, seed)
    mistaken = confusion(findings)
    matrix = None
    if mistaken is not None and mistaken.counts is not None:
        matrix = confusion_figure(mistaken.counts, [findings.class_name(number) for number in mistaken.classes])
    views_at = _views_at(findings)
    pairs = similarities(findings.features[findings.kind][1], findings.shown.labels, seed)
    mark = None if views_at is None else ("two views of an image", views_at)
    return Look(
        random,
        wrong,
        look_alikes(findings, seed),
        searched(findings),
        mistaken,
        matrix,
        plots.histogram(pairs, mark) if pairs else None,
        views_at,
        _maps(findings, seed),
    )


def _views_at(findings: Findings) -> float | None:
    alignment = next(findings.evaluation.of("geometry", features=findings.kind, metric="alignment"), None)
    # Of unit features the squared distance is 2 − 2 cos.
    return None if alignment is None else 1 - alignment.value / 2


def _maps(findings: Findings, seed: int) -> dict[str, Figure]:
    found = {}
    for method, (ids, points) in findings.points.items():
        rows = (points.isfinite().all(1)).nonzero().squeeze(1)
        if not len(rows):
            continue
        rows = drawn(rows, MOST, seed, 7)
        groups, of_each = legend(findings, labels_of(findings.shown)[ids[rows]])
        colours = [groups[group].colour for group in of_each.tolist()] if groups else [plots.PALETTE[0]] * len(rows)
        names = {group.name: group.colour for group in groups}
        found[TITLES.get(method, method)] = plots.scatter(points[rows].float(), colours, names)
    return found
