"""Measurements as tables by task, a row for each kind of features."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

from manyviews.evaluators.results.measurement import THRESHOLD, TITLES, Evaluation, Measurement, label
from manyviews.features.layers import EMBEDDING
from manyviews.system.files import spelled
from manyviews.system.plural import plural

ACCURACIES = (
    "Share of test images that are classified correctly, with its 95 % interval over draws of the test images. k, "
    "temperature T and strength λ were chosen on a part of the training images."
)
GROUPED = {
    "retrieval": "Each test image is a query among all others: are the nearest of its class? Higher is better.",
    "ranking": "All other images, or those listed, are ranked for each query by similarity: do the relevant ones come "
    "first? Means over queries, with bootstrap intervals. NDCG is 100 for the best order, rank correlations are 0 by "
    "chance and 1 at best. Higher is better.",
    "clustering": "Clusters of the features. Against classes: 100 if both agree, 0 by chance (AMI); purity also grows "
    "with the number of clusters. Silhouette: near 1 if clusters are far apart, below 0 if they overlap; largest: the "
    "share of the largest cluster.",
    "verification": "Pairs of images: are both of one class? Judged by one threshold for all, chosen on other folds. "
    "Higher is better, but for the EER, the rate at which as many are wrongly accepted as wrongly rejected.",
    "few_shot": "Episodes of N classes (ways), each known by K images (shots): is another image nearest to its own "
    "class? Mean ± half of the 95 % interval over episodes. Higher is better.",
}
GEOMETRY = {
    "effective rank": "Number of directions that the features use (RankMe), at most the smaller of dim and images. "
    "Higher is better; near 1 the features have collapsed.",
    "uniformity": "How evenly unit features are spread over the sphere: 0 if all are equal, about −4 if they are "
    "everywhere. Lower is better.",
    "alignment": "Mean squared distance of two views of an image: 0 if both have one direction, 2 for unrelated ones. "
    "Lower is better, as long as uniformity is low too.",
}
STALENESS = (
    "Cosine of each row of the memory bank with a fresh embedding of its image: 1 if nothing has moved since the row "
    "was written. Higher is better; a column such as 25 % is that quantile of the cosines."
)
SHORT = {
    "Recall@": "R@",
    "R-precision": "R-prec.",
    " probe": "",
    "TAR@FAR=": "TAR@",
    "Kendall ": "",
    "Spearman ": "",
    "B-cubed ": "B³ ",
    "silhouette": "silh.",
}
"""Abbreviations that make tables fit a terminal of 80 columns."""


class Cell(NamedTuple):
    """A number as text, and its position and interval on the column's scale, in [0, 100]."""

    text: str
    interval: str = ""
    at: float = 0.0
    low: float = 0.0
    high: float = 0.0
    note: str = ""
    """The chosen hyper-parameters, or the standard deviation."""


class Sheet(NamedTuple):
    """A table; its rows are by name, the leading one first."""

    title: str
    meaning: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[tuple[str, str], ...] = ()


def sheets(evaluation: Evaluation) -> list[Sheet]:
    """Returns a table for every task that was measured."""
    tables = []
    for tasks in (("knn", "linear"), ("augmented",)):
        own, balanced = (list(evaluation.of(*tasks, metric=name)) for name in ("accuracy", "balanced accuracy"))
        if own:
            tables.append(_sheet(_accuracy_title(own), ACCURACIES, own, lambda one: TITLES[one.task], dim=True))
        if balanced:
            title = "Balanced accuracy, the mean over the classes (%)"
            tables.append(_sheet(title, "Every class has the same weight.", balanced, lambda one: TITLES[one.task]))
    for task, meaning in GROUPED.items():
        measured = [one for one in evaluation.of(task) if one.metric != THRESHOLD]
        for number, own in enumerate(_tables_of(task, measured)):
            tables.append(_sheet(_grouped_title(own, evaluation), "" if number else meaning, own))
    if own := list(evaluation.of("fractions")):
        draws = len(own[0].details["accuracies"])
        title = f"Linear probe from few labels, mean ± standard deviation over {draws} draws (%)"
        meaning = "Accuracy of the linear probe from a part of the labels; their number follows each part."
        tables.append(_sheet(title, meaning, own, lambda one: f"{one.metric} ({one.n:,})"))
    if own := list(evaluation.of("geometry")):
        drawn = " or ".join(dict.fromkeys(f"{one.n:,}" for one in own))
        title = f"Geometry of the features of {drawn} images, without labels"
        meaning = "Geometry of the features, without labels; to compare runs of one method."
        tables.append(_sheet(title, meaning, own, dim=True)._replace(notes=tuple(GEOMETRY.items())))
    if own := list(evaluation.of("staleness")):
        rows = plural(own[0].n, "row")
        title = f"Staleness of the bank: cosines of {rows} with fresh embeddings, 1 if none is stale"
        tables.append(_sheet(title, STALENESS, own))
    return tables


