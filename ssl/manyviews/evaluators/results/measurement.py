"""Measurements, the kinds of features they are of, and the verdict over all of them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from jaxtyping import Float, Int64
from torch import Tensor

from manyviews.evaluators.relevance import RankingExamples
from manyviews.features.layers import BACKBONE, EMBEDDING

LEARNED, EMBEDDED, RANDOM, PIXELS = "learned", "learned (embedding)", "random weights", "raw pixels"
LAYERS: Mapping[str, str] = {LEARNED: BACKBONE, EMBEDDED: EMBEDDING, RANDOM: BACKBONE}
"""The encoder's layer of each kind of features; raw pixels have none."""
Task = Literal[
    "knn", "linear", "augmented", "retrieval", "ranking", "clustering", "verification", "few_shot", "fractions"
]
PROBES: tuple[Task, ...] = ("knn", "linear", "augmented", "fractions")
"""Tasks that learn from labelled training images to predict the classes of test images."""
GROUPING: frozenset[Task] = frozenset({"retrieval", "ranking", "clustering", "verification", "few_shot"})
"""Tasks that compare test images with each other."""
TITLES: Mapping[str, str] = {
    "knn": "kNN",
    "linear": "linear probe",
    "augmented": "augmented probe",
    "retrieval": "Recall@1",
    "ranking": "ranking",
    "clustering": "AMI",
    "verification": "verification",
    "few_shot": "few-shot accuracy",
}
"""Names in tables of the tasks that compare features, or of their leading metric."""
LEADING: Mapping[str, str] = {**dict.fromkeys(TITLES, "accuracy"), "retrieval": "Recall@1", "clustering": "AMI"}
"""The leading metric of each of these tasks, which compares features; that of ranking is in its details."""
THRESHOLD = "threshold"
"""The metric of verification that is no share: a cosine or distance."""
TASKS = (*get_args(Task), "geometry", "staleness")
"""All tasks, in the order of their results."""
CHOICES = {"neighbours": "k", "temperature": "T", "regularisation": "λ", "rate": "rate", "decay": "decay"}
"""Symbols of the hyper-parameters that a task chooses, by their keys in `Measurement.details`."""


def is_learned(kind: str) -> bool:
    """Returns whether features are a run's own, of either layer, and not a baseline."""
    return kind in (LEARNED, EMBEDDED)


def label(kind: str) -> str:
    """Returns the name of a kind of features in tables: with its layer for a run's own."""
    return f"{LEARNED} ({BACKBONE})" if kind == LEARNED else kind


def in_order(kinds: Iterable[str], task: str | None = None) -> list[str]:
    """Returns all kinds; first the backbone's, or for grouping tasks the first of them."""
    kinds = list(kinds)
    first = kinds[0] if task in GROUPING or LEARNED not in kinds else LEARNED
    return [first, *(kind for kind in kinds if kind != first)]


@dataclass(frozen=True)
class Measurement:
    """One number that one task measured on one kind of features."""

    task: str
    features: str
    metric: str
    """Usual name: accuracy, Recall@1, MAP@R, AMI, TAR@FAR=0.01, 5-way 1-shot, effective rank; for few labels, their
    number."""
    value: float
    """Accuracies and the like are shares from 0 to 1; a threshold is in the unit of `distance`."""
    low: float | None = None
    """Lower end of the 95 % interval over draws of the test images, or of episodes, if there is one."""
    high: float | None = None
    n: int = 0
    """Number of images, queries, pairs or rows; for few labels, their number."""
    deviation: float | None = None
    """Standard deviation over folds or draws, if `value` is their mean."""
    dim: int | None = None
    distance: str | None = None
    """The distance of the search for neighbours; None without one."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Chosen hyper-parameters and their validation accuracy; numbers of images learned from or left out; each draw."""

    @property
    def layer(self) -> str | None:
        """The encoder's layer, backbone or embedding; None for raw pixels."""
        return LAYERS.get(self.features)

    @property
    def leads(self) -> bool:
        """Whether it is the leading metric of its task."""
        leading: str | None = self.details.get("leading", LEADING.get(self.task))
        return self.metric == leading

    @property
    def choice(self) -> str:
        """The chosen hyper-parameters in a few characters."""
        return ", ".join(f"{CHOICES[name]} {value:g}" for name, value in self.details.items() if name in CHOICES)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields and the layer as JSON values."""
        return {**asdict(self), "layer": self.layer}


@dataclass(frozen=True)
class Difference:
    """The lead of one kind of features over another in the leading metric of a task."""

    features: str
    baseline: str
    task: str
    difference: float
    low: float
    """Lower end of the 95 % interval: within a run of paired proportions (Agresti and Min 2005) or of paired shares of
    the images that were asked (few-shot), else by bootstrap."""
    high: float

    def __str__(self) -> str:
        """Returns the difference in words."""
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
    """All measurements of a run and its baselines, and the differences between them."""

    measurements: tuple[Measurement, ...] = ()
    differences: tuple[Difference, ...] = ()
    """Between the first kind of features and each of the others."""
    gallery: Mapping[str, Any] = field(default_factory=dict)
    """The test images that were compared with each other: `images` (count), `classes` (numbers) and `origin`."""
    predictions: Mapping[str, Int64[Tensor, " images"]] = field(default_factory=dict, compare=False)
    """Predicted class of each test image, by "knn/learned" and so on, and its cluster, by "clustering/learned"; −1 for
    an image without one."""
    hits: Mapping[str, Int64[Tensor, " images"]] = field(default_factory=dict, compare=False)
    """By "knn/learned", "retrieval/learned" and so on, for each test image: 1 right, 0 wrong, −1 not tested."""
    values: Mapping[str, Float[Tensor, " images"]] = field(default_factory=dict, compare=False)
    """By "ranking/learned" the NDCG of each query, by "clustering/learned" each image's distance to its cluster's
    centre; NaN for other images."""
    ranked: Mapping[str, RankingExamples] = field(default_factory=dict, compare=False)
    """By kind, the queries of the worst and best rankings."""

    def of(self, *tasks: str, features: str | None = None, metric: str | None = None) -> Iterator[Measurement]:
        """Yields the measurements of some tasks, by default of all features and metrics."""
        for own in self.measurements:
            if own.task in tasks and features in (None, own.features) and metric in (None, own.metric):
                yield own

    def verdict(self) -> str:
        """Returns one sentence on the baselines that the features beat, fall behind, or equal.

        Empty if features were not compared.
        """
        kinds = {own.features for own in self.of(*TITLES)}
        if not kinds:
            return ""
        baselines = [difference for difference in self.differences if not is_learned(difference.baseline)]
        if not self.differences:
            if len(kinds) < 2:
                return "There is no baseline to compare with."
            return "Clustering alone has no interval, so no ranking is claimed."
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
            # The layer is named if there are two.
            f"by {TITLES[task]}, {label(kind) if EMBEDDED in kinds else kind} features {' and '.join(said)}"
            for (task, kind), said in sentences.items()
        ]
        return f"{opening}: {'; '.join(parts)}."

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the values of single images as JSON values."""
        record: dict[str, Any] = {"measurements": [own.to_json() for own in self.measurements]}
        if any(self.of(*TITLES)):
            record |= {"gallery": dict(self.gallery), "differences": [asdict(own) for own in self.differences]}
            record["verdict"] = self.verdict()
        return record
