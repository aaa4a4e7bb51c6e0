"""Verification, as of faces: are two images of one class? One threshold for all pairs."""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from pydantic import BaseModel, Field
from sklearn.metrics import roc_auc_score
from torch import Tensor

from manyviews.config import Settings
from manyviews.evaluators.distance import Nearness, distance_of, similarity_of_pairs
from manyviews.evaluators.results.measurement import THRESHOLD, Measurement, label
from manyviews.evaluators.roc import best_point, equal_error_rate, intervals, roc, thinned

CURVE, WORST = 150, 8
"""Points of a ROC curve that are kept, and wrongly judged pairs of each kind."""
Share = Annotated[float, Field(gt=0, lt=1)]


class VerificationSettings(Settings):
    """Which pairs are judged, and at which rates of false accepts."""

    pairs: int = Field(6_000, ge=4, le=10_000_000)
    """Pairs of images, half of the same class; fewer if there are not as many distinct ones."""
    folds: int = Field(10, ge=2, le=10_000)
    """Folds of the pairs: each is judged by a threshold that is chosen on the others."""
    false_accept_rates: tuple[Share, ...] = (0.1, 0.01, 0.001)
    """False accept rates at which true accepts are counted; rates below one pair are left out."""


class Pairs(NamedTuple):
    """Pairs of images in folds."""

    images: Int64[Tensor, "pairs 2"]
    same: Bool[Tensor, " pairs"]
    folds: Int64[Tensor, " pairs"]
    """The fold of each pair, from 0; every fold has pairs of both kinds."""
    source: str = ""
    """The name of the file that lists them; empty if they were drawn."""


class Curve(BaseModel):
    """Points of a ROC curve: a pair is accepted by a cosine of at least `at`, or a distance of at most `at`."""

    at: list[float]
    false_accepts: list[float]
    true_accepts: list[float]


class ThresholdDetails(BaseModel):
    """Details of the measurement "threshold"."""

    pairs: str
    """The name of the file that lists the pairs; empty if they were drawn."""
    false_accepts: float
    """Share of the pairs of different classes that the threshold accepts."""
    true_accepts: float
    curve: Curve
    wrongly_accepted: list[tuple[int, int, float]]
    """The pairs farthest on the wrong side of the threshold: images, and their cosine or distance."""
    wrongly_rejected: list[tuple[int, int, float]]


class VerificationResult(NamedTuple):
    """Accuracy, area under the ROC curve and true accept rates of pairs of images."""

    accuracy: float
    deviation: float
    """Standard deviation over the folds; divided by √folds it is the standard error that LFW reports."""
    auc: float
    """Area under the ROC curve of all pairs: the probability that a pair of one class is nearer than one of two."""
    true_accepts: dict[float, tuple[float, float]]
    """Mean and standard deviation over the folds of the true accept rate, by false accept rate."""
    correct: Bool[Tensor, " pairs"]
    scores: Float64[Tensor, " pairs"]
    """The similarity of each pair: the cosine, or minus the squared distance."""