def _accuracy_title(own: Sequence[Measurement]) -> str:
    first = own[0]
    by = "" if first.distance in (None, "cosine") else f", kNN by {first.distance}"
    train = plural(first.details["num_train"], "labelled training image")
    return f"Accuracy on {plural(first.n, 'test image')}, {train}{by} (%)"


def _grouped_title(own: Sequence[Measurement], evaluation: Evaluation) -> str:
    task, gallery, left_out = own[0].task, evaluation.gallery, own[0].details.get("left_out", 0)
    # The distance of the embedding is named if it is another.
    by, *others = dict.fromkeys(one.distance for one in sorted(own, key=lambda one: one.layer == EMBEDDING))
    by = f"{by}{''.join(f', the embedding by {other}' for other in others)}"
    pairs = f" of {own[0].n:,} pairs" if task == "verification" else ""
    if source := own[0].details.get("pairs"):
        return f"Verification by {by}{pairs} of {spelled(source)} (%)"
    if task == "few_shot":
        return (
            f"Few-shot classification by {by}, {own[0].n:,} episodes among {gallery['images']:,} test images of "
            f"{len(gallery['classes']):,} classes {gallery['origin']} (%)"
        )
    if task == "ranking":
        return _ranking_title(own[0], by)
    if task == "clustering":
        return _clustering_title(own[0], by, evaluation)
    apart = f", {left_out:,} left out that are alone in their class" if left_out else ""
    return (
        f"{task.capitalize()} by {by}{pairs} among {gallery['images']:,} test images of {len(gallery['classes']):,} "
        f"classes {gallery['origin']}{apart} (%)"
    )


def _tables_of(task: str, own: Sequence[Measurement]) -> list[list[Measurement]]:
    """The measurements of a task in tables that fit a terminal: a table for each further k of rankings."""
    ks = list(dict.fromkeys(one.metric.partition("@")[2] for one in own if "@" in one.metric))
    if task != "ranking" or len(ks) < 2:
        return [list(own)] if own else []
    return [[one for one in own if one.metric.endswith(f"@{k}") or (k == ks[0] and "@" not in one.metric)] for k in ks]


def _ranking_title(first: Measurement, by: str) -> str:
    relevant, left_out = spelled(first.details["by"]), first.details.get("left_out")
    if left_out is None:
        return f"Ranking by {by}, {first.n:,} {relevant} (%)"
    apart = f", {left_out:,} left out whose items are all alike" if left_out else ""
    items = f"{plural(first.details['items'], 'item')} each, relevance: {relevant}"
    return f"Ranking by {by} for {plural(first.n, 'query', 'queries')}{apart}, {items} (NDCG in %)"


def _clustering_title(first: Measurement, by: str, evaluation: Evaluation) -> str:
    k, classes = first.details.get("k", "classes"), len(evaluation.gallery["classes"])
    tried = first.details.get("silhouettes", {})
    how = {
        "auto": f"the number of clusters chosen by silhouette among 2 to {max(map(int, tried), default=2)}",
        "threshold": f"merged by {first.details.get('linkage')} linkage up to the threshold",
        "classes": "as many clusters as classes",
    }.get(k, f"{k} clusters")
    of = f" of {classes:,} classes {evaluation.gallery['origin']}" if classes else ""
    return f"Clustering by {by}, {how}, of {first.n:,} images{of} (%; silhouette from −1 to 1)"


