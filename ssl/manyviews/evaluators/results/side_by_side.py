"""Tables of several methods: mean and spread over seeds, differences, geometry, neighbours."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import Bool
from rich.table import Table
from torch import Tensor

from manyviews.evaluators.results.intervals import bootstrap_differences
from manyviews.evaluators.results.measurement import TITLES, Difference, Evaluation, Measurement
from manyviews.evaluators.results.tables import Cell, Sheet, plain_table, printed


@dataclass(frozen=True)
class Row:
    """One kind of features of one method: the measurements of each of its runs."""

    name: str
    """Name of the method, or of a baseline: random weights, raw pixels."""
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    measured: Mapping[str, tuple[Measurement, ...]]
    """By title (see `by_title`), one for each run."""
    baseline: bool = False
    hits: Mapping[str, Bool[Tensor, "runs images"]] = field(default_factory=dict, compare=False)
    """By task: whether each tested image was right, for each run."""

    def values(self, title: str) -> list[float]:
        """Returns the value of each run."""
        return [own.value for own in self.measured[title]]

    def to_json(self) -> dict[str, Any]:
        """Returns everything but `hits` as JSON values."""
        layers = {title: own[0].layer for title, own in self.measured.items() if not self.baseline}
        values = {title: self.values(title) for title in self.measured}
        return {
            "name": self.name,
            "runs": list(self.runs),
            "seeds": list(self.seeds),
            "values": values,
            "layers": layers,
            "baseline": self.baseline,
        }


@dataclass(frozen=True)
class Overlap:
    """Mean share of an image's nearest neighbours that two runs have in common."""

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
    overlaps: tuple[Overlap, ...] = ()
    """Between the first runs of two methods, and the first two runs of one."""
    neighbours: int = 0
    notes: tuple[str, ...] = ()
    """Warnings to a reader of the numbers."""

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the rows' `hits` as JSON values."""
        return {
            "images": self.images,
            "rows": [row.to_json() for row in self.rows],
            "differences": [asdict(difference) for difference in self.differences],
            "neighbours": self.neighbours,
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
            "notes": list(self.notes),
        }

    def tables(self) -> list[Table]:
        """Returns the tables of scores, geometry and common neighbours that were measured."""
        geometry = [title for title, own in self.rows[0].measured.items() if own[0].task == "geometry"]
        scores = [title for title in self.rows[0].measured if title not in geometry]
        tables = [self._scores(scores)] if scores else []
        tables += [self._geometry(geometry)] if geometry else []
        return tables + ([self._overlaps()] if self.overlaps else [])

    def verdict(self) -> str:
        """Returns a sentence for each task and method, on its lead over the first method."""
        baselines = {row.name for row in self.rows if row.baseline}
        sentences = [
            f"By {TITLES[difference.task]}, features of {difference.features} {difference}."
            for difference in self.differences
            if difference.features not in baselines
        ]
        return "\n".join(sentences) or "No difference has an interval, so no ranking is claimed."

    def _scores(self, titles: Sequence[str]) -> Table:
        first = self.rows[0]
        spread = ", mean ± standard deviation over n runs" if any(len(row.runs) > 1 for row in self.rows) else ""
        origin = f"; differences are from {first.name}" if self.differences else ""
        shown = plain_table(f"Scores on {self.images:,} test images (%){spread}{origin}", "features", "n", "score")
        shown.columns[2].no_wrap = True
        if self.differences:
            shown.add_column("difference", justify="right", no_wrap=True)
            shown.add_column("95 %", no_wrap=True)
        differences = {(own.features, own.task): own for own in self.differences}
        for title in titles:
            shown.add_section()
            shown.add_row(title, style="italic")
            for row in self.rows:
                measured = row.measured[title][0]
                layer = "" if row.baseline else f" ({measured.layer})"
                cells = [
                    f"  {row.name.removesuffix(layer)}{layer}",
                    str(len(row.runs)),
                    spread_of([100 * value for value in row.values(title)]),
                ]
                own = differences.get((row.name, measured.task))
                if own is not None:
                    cells += [f"{100 * own.difference:+.1f}", f"{100 * own.low:+.1f} to {100 * own.high:+.1f}"]
                shown.add_row(*cells, style="bold" if row is first else None)
        return shown

    def _geometry(self, titles: Sequence[str]) -> Table:
        drawn = dict.fromkeys(f"{own.n:,}" for row in self.rows for own in row.measured[titles[0]])
        rows = []
        for row in self.rows:
            spreads = [spread_of(row.values(title), digits=1 if title == "effective rank" else 2) for title in titles]
            rows.append((row.name, tuple(map(Cell, (str(row.measured[titles[0]][0].dim), *spreads)))))
        title = f"Geometry of the features of {' or '.join(drawn)} images, without labels"
        return printed(Sheet(title, "", ("dim", *titles), tuple(rows)))

    def _overlaps(self) -> Table:
        chance = 100 * self.neighbours / max(self.images - 1, 1)
        title = f"Of the {self.neighbours} nearest images, those in common by the backbone (%; by chance {chance:.1f})"
        names = tuple(dict.fromkeys(name for own in self.overlaps for name in (own.first, own.second)))
        shares = {(own.first, own.second): f"{100 * own.share:.1f}" for own in self.overlaps}
        shares |= {(second, first): share for (first, second), share in shares.items()}
        rows = tuple((one, tuple(Cell(shares.get((one, other), "–")) for other in names)) for one in names)
        return printed(Sheet(title, "", names, rows))


def by_title(evaluation: Evaluation, kind: str, tasks: Collection[str]) -> dict[str, Measurement]:
    """Returns the measurements of a kind that a table of methods shows, by their titles.

    These are the leading metric of each task, every number of labels of `fractions` or of ways and shots of `few_shot`,
    and every metric of `geometry`.
    """
    return {
        TITLES[own.task].removesuffix(" probe") if own.leads else own.metric: own
        for own in evaluation.of(*tasks, features=kind)
        if own.leads or own.task in ("fractions", "few_shot", "geometry")
    }


def differences(rows: Sequence[Row], *, seed: int) -> tuple[Difference, ...]:
    """Returns the lead of each later row over the first, for tasks with results by image."""
    leads = []
    for task in rows[0].hits:
        intervals = bootstrap_differences([row.hits[task] for row in rows], seed=seed)
        for row, interval in zip(rows[1:], intervals, strict=True):
            leads.append(Difference(row.name, rows[0].name, task, *interval))
    return tuple(leads)


def spread_of(values: Sequence[float], *, digits: int = 1) -> str:
    """Formats the mean, and the standard deviation of several values."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"
