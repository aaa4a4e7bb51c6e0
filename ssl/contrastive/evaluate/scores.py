"""What was measured: features beside their baselines, by one protocol, and what may be concluded from it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from rich import box
from rich.table import Table
from torch import Tensor

from contrastive.config import Settings
from contrastive.evaluate.held_out import num_classes
from contrastive.evaluate.knn import KnnSettings, knn
from contrastive.evaluate.linear import LinearSettings, linear

NORMAL_95 = 1.959963984540054
Method = Literal["knn", "linear"]
TITLES: Mapping[Method, str] = {"knn": "kNN", "linear": "linear probe"}


class ProtocolSettings(Settings):
    """How features are measured: the same for every kind of features, and without a look at the test labels."""

    knn: KnnSettings = KnnSettings()
    linear: LinearSettings = LinearSettings()
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of the training images, of each class alike, on which k, temperature and regularisation are chosen."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the draw of that share."""


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

    @property
    def choice(self) -> str:
        """What was chosen, in a few characters."""
        if self.method == "knn":
            return f"k {self.neighbours}, T {self.temperature:g}"
        return f"λ {self.regularisation:g}"


@dataclass(frozen=True)
class Difference:
    """How far the first kind of features is ahead of a baseline, by one method, on the same test images."""

    features: str
    baseline: str
    method: Method
    difference: float
    low: float
    """Lower end of the 95 % interval for paired proportions (Agresti and Min 2005)."""
    high: float

    def __str__(self) -> str:
        """The difference in words."""
        points = f"{100 * abs(self.difference):.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        if self.low > 0:
            return f"beat {self.baseline} by {points}"
        if self.high < 0:
            return f"fall behind {self.baseline} by {points}"
        sign = "ahead" if self.difference > 0 else "behind"
        return f"cannot be told from {self.baseline}: {sign} by {points}"


