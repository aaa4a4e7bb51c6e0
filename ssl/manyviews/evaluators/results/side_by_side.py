"""Methods side by side: mean and spread over seeds, differences with their intervals, geometry, shared neighbours."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import Bool
from rich.table import Table
from torch import Tensor

from manyviews.evaluators.results.intervals import bootstrap_differences
from manyviews.evaluators.results.measurement import TITLES, Difference, Evaluation, Measurement
from manyviews.evaluators.results.tables import plain_table


@dataclass(frozen=True)
class Row:
    """One kind of features of one method: what each of its runs scored."""

    name: str
    """What the method is called, or a baseline: random weights, raw pixels."""
    runs: tuple[str, ...]
    """The run folders."""
    seeds: tuple[int, ...]
    measured: Mapping[str, tuple[Measurement, ...]]
    """By `title`, one for each run."""
    baseline: bool = False
    hits: Mapping[str, Bool[Tensor, "runs images"]] = field(default_factory=dict, compare=False)
    """By task, of the test images that were asked, which were right, by each run."""

    def values(self, title: str) -> list[float]:
        """The numbers of each run."""
        return [own.value for own in self.measured[title]]

    def to_json(self) -> dict[str, Any]:
        """Everything but the single outcomes, as JSON values."""
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
        return {
            "images": self.images,
            "rows": [row.to_json() for row in self.rows],
            "differences": [asdict(difference) for difference in self.differences],
            "neighbours": self.neighbours,
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
            "notes": list(self.notes),
        }

    def tables(self) -> list[Table]:
        """One table of scores, and where they were looked at, one of geometry and one of shared neighbours."""
        lying = [title for title, own in self.rows[0].measured.items() if own[0].task == "geometry"]
        scored = [title for title in self.rows[0].measured if title not in lying]
        tables = [self._scores(scored)] if scored else []
        tables += [self._geometry(lying)] if lying else []
        return tables + ([self._overlaps()] if self.overlaps else [])

    def verdict(self) -> str:
        """What may be concluded of the methods, a sentence for each and each task."""
        baselines = {row.name for row in self.rows if row.baseline}
        said = [
            f"By {TITLES[difference.task]}, features of {difference.features} {difference}."
            for difference in self.differences
            if difference.features not in baselines
        ]
        return "\n".join(said) or "No difference has an interval, so nothing is said of who is ahead."

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
        measured = [own for row in self.rows for own in row.measured[titles[0]]]
        drawn = " or ".join(dict.fromkeys(f"{own.n:,}" for own in measured))
        shown = plain_table(f"Geometry of the features of {drawn} images, without labels", "features", "dim", *titles)
        for column in shown.columns[2:]:
            column.no_wrap = True
        for row in self.rows:
            digits = [1 if title == "effective rank" else 2 for title in titles]
            spreads = [spread_of(row.values(title), digits=own) for title, own in zip(titles, digits, strict=True)]
            dim = row.measured[titles[0]][0].dim
            shown.add_row(row.name, str(dim), *spreads, style="bold" if row is self.rows[0] else None)
        return shown

    def _overlaps(self) -> Table:
        chance = 100 * self.neighbours / max(self.images - 1, 1)
        title = f"Of the {self.neighbours} nearest images, those in common by the backbone (%; by chance {chance:.1f})"
        names = list(dict.fromkeys(name for own in self.overlaps for name in (own.first, own.second)))
        shares = {(own.first, own.second): own.share for own in self.overlaps}
        shown = plain_table(title, "features of", *names)
        for one in names:
            row = [shares.get((one, other), shares.get((other, one))) for other in names]
            shown.add_row(one, *("–" if share is None else f"{100 * share:.1f}" for share in row))
        return shown


def by_title(evaluation: Evaluation, kind: str, tasks: Collection[str]) -> dict[str, Measurement]:
    """What stands in a table of methods of one kind of features: of each task the metric that leads, by its title.

    Of few labels each mean over the draws, and of geometry all, by their metrics.
    """
    return {
        TITLES[own.task].removesuffix(" probe") if own.leads else own.metric: own
        for own in evaluation.of(*tasks, features=kind)
        if own.leads or own.task in ("fractions", "geometry")
    }


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
