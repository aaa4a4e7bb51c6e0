"""Scores as a page shows them: numbers in per cent as in the printed tables, intervals as bars on a common scale."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from manyviews.evaluators.kinds import label
from manyviews.evaluators.measurement import LEADING, Figures, distances
from manyviews.evaluators.scores import TITLES, Evaluation, Score
from manyviews.report.findings import Findings
from manyviews.system.plural import plural

GROUPED = {
    "retrieval": "Each test image is looked up among all others: is what it finds of its class? Higher is better.",
    "clustering": "k-means on the features, compared with the classes: 100 where both agree, 0 by chance (AMI).",
    "verification": "Pairs of test images: are both of one class? Judged by one threshold for all. Higher is better.",
}
GEOMETRY = {
    "effective rank": "How many directions the features use (RankMe), at most the smaller of dim and images. Higher is "
    "better; near 1 the features have collapsed.",
    "uniformity": "How evenly unit features are spread over the sphere: 0 where all are one, about −4 where they are "
    "everywhere. Lower is better.",
    "alignment": "The mean squared distance of two views of an image: 0 where both have one direction, 2 for unrelated "
    "ones. Lower is better, as long as uniformity is low too.",
}


class Cell(NamedTuple):
    """A number, and where it lies with its interval between the ends of the column's scale, in [0, 100]."""

    text: str
    interval: str = ""
    at: float = 0.0
    low: float = 0.0
    high: float = 0.0
    note: str = ""
    """What was chosen."""


class Row(NamedTuple):
    """One kind of features."""

    name: str
    cells: tuple[Cell, ...]


class Sheet(NamedTuple):
    """A table: its title, what it means, the names of its columns, and its rows, the learned features first."""

    title: str
    meaning: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[tuple[str, str], ...] = ()
    """What each column means."""


def sheets(findings: Findings) -> list[Sheet]:
    """Every table of scores that there is something for."""
    found = []
    if findings.evaluation is not None:
        found += _accuracies(findings.evaluation) + _figures(findings.evaluation)
    found += _fractions(findings) + _geometry(findings) + _staleness(findings)
    for also in findings.also:
        own = findings._replace(also=(), **{name: value for name, value in also._asdict().items() if name != "title"})
        found += [sheet._replace(title=f"With {also.title}: {sheet.title}") for sheet in sheets(own)]
    return found


def _accuracies(evaluation: Evaluation) -> list[Sheet]:
    if not evaluation.scores:
        return []
    first = evaluation.scores[0]
    methods = [method for method in TITLES if any(score.method == method for score in evaluation.scores)]
    rows = []
    for kind in dict.fromkeys(score.features for score in evaluation.scores):
        own = {score.method: score for score in evaluation.scores if score.features == kind}
        cells = [Cell(f"{next(iter(own.values())).dim:,}")]
        for method in methods:
            scores = [score for score in evaluation.scores if score.method == method]
            scale = _scale([score.low for score in scores], [score.high for score in scores])
            score = own.get(method)
            cells.append(
                Cell("–") if score is None else _cell(score.accuracy, (score.low, score.high), scale, _note(score))
            )
        rows.append(Row(label(kind), tuple(cells)))
    meaning = (
        "The share of test images whose class is found, with its 95 % interval over draws of the test images. "
        "k, temperature T and strength λ were chosen on a part of the training images."
    )
    columns = ("dim", *(TITLES[method] for method in methods))
    return [Sheet(evaluation.accuracy_title(first), meaning, columns, tuple(rows))]


def _note(score: Score) -> str:
    balanced = "" if score.balanced is None else f"; balanced {100 * score.balanced:.1f}"
    return f"{score.choice}{balanced}"


