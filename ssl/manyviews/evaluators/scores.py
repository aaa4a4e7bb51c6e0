"""What was measured: features beside their baselines, by one protocol, and what may be concluded from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from jaxtyping import Int64
from rich import box
from rich.table import Table
from torch import Tensor

from manyviews.evaluators import measurement as tell
from manyviews.evaluators.kinds import EMBEDDED, is_learned, label
from manyviews.evaluators.learned_distance import Cosine, Metric
from manyviews.evaluators.measurement import Figures
from manyviews.evaluators.protocol import ProtocolSettings, Task
from manyviews.system.plural import plural

Method = Literal["knn", "linear", "augmented"]
TITLES: Mapping[Method, str] = {"knn": "kNN", "linear": "linear probe", "augmented": "augmented probe"}
COMPARED: Mapping[Task, str] = {
    "knn": "kNN",
    "linear": "linear probe",
    "augmented": "augmented probe",
    "retrieval": "Recall@1",
    "verification": "verification",
}
"""What features are compared with their baselines by: figures whose paired difference has an interval."""


@dataclass(frozen=True)
class Score:
    """The accuracy of one kind of features by one method on the test images, read once."""

    features: str
    method: Method
    accuracy: float
    low: float
    """Lower end of the 95 % interval (Wilson) over draws of the test images."""
    high: float
    validation: float
    """Accuracy on the held-out training images, by which the choice was made; NaN without a choice."""
    num_train: int
    num_test: int
    dim: int
    neighbours: int | None = None
    temperature: float | None = None
    regularisation: float | None = None
    rate: float | None = None
    decay: float | None = None
    layer: str | None = None
    """Of the encoder: backbone or embedding; None for raw pixels."""
    metric: str | None = None
    """The distance by which neighbours were searched; None where none were."""
    balanced: float | None = None
    """The mean of the accuracies on each class, where classes are of unequal size."""

    @property
    def choice(self) -> str:
        """What was chosen, in a few characters."""
        if self.method == "knn":
            return f"k {self.neighbours}, T {self.temperature:g}"
        if self.method == "augmented":
            return f"rate {self.rate:g}, decay {self.decay:g}"
        return f"λ {self.regularisation:g}"


@dataclass(frozen=True)
class Difference:
    """How far the first kind of features is ahead of a baseline, by one method, on the same test images."""

    features: str
    baseline: str
    method: Task
    difference: float
    low: float
    """Lower end of the 95 % interval: of paired proportions (Agresti and Min 2005) within a run, else by bootstrap."""
    high: float

    def __str__(self) -> str:
        """The difference in words."""
        points = f"{100 * abs(self.difference):.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        baseline = label(self.baseline)
        if self.low > 0:
            return f"beat {baseline} by {points}"
        if self.high < 0:
            return f"fall behind {baseline} by {points}"
        if not round(1000 * self.difference):
            return f"cannot be told from {baseline}: equal ({100 * self.low:+.1f} to {100 * self.high:+.1f} points)"
        sign = "ahead" if self.difference > 0 else "behind"
        return f"cannot be told from {baseline}: {sign} by {points}"


@dataclass(frozen=True)
class Evaluation:
    """All scores, and the differences between the first kind of features and each of the others."""

    protocol: ProtocolSettings
    metric: Metric
    scores: tuple[Score, ...]
    figures: tuple[Figures, ...]
    differences: tuple[Difference, ...]
    gallery: Mapping[str, Any]
    """How many images were compared with each other, of which classes (by number), and what is to be said of these."""
    predictions: Mapping[str, Int64[Tensor, " images"]] = field(default_factory=dict, compare=False)
    """The class of each test image by "knn/learned" and so on; −1 where its own is not known."""
    hits: Mapping[str, Int64[Tensor, " images"]] = field(default_factory=dict, compare=False)
    """Of each test image, by "knn/learned", "retrieval/learned" and so on: 1 right, 0 wrong, −1 not asked."""

    def verdict(self) -> str:
        """What may be concluded, in one sentence: where the features win, where they lose, where nobody can tell."""
        kinds = {score.features for score in self.scores} | {figures.features for figures in self.figures}
        baselines = [difference for difference in self.differences if not is_learned(difference.baseline)]
        if not self.differences:
            if len(kinds) < 2:
                return "There is no baseline to compare with."
            return "Clustering alone has no interval, so nothing is said of who is ahead."
        if not baselines:
            opening = "There is no baseline to compare with"
        elif all(difference.low > 0 for difference in baselines):
            opening = "Ahead of every baseline"
        elif all(difference.high < 0 for difference in baselines):
            opening = "Behind every baseline"
        else:
            opening = "Not ahead of every baseline"
        parts = []
        for method, title in COMPARED.items():
            by_kind: dict[str, list[str]] = {}
            for difference in self.differences:
                if difference.method == method:
                    by_kind.setdefault(difference.features, []).append(str(difference))
            for kind, found in by_kind.items():
                # The layer is named where there are two.
                own = label(kind) if EMBEDDED in kinds else kind
                parts.append(f"by {title}, {own} features {' and '.join(found)}")
        return f"{opening}: {'; '.join(parts)}."

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; a validation accuracy without a choice is null."""
        scores = [asdict(score) for score in self.scores]
        for score in scores:
            score["validation"] = None if math.isnan(score["validation"]) else score["validation"]
        return {
            "protocol": self.protocol.model_dump(mode="json"),
            "metric": self.metric.model_dump(mode="json"),
            "scores": scores,
            "gallery": dict(self.gallery),
            "figures": [asdict(figures) for figures in self.figures],
            "differences": [asdict(difference) for difference in self.differences],
            "verdict": self.verdict(),
        }

    def tables(self) -> list[Table]:
        """A table of kNN and linear probe, one of the augmented probe, one of each task that compares test images."""
        tables = []
        for beside in (("knn", "linear"), ("augmented",)):
            scores = [score for score in self.scores if score.method in beside]
            tables += [self._accuracies(scores)] if scores else []
            tables += [_balanced(scores)] if any(score.balanced is not None for score in scores) else []
        for task in dict.fromkeys(figures.task for figures in self.figures):
            own = [figures for figures in self.figures if figures.task == task]
            tables.append(tell.table(self._title(own), own))
        return tables

    def _title(self, own: Sequence[Figures]) -> str:
        first = own[0]
        pairs = f" of {first.counts['pairs']:,} pairs" if "pairs" in first.counts else ""
        left_out = first.counts.get("left_out", 0)
        apart = f", {left_out:,} left out that are alone in their class" if left_out else ""
        return (
            f"{first.task.capitalize()} by {tell.distances(own)}{pairs} among {self.gallery['images']:,} test images "
            f"of {len(self.gallery['classes'])} classes {self.gallery['origin']}{apart} (%)"
        )

    def accuracy_title(self, first: Score) -> str:
        """What the table of accuracies is called, by one of them."""
        by = "" if isinstance(self.metric, Cosine) else f", kNN by {self.metric.name}"
        test, train = plural(first.num_test, "test image"), plural(first.num_train, "labelled training image")
        return f"Accuracy on {test}, {train}{by} (%)"

    def _accuracies(self, scores: Sequence[Score]) -> Table:
        first = scores[0]
        title = self.accuracy_title(first)
        table = Table("features", "dim", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.columns[1].justify = "right"
        methods = [method for method in TITLES if any(score.method == method for score in scores)]
        for method in methods:
            table.add_column(TITLES[method].split()[0], justify="right", no_wrap=True)
            table.add_column("95 %", no_wrap=True)
            table.add_column("chosen", no_wrap=True)
        for kind in dict.fromkeys(score.features for score in scores):
            own = {score.method: score for score in scores if score.features == kind}
            cells = [label(kind), str(next(iter(own.values())).dim)]
            for method in methods:
                score = own.get(method)
                if score is None:
                    cells += ["–", "", ""]
                    continue
                cells += [f"{100 * score.accuracy:.1f}", f"{100 * score.low:.1f}–{100 * score.high:.1f}", score.choice]
            table.add_row(*cells, style="bold" if kind == first.features else None)
        return table


def _balanced(scores: Sequence[Score]) -> Table:
    """Each class counts as much as another: the accuracies where classes are of unequal size."""
    title = "Balanced accuracy, the mean over the classes (%)"
    table = Table("features", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    methods = [method for method in TITLES if any(score.method == method for score in scores)]
    for method in methods:
        table.add_column(TITLES[method].split()[0], justify="right", no_wrap=True)
    for kind in dict.fromkeys(score.features for score in scores):
        own = {score.method: score.balanced for score in scores if score.features == kind}
        numbers = [own.get(method) for method in methods]
        cells = ["–" if number is None else f"{100 * number:.1f}" for number in numbers]
        table.add_row(label(kind), *cells, style="bold" if kind == scores[0].features else None)
    return table