@dataclass(frozen=True)
class Evaluation:
    """All scores, and the differences between the first kind of features and each of the others."""

    protocol: ProtocolSettings
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]

    def verdict(self) -> str:
        """What may be concluded, in one sentence: where the features win, where they lose, where nobody can tell."""
        if not self.differences:
            return "There is no baseline to compare with."
        if all(difference.low > 0 for difference in self.differences):
            opening = "Ahead of every baseline"
        elif all(difference.high < 0 for difference in self.differences):
            opening = "Behind every baseline"
        else:
            opening = "Not ahead of every baseline"
        parts = []
        for method, title in TITLES.items():
            found = [str(difference) for difference in self.differences if difference.method == method]
            if found:
                parts.append(f"by {title}, {self.differences[0].features} features {' and '.join(found)}")
        return f"{opening}: {'; '.join(parts)}."

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; a validation accuracy without a choice is null."""
        scores = [asdict(score) for score in self.scores]
        for score in scores:
            score["validation"] = None if math.isnan(score["validation"]) else score["validation"]
        return {
            "protocol": self.protocol.model_dump(mode="json"),
            "scores": scores,
            "differences": [asdict(difference) for difference in self.differences],
            "verdict": self.verdict(),
        }

    def table(self) -> Table:
        """A row for each kind of features; for each method the accuracy, its interval and what was chosen."""
        first = self.scores[0]
        title = f"Accuracy on {first.num_test:,} test images, {first.num_train:,} labelled training images (%)"
        table = Table("features", "dim", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.columns[1].justify = "right"
        methods = [method for method in TITLES if any(score.method == method for score in self.scores)]
        for method in methods:
            table.add_column(TITLES[method].split()[0], justify="right", no_wrap=True)
            table.add_column("95 %", no_wrap=True)
            table.add_column("chosen", no_wrap=True)
        for kind in dict.fromkeys(score.features for score in self.scores):
            own = {score.method: score for score in self.scores if score.features == kind}
            cells = [kind, str(next(iter(own.values())).dim)]
            for method in methods:
                score = own[method]
                cells += [f"{100 * score.accuracy:.1f}", f"{100 * score.low:.1f}–{100 * score.high:.1f}", score.choice]
            table.add_row(*cells, style="bold" if kind == first.features else None)
        return table


def compare(
    features: Mapping[str, tuple[Tensor, Tensor]],
    train_labels: Int[Tensor, " train"],
    test_labels: Int[Tensor, " test"],
    protocol: ProtocolSettings | None = None,
    *,
    report: Callable[[str], object] | None = None,
) -> Evaluation:
    """Measures every kind of features by kNN and by a linear probe, all by the same protocol.

    Test labels meet predictions at the very end; nothing is chosen by them. Images labelled −1 are left out.

    Args:
        features: by kind, those of the training [train, dim] and of the test images [test, dim]; the first kind is
            compared with each other one.
        train_labels: classes of the training images.
        test_labels: classes of the test images.
        protocol: grids, share held out, seed.
        report: told what is measured next.

    Raises:
        ValueError: if features and labels do not match in number, are not finite, or no test image has a label.
    """
    protocol = protocol or ProtocolSettings()
    shared = {"share": protocol.held_out, "seed": protocol.seed}
    labelled = test_labels >= 0
    truth, classes = test_labels[labelled], num_classes(train_labels, test_labels)
    if not len(truth):
        raise ValueError("no test image has a label")
    num_train = int((train_labels >= 0).sum())
    scores, hits = [], {}
    for kind, (train, test) in features.items():
        _check(kind, train, train_labels, "training")
        _check(kind, test, test_labels, "test")
        test, counts = test[labelled], {"num_train": num_train, "num_test": len(truth), "dim": train.shape[1]}
        if report is not None:
            report(f"measuring {kind} features: {counts['dim']} numbers for each image")
        near = knn(train, train_labels, test, classes, protocol.knn, share=shared["share"], seed=protocol.seed)
        hits["knn", kind] = near.predictions == truth
        chosen = {"neighbours": near.neighbours, "temperature": near.temperature}
        scores.append(_score(kind, "knn", hits["knn", kind], near.validation, counts, chosen))
        probe = linear(train, train_labels, test, classes, protocol.linear, share=shared["share"], seed=protocol.seed)
        hits["linear", kind] = probe.predictions == truth
        chosen = {"regularisation": probe.regularisation}
        scores.append(_score(kind, "linear", hits["linear", kind], probe.validation, counts, chosen))
    first, *baselines = features
    differences = [
        Difference(first, baseline, method, *paired_difference(hits[method, first], hits[method, baseline]))
        for method in TITLES
        for baseline in baselines
    ]
    return Evaluation(protocol, tuple(scores), tuple(differences))


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): never outside [0, 1], sound near both ends."""
    share, weight = correct / total, NORMAL_95**2 / total
    centre = (share + weight / 2) / (1 + weight)
    reach = NORMAL_95 / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def paired_difference(first: Bool[Tensor, " images"], second: Bool[Tensor, " images"]) -> tuple[float, float, float]:
    """The difference of two accuracies on the same images and its 95 % interval (Agresti and Min 2005).

    Only images on which the two disagree count, so the interval is tighter than that of two separate samples; half an
    image is added to each of the four cells.
    """
    total = len(first)
    gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
    adjusted = total + 2
    middle = (gained - lost) / adjusted
    reach = NORMAL_95 * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / adjusted) / adjusted
    return (gained - lost) / total, max(-1.0, middle - reach), min(1.0, middle + reach)


def _score(
    kind: str, method: Method, hits: Tensor, validation: float, counts: Mapping[str, int], chosen: Mapping[str, Any]
) -> Score:
    correct = int(hits.sum())
    low, high = wilson(correct, len(hits))
    return Score(kind, method, correct / len(hits), low, high, validation, **counts, **chosen)


def _check(kind: str, features: Tensor, labels: Tensor, split: str) -> None:
    if len(features) != len(labels):
        raise ValueError(f"{kind}: {len(features)} {split} features for {len(labels)} labels")
    if not torch.isfinite(features).all():
        raise ValueError(f"{kind}: some {split} features are not finite")
