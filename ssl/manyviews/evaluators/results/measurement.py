"""What was measured: one record for every number, and what may be concluded from all of them together."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from manyviews.evaluators.results.kinds import EMBEDDED, is_learned, label

TITLES: Mapping[str, str] = {
    "knn": "kNN",
    "linear": "linear probe",
    "augmented": "augmented probe",
    "retrieval": "Recall@1",
    "clustering": "AMI",
    "verification": "verification",
}
"""The tasks that take labels, and what the metric that leads each is called beside those of others."""
LEADING: Mapping[str, str] = {**dict.fromkeys(TITLES, "accuracy"), "retrieval": "Recall@1", "clustering": "AMI"}
"""The metric of each of these tasks by which features are compared with their baselines, where it has an interval."""
TASKS = (*TITLES, "fractions", "geometry", "staleness")
"""All tasks, in the order in which their results stand."""
CHOICES: Mapping[str, str] = {
    "neighbours": "k",
    "temperature": "T",
    "regularisation": "λ",
    "rate": "rate",
    "decay": "decay",
}
"""The hyper-parameters that a task chooses, by their name among the details, and as tables call them."""


@dataclass(frozen=True)
class Measurement:
    """One number that one task measured on one kind of features."""

    task: str
    """One of `TASKS`."""
    features: str
    metric: str
    """Its usual name: accuracy, Recall@1, MAP@R, AMI, TAR@FAR=0.01, effective rank; of few labels, how many."""
    value: float
    """Accuracies and the like are shares from 0 to 1."""
    low: float | None = None
    """Lower end of the 95 % interval over draws of the test images; None where the number has none."""
    high: float | None = None
    n: int = 0
    """How many images, queries, pairs or rows it is of; of few labels, how many."""
    deviation: float | None = None
    """The standard deviation, where it is the mean of folds or draws."""
    dim: int | None = None
    layer: str | None = None
    """Of the encoder: backbone or embedding; None for raw pixels."""
    distance: str | None = None
    """The distance by which neighbours were searched; None where none were."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What was chosen, and by which validation accuracy; how many images were learned from, or left out; each draw."""

    @property
    def leads(self) -> bool:
        """Whether features are compared by it."""
        return self.metric == LEADING.get(self.task)

    @property
    def choice(self) -> str:
        """What was chosen, in a few characters."""
        return ", ".join(f"{CHOICES[name]} {value:g}" for name, value in self.details.items() if name in CHOICES)


@dataclass(frozen=True)
class Difference:
    """How far one kind of features is ahead of another by the leading metric of a task, on the same test images."""

    features: str
    baseline: str
    task: str
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
    """All measurements of a run and its baselines on the same images, and the differences between them."""

    measurements: tuple[Measurement, ...] = ()
    differences: tuple[Difference, ...] = ()
    """Between the first kind of features and each of the others."""
    gallery: Mapping[str, Any] = field(default_factory=dict)
    """How many images were compared with each other, of which classes (by number), and what is to be said of these."""
    predictions: Mapping[str, Int64[Tensor, " images"]] = field(default_factory=dict, compare=False)
    """The class of each test image by "knn/learned" and so on; −1 where its own is not known."""
    hits: Mapping[str, Int64[Tensor, " images"]] = field(default_factory=dict, compare=False)
    """Of each test image, by "knn/learned", "retrieval/learned" and so on: 1 right, 0 wrong, −1 not asked."""

    def of(self, *tasks: str, features: str | None = None, metric: str | None = None) -> Iterator[Measurement]:
        """The measurements of some tasks, of one kind of features or of all, by one metric or by all."""
        for own in self.measurements:
            if own.task in tasks and features in (None, own.features) and metric in (None, own.metric):
                yield own

    def verdict(self) -> str:
        """What may be concluded, in one sentence: where the features win, where they lose, where nobody can tell.

        Empty where nothing was compared with labels.
        """
        kinds = {own.features for own in self.of(*TITLES)}
        if not kinds:
            return ""
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
        sentences: dict[tuple[str, str], list[str]] = {}
        for difference in sorted(self.differences, key=lambda own: TASKS.index(own.task)):
            sentences.setdefault((difference.task, difference.features), []).append(str(difference))
        parts = [
            # The layer is named where there are two.
            f"by {TITLES[task]}, {label(kind) if EMBEDDED in kinds else kind} features {' and '.join(said)}"
            for (task, kind), said in sentences.items()
        ]
        return f"{opening}: {'; '.join(parts)}."

    def to_json(self) -> dict[str, Any]:
        """Everything but what is known of each image, as JSON values."""
        record: dict[str, Any] = {"measurements": [asdict(own) for own in self.measurements]}
        if any(self.of(*TITLES)):
            record |= {"gallery": dict(self.gallery), "differences": [asdict(own) for own in self.differences]}
            record["verdict"] = self.verdict()
        return record
