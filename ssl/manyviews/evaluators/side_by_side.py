"""Methods side by side: mean and spread over seeds, differences with their intervals, geometry, shared neighbours."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import Bool
from rich import box
from rich.table import Table
from torch import Tensor

from manyviews.evaluators.bootstrap import bootstrap_differences
from manyviews.evaluators.geometry import Geometry
from manyviews.evaluators.measurement import LEADING
from manyviews.evaluators.protocol import Task
from manyviews.evaluators.scores import COMPARED, Difference

FIGURES: Mapping[Task, str] = {
    "knn": "kNN",
    "linear": "linear",
    "augmented": "augmented",
    "retrieval": "Recall@1",
    "clustering": "AMI",
    "verification": "verification",
}
"""The figure of each task that stands in the table."""


@dataclass(frozen=True)
class Row:
    """One kind of features of one method: what each of its runs scored."""

    name: str
    """What the method is called, or a baseline: random weights, raw pixels."""
    runs: tuple[str, ...]
    """The run folders."""
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]
    """By figure, from 0 to 1, one for each run."""
    geometry: tuple[Geometry, ...] = ()
    """Of each run; empty where it was not looked at."""
    baseline: bool = False
    hits: Mapping[Task, Bool[Tensor, "runs images"]] = field(default_factory=dict, compare=False)
    """Of the test images that were asked, which were right, by each run."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """By figure, the layer of the encoder that it is of: backbone or embedding; empty for a baseline."""


@dataclass(frozen=True)
class Overlap:
    """How many of an image's nearest neighbours two runs have in common, on average."""

    first: str
    second: str
    share: float


@dataclass(frozen=True)
class Comparison:
    """Methods measured on the same test images, each by one run or by several seeds."""

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    """Of each row but the first from the first; the intervals are those of the paired bootstrap."""
    images: int
    """That were looked at."""
    overlaps: tuple[Overlap, ...] = ()
    """Between the first runs of two methods, and the first two runs of one."""
    neighbours: int = 0
    """How many neighbours the overlaps are of."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the single outcomes, as JSON values."""
        rows = [
            {name: value for name, value in vars(row).items() if name != "hits"}
            | {"geometry": [asdict(own) for own in row.geometry]}
            for row in self.rows
        ]
        return {
            "images": self.images,
            "rows": rows,
            "differences": [asdict(difference) for difference in self.differences],
            "neighbours": self.neighbours,
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
            "notes": list(self.notes),
        }

    def tables(self) -> list[Table]:
        """One table of scores, and where they were looked at, one of geometry and one of shared neighbours."""
        tables = [self._scores()] if self.rows[0].values else []
        if any(row.geometry for row in self.rows):
            tables.append(self._geometry())
        return tables + ([self._overlaps()] if self.overlaps else [])

    def verdict(self) -> str:
        """What may be concluded of the methods, a sentence for each and each figure."""
        baselines = {row.name for row in self.rows if row.baseline}
        said = [
            f"By {COMPARED[difference.method]}, features of {difference.features} {difference}."
            for difference in self.differences
            if difference.features not in baselines
        ]
        return "\n".join(said) or "No difference has an interval, so nothing is said of who is ahead."

    def _scores(self) -> Table:
        first = self.rows[0]
        spread = ", mean ± standard deviation over n runs" if any(len(row.runs) > 1 for row in self.rows) else ""
        origin = f"; differences are from {first.name}" if self.differences else ""
        shown = _table(f"Scores on {self.images:,} test images (%){spread}{origin}", "features", "n", "score")
        shown.columns[2].no_wrap = True
        if self.differences:
            shown.add_column("difference", justify="right", no_wrap=True)
            shown.add_column("95 %", no_wrap=True)
        tasks = {title: task for task, title in FIGURES.items()}
        found = {(own.features, own.method): own for own in self.differences}
        for title in first.values:
            shown.add_section()
            shown.add_row(title, style="italic")
            for row in self.rows:
                layer = f" ({row.layers[title]})" if title in row.layers else ""
                cells = [
                    f"  {row.name.removesuffix(layer)}{layer}",
                    str(len(row.runs)),
                    spread_of([100 * value for value in row.values[title]]),
                ]
                own = found.get((row.name, tasks[title])) if title in tasks else None
                if own is not None:
                    cells += [f"{100 * own.difference:+.1f}", f"{100 * own.low:+.1f} to {100 * own.high:+.1f}"]
                shown.add_row(*cells, style="bold" if row is first else None)
        return shown

    def _geometry(self) -> Table:
        looked_at = [row for row in self.rows if row.geometry]
        drawn = " or ".join(dict.fromkeys(f"{own.images:,}" for row in looked_at for own in row.geometry))
        shown = _table(f"Geometry of the features of {drawn} images, without labels", "features", "dim")
        for name in ("effective rank", "uniformity", "alignment"):
            shown.add_column(name, justify="right", no_wrap=True)
        for row in looked_at:
            aligned = [own.alignment for own in row.geometry if own.alignment is not None]
            shown.add_row(
                row.name,
                str(row.geometry[0].dim),
                spread_of([own.effective_rank for own in row.geometry]),
                spread_of([own.uniformity for own in row.geometry], digits=2),
                spread_of(aligned, digits=2) if aligned else "–",
                style="bold" if row is self.rows[0] else None,
            )
        return shown

    def _overlaps(self) -> Table:
        chance = 100 * self.neighbours / max(self.images - 1, 1)
        title = f"Of the {self.neighbours} nearest images, those in common by the backbone (%; by chance {chance:.1f})"
        names = list(dict.fromkeys(name for own in self.overlaps for name in (own.first, own.second)))
        found = {(own.first, own.second): own.share for own in self.overlaps}
        shown = _table(title, "features of")
        for name in names:
            shown.add_column(name, justify="right")
        for one in names:
            shares = [found.get((one, other), found.get((other, one))) for other in names]
            shown.add_row(one, *("–" if share is None else f"{100 * share:.1f}" for share in shares))
        return shown


def figures_of(record: Mapping[str, Any], kind: str, looks: Collection[str]) -> dict[str, float]:
    """By its title, the figure of each task that a record (evaluation.json) has of a kind of features.

    Of the linear probe with few labels, the mean over the draws.
    """
    found: dict[str, float] = {}
    for score in record.get("scores", ()):
        if score["features"] == kind and score["method"] in looks:
            found[FIGURES[score["method"]]] = score["accuracy"]
    for few in record.get("fractions", {}).get(kind, ()):
        if "fractions" in looks:
            found[few["name"]] = statistics.fmean(few["accuracies"])
    for figures in record.get("figures", ()):
        if figures["features"] == kind and figures["task"] in looks:
            found[FIGURES[figures["task"]]] = figures["values"][LEADING[figures["task"]]]
    return found


def differences(rows: Sequence[Row], *, seed: int) -> tuple[Difference, ...]:
    """How far each row but the first is ahead of it, by every task of which it is known which images were right."""
    found = []
    for task in rows[0].hits:
        intervals = bootstrap_differences([row.hits[task] for row in rows], seed=seed)
        for row, interval in zip(rows[1:], intervals, strict=True):
            found.append(Difference(row.name, rows[0].name, task, *interval))
    return tuple(found)


def spread_of(values: Sequence[float], *, digits: int = 1) -> str:
    """The mean, and where there are several values their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def _table(title: str, *columns: str) -> Table:
    shown = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in shown.columns[1:]:
        column.justify = "right"
    return shown