def _figures(evaluation: Evaluation) -> list[Sheet]:
    found = []
    for task in dict.fromkeys(figures.task for figures in evaluation.figures):
        own = [figures for figures in evaluation.figures if figures.task == task]
        names = tuple(own[0].values)
        scales = {name: _scale_of(own, name) for name in names}
        rows = []
        for figures in own:
            cells = []
            for name in names:
                text = f" ± {100 * figures.deviations[name]:.1f}" if name in figures.deviations else ""
                interval = figures.intervals.get(name) if name == LEADING[task] else None
                cells.append(_cell(figures.values[name], interval, scales[name])._replace(note=text.strip()))
            rows.append(Row(label(figures.features), tuple(cells)))
        gallery = evaluation.gallery
        among = f"{gallery['images']:,} test images of {len(gallery['classes']):,} classes {gallery['origin']}"
        title = f"{task.capitalize()} by {distances(own)} among {among} (%)"
        left_out = own[0].counts.get("left_out", 0)
        apart = f" {left_out:,} images are left out that are alone in their class." if left_out else ""
        found.append(Sheet(title, GROUPED[task] + apart, names, tuple(rows)))
    return found


def _fractions(findings: Findings) -> list[Sheet]:
    results = {kind: own for kind, own in findings.fractions.items() if own}
    if not results:
        return []
    first = next(iter(results.values()))
    columns = tuple(f"{result.name} ({plural(result.images, 'image')})" for result in first)
    rows = []
    for kind, own in results.items():
        cells = []
        for result in own:
            spread = f"± {100 * result.deviation:.1f}" if len(result.accuracies) > 1 else ""
            cells.append(Cell(f"{100 * result.mean:.1f}", note=spread))
        rows.append(Row(label(kind), tuple(cells)))
    draws = len(first[0].accuracies)
    meaning = f"The linear probe's accuracy from a part of the labels: mean ± standard deviation over {draws} draws."
    return [Sheet("Few labels (%)", meaning, columns, tuple(rows))]


def _geometry(findings: Findings) -> list[Sheet]:
    if not findings.geometry:
        return []
    rows = []
    for own in findings.geometry:
        alignment = "–" if own.alignment is None else f"{own.alignment:.2f}"
        texts = (f"{own.images:,}", f"{own.dim:,}", f"{own.effective_rank:.1f}", f"{own.uniformity:.2f}", alignment)
        rows.append(Row(label(own.features), tuple(map(Cell, texts))))
    meaning = "How the features lie, without a look at labels: compare runs of one method by it."
    columns = ("images", "dim", *GEOMETRY)
    return [Sheet("Geometry", meaning, columns, tuple(rows), tuple(GEOMETRY.items()))]


def _staleness(findings: Findings) -> list[Sheet]:
    stale = findings.staleness
    if stale is None:
        return []
    cells = [
        Cell(f"{stale.images:,}"),
        Cell(f"{stale.mean:.3f}"),
        *(Cell(f"{at:.3f}") for at in stale.quantiles.values()),
    ]
    meaning = (
        "The cosine of each row of the memory bank with a fresh embedding of its image: 1 where nothing has moved "
        "since the row was written. Higher is better; a column such as 25 % says how near that share of the rows is at "
        "most."
    )
    return [Sheet("Staleness of the bank", meaning, ("rows", "mean", *stale.quantiles), (Row("bank", tuple(cells)),))]


def _cell(value: float, interval: tuple[float, float] | None, scale: tuple[float, float], note: str = "") -> Cell:
    text = f"{100 * value:.1f}"
    if interval is None:
        return Cell(text, note=note)
    start, end = scale
    at, low, high = (100 * (number - start) / (end - start) for number in (value, *interval))
    return Cell(text, f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}", at, low, high, note)


def _scale_of(own: Sequence[Figures], name: str) -> tuple[float, float]:
    intervals = [figures.intervals[name] for figures in own if name in figures.intervals]
    return _scale([low for low, _ in intervals], [high for _, high in intervals]) if intervals else (0.0, 1.0)


def _scale(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """Full tenths around all intervals."""
    low, high = math.floor(10 * min(lows) + 1e-9) / 10, math.ceil(10 * max(highs) - 1e-9) / 10
    return low, max(high, low + 0.1)