def draw_pairs(labels: Int[Tensor, " images"], settings: VerificationSettings | None = None, *, seed: int = 0) -> Pairs:
    """Draws distinct pairs of images, half of them of the same class, balanced in every fold.

    All pairs of the same class are equally likely, as are all pairs of different classes. Large classes thus take part
    more often than in LFW (Huang et al. 2007), which draws a person first; and folds share classes, unlike LFW's.
    Images labelled −1 are left out. A pure function of the labels and the seed.

    Raises:
        ValueError: if there is not a pair of each kind for every fold.

    Examples:
        >>> pairs = draw_pairs(torch.tensor([0, 0, 0, 1, 1, 1]), VerificationSettings(pairs=8, folds=2))
        >>> pairs.images.shape, int(pairs.same.sum())
        (torch.Size([8, 2]), 4)
    """
    settings = settings or VerificationSettings()
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    order = labels.argsort(stable=True)
    order = order[labels[order] >= 0]
    _, sizes = labels[order].unique_consecutive(return_counts=True)
    ends = sizes.cumsum(0).repeat_interleave(sizes)
    indices = torch.arange(len(order))
    # In the order of classes, an image pairs with the later ones of its class, and with all images after its class.
    same, different = ends - 1 - indices, len(order) - ends
    numbers = min(settings.pairs // 2, int(same.sum()), int(different.sum())) // settings.folds
    if not numbers:
        raise ValueError(
            f"{len(order)} labelled images of {len(sizes)} classes have {int(same.sum())} pairs of the same class and "
            f"{int(different.sum())} of different ones; verification takes as many of each as folds "
            f"({settings.folds}), and at least twice as many pairs"
        )
    kinds = []
    for counts, begins in ((same, indices + 1), (different, ends)):
        upto = counts.cumsum(0)
        drawn = _draw_distinct(int(upto[-1]), numbers * settings.folds, generator)
        first = torch.searchsorted(upto, drawn, right=True)
        second = begins[first] + drawn - (upto[first] - counts[first])
        kinds.append(torch.stack([order[first], order[second]], 1).view(settings.folds, numbers, 2))
    same_class = (torch.arange(2 * numbers) < numbers).repeat(settings.folds)
    return Pairs(torch.cat(kinds, 1).flatten(0, 1), same_class, torch.arange(len(same_class)) // (2 * numbers))


def verify(
    features: Float[Tensor, "images dim"],
    pairs: Pairs,
    settings: VerificationSettings | None = None,
    *,
    nearness: Nearness = "cosine",
) -> VerificationResult:
    """Judges each fold of pairs by thresholds chosen on the others (LFW, Huang et al. 2007).

    A pair is accepted if its similarity is above the threshold. For the accuracy it is the threshold with the most
    correct pairs, half way between two neighbouring similarities, the highest of equally good ones; for TAR at a FAR,
    the lowest that accepts at most this share of the pairs of different classes. A FAR is left out if it allows none of
    them.
    """
    settings = settings or VerificationSettings()
    same = pairs.same
    scores = similarity_of_pairs(features, pairs.images.to(features.device), nearness).cpu()
    correct = torch.zeros_like(same)
    accuracies = []
    rates: dict[float, list[float]] = {}
    for fold in range(int(pairs.folds.max()) + 1):
        own, others = pairs.folds == fold, pairs.folds != fold
        threshold = best_threshold(scores[others], same[others])
        correct[own] = (scores[own] > threshold) == same[own]
        accuracies.append(correct[own].double().mean())
        negatives = scores[others & ~same]
        for rate in settings.false_accept_rates:
            if rate * len(negatives) >= 1:
                accepted = scores[own & same] > threshold_at(negatives, rate)
                rates.setdefault(rate, []).append(accepted.double().mean().item())
    by_fold = torch.stack(accuracies)
    true_accepts = {}
    for rate, by_folds in rates.items():
        shares = torch.tensor(by_folds, dtype=torch.float64)
        true_accepts[rate] = shares.mean().item(), shares.std().item()
    auc = float(roc_auc_score(same.numpy(), scores.numpy()))
    return VerificationResult(by_fold.mean().item(), by_fold.std().item(), auc, true_accepts, correct, scores)


def measure_pairs(
    kind: str,
    features: Float[Tensor, "images dim"],
    pairs: Pairs,
    settings: VerificationSettings,
    *,
    nearness: Nearness,
    distance: str,
    seed: int,
) -> tuple[tuple[Measurement, ...], Bool[Tensor, " pairs"]]:
    """Judges pairs by one kind of features; returns the measurements, and which pairs were right.

    The measurement "threshold" is the best one on all pairs, as the cosine or the Euclidean distance, with
    `ThresholdDetails`. AUC, EER and threshold have the intervals of `roc.intervals`.
    """
    judged = verify(features, pairs, settings, nearness=nearness)
    scores, same = judged.scores, pairs.same
    curve = roc(scores, same)
    ends = intervals(scores, same, pairs.images, seed=seed)
    best = best_point(curve)
    threshold = curve.threshold[best].item()

    def number(similarity: float) -> float:
        return float(f"{distance_of(similarity, nearness):.7g}")

    def worst(wrong: Tensor, *, highest: bool) -> list[tuple[int, int, float]]:
        rows = wrong.nonzero().squeeze(1)
        rows = rows[scores[rows].argsort(descending=highest, stable=True)[:WORST]]
        first, second = pairs.images[rows].unbind(1)
        values = map(number, scores[rows].tolist())
        return list(zip(first.tolist(), second.tolist(), values, strict=True))

    kept = thinned(curve, CURVE)
    details = ThresholdDetails(
        pairs=pairs.source,
        false_accepts=curve.false_accepts[best].item(),
        true_accepts=curve.true_accepts[best].item(),
        curve=Curve(
            at=[number(score) for score in curve.lowest[kept].tolist()],
            false_accepts=[float(f"{rate:.7g}") for rate in curve.false_accepts[kept].tolist()],
            true_accepts=[float(f"{rate:.7g}") for rate in curve.true_accepts[kept].tolist()],
        ),
        wrongly_accepted=worst(~same & (scores > threshold), highest=True),
        wrongly_rejected=worst(same & (scores <= threshold), highest=False),
    )
    low, high = sorted(distance_of(end, nearness) for end in ends["threshold"])
    rows: list[tuple[str, float, float | None, float | None, float | None]] = [
        ("accuracy", judged.accuracy, None, None, judged.deviation),
        ("AUC", judged.auc, *ends["AUC"], None),
        ("EER", equal_error_rate(curve).item(), *ends["EER"], None),
        *((f"TAR@FAR={rate:g}", mean, None, None, spread) for rate, (mean, spread) in judged.true_accepts.items()),
        (THRESHOLD, distance_of(threshold, nearness), low, high, None),
    ]
    measurements = tuple(
        Measurement(
            "verification",
            kind,
            name,
            value,
            start,
            end,
            len(same),
            deviation,
            features.shape[1],
            distance,
            details.model_dump() if name == THRESHOLD else {"pairs": pairs.source},
        )
        for name, value, start, end, deviation in rows
    )
    return measurements, judged.correct


def threshold_text(own: Measurement) -> str:
    """Returns a measured threshold in a sentence."""
    details = ThresholdDetails.model_validate(own.details)
    unit, side = ("cosine", "above") if own.distance == "cosine" else ("distance", "below")
    return (
        f"Threshold of {label(own.features)} features: {unit} {own.value:.4g} (95 % {own.low:.4g} to {own.high:.4g}). "
        f"{side.capitalize()} it are {100 * details.true_accepts:.1f} % of the pairs of one class and "
        f"{100 * details.false_accepts:.1f} % of the others."
    )


def best_threshold(scores: Float[Tensor, " pairs"], same: Bool[Tensor, " pairs"]) -> float:
    """Returns the threshold with the most correct pairs, the highest of equally good ones.

    Examples:
        >>> round(best_threshold(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([True, True, False])), 2)
        0.45
    """
    ordered, order = scores.sort(descending=True)
    # Accepting the first n pairs is right for those of the same class, and wrong for the others.
    gains = torch.cat([torch.zeros(1, dtype=torch.int64), torch.where(same[order], 1, -1).cumsum(0)])
    # No threshold separates equal scores.
    gains[1:-1][ordered[1:] == ordered[:-1]] = -len(scores) - 1
    accepted = int(gains.argmax())
    if accepted == 0:
        return torch.inf
    if accepted == len(scores):
        return -torch.inf
    middle = ((ordered[accepted - 1] + ordered[accepted]) / 2).item()
    # Between neighbouring floats the middle may be the upper one, which has to stay accepted.
    return middle if middle < ordered[accepted - 1].item() else ordered[accepted].item()


def threshold_at(negatives: Float[Tensor, " negatives"], rate: float) -> float:
    """Returns the lowest score of a negative with at most this share of the negatives above it.

    Examples:
        >>> round(threshold_at(torch.tensor([0.9, 0.8, 0.1]), 0.5), 2)
        0.8
    """
    # A tenth of 30 is 3, though 0.1 · 30 need not be in floating point.
    allowed = int(rate * len(negatives) * (1 + 1e-12))
    return negatives.sort(descending=True).values[allowed].item()


def _draw_distinct(total: int, number: int, generator: torch.Generator) -> Int64[Tensor, " number"]:
    """Draws `number` distinct integers below `total`, uniformly, in random order."""
    if total <= max(4 * number, 1 << 16):
        return torch.randperm(total, generator=generator)[:number]
    distinct = torch.empty(0, dtype=torch.int64)
    while len(distinct) < number:
        distinct = torch.cat([distinct, torch.randint(total, (2 * number,), generator=generator)]).unique()
    return distinct[torch.randperm(len(distinct), generator=generator)[:number]]