def _sheet(
    title: str,
    meaning: str,
    own: Sequence[Measurement],
    column_of: Callable[[Measurement], str] = lambda one: one.metric,
    *,
    dim: bool = False,
) -> Sheet:
    """Groups measurements into a row for each kind of features, each column with its own scale."""
    columns: dict[str, list[Measurement]] = {}
    for one in own:
        columns.setdefault(column_of(one), []).append(one)
    scales = {name: _scale(column) for name, column in columns.items()}
    rows: dict[str, dict[str, Measurement]] = {}
    for one in own:
        rows.setdefault(one.features, {})[column_of(one)] = one
    lines = []
    for kind, row in rows.items():
        cells = [_cell(row[name], scales[name]) if name in row else Cell("–") for name in columns]
        width = [Cell(str(next(iter(row.values())).dim))] if dim else []
        lines.append((label(kind), (*width, *cells)))
    return Sheet(title, meaning, (*(["dim"] if dim else []), *columns), tuple(lines))


def _cell(own: Measurement, scale: tuple[float, float]) -> Cell:
    note = own.choice if own.deviation is None else f"± {100 * own.deviation:.1f}"
    if own.task == "few_shot" and own.low is not None and own.high is not None:
        # As papers do: the half of the interval, not the spread of episodes.
        note = f"± {50 * (own.high - own.low):.1f}"
    if own.low is None or own.high is None or not own.leads:
        return Cell(_text_of(own.task, own.metric, own.value), note=note)
    start, end = scale
    at, low, high = (100 * (number - start) / (end - start) for number in (own.value, own.low, own.high))
    return Cell(f"{100 * own.value:.1f}", f"{100 * own.low:.1f}–{100 * own.high:.1f}", at, low, high, note)


def _text_of(task: str, metric: str, value: float) -> str:
    """Formats a value, in per cent except for geometry and cosines."""
    if task == "staleness":
        return f"{value:.3f}"
    if task == "geometry":
        return f"{value:.1f}" if metric == "effective rank" else f"{value:.2f}"
    if metric.startswith(("CG@", "DCG@", "IDCG@")):
        return f"{value:.2f}"
    if metric in ("Kendall τ-b", "Spearman ρ", "silhouette"):
        return f"{value:.3f}"
    return f"{value:,.0f}" if metric == "clusters" else f"{100 * value:.1f}"


def _scale(own: Sequence[Measurement]) -> tuple[float, float]:
    """Returns the tenths around all intervals."""
    lows, highs = [one.low for one in own if one.low is not None], [one.high for one in own if one.high is not None]
    if not lows:
        return 0.0, 1.0
    low, high = math.floor(10 * min(lows) + 1e-9) / 10, math.ceil(10 * max(highs) - 1e-9) / 10
    return low, max(high, low + 0.1)


def printed(sheet: Sheet) -> Table:
    """Returns a sheet for the terminal, with intervals and choices in columns of their own."""
    shown = plain_table(sheet.title, "features")
    texts = [[name] for name, _ in sheet.rows]
    for number, name in enumerate(sheet.columns):
        column = [cells[number] for _, cells in sheet.rows]
        for long, short in SHORT.items():
            name = name.replace(long, short)
        shown.add_column(name, justify="right", no_wrap=True)
        parts = [[f"{cell.text} {cell.note}".rstrip() for cell in column]]
        if any(cell.interval for cell in column):
            parts = [[cell.text for cell in column], [cell.interval for cell in column]]
            shown.add_column("95 %", no_wrap=True)
            if any(cell.note for cell in column):
                parts.append([cell.note for cell in column])
                shown.add_column("chosen", no_wrap=True)
        for row, own in zip(texts, zip(*parts, strict=True), strict=True):
            row += own
    for index, row in enumerate(texts):
        shown.add_row(*row, style=None if index else "bold")
    return shown


def plain_table(title: str, *columns: str) -> Table:
    """Returns a table with a line below its head and right-aligned numbers."""
    shown = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in shown.columns[1:]:
        column.justify = "right"
    return shown
