"""Verification, as of faces: are two images of one class? One threshold for all pairs."""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from pydantic import Field
from sklearn.metrics import roc_auc_score
from torch import Tensor

from manyviews.config import Settings
from manyviews.evaluators.distance import Nearness, similarity_of_pairs

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
    """Pairs of images; each fold has as many pairs of the same class as of different ones."""

    images: Int64[Tensor, "folds pairs 2"]
    same: Bool[Tensor, "folds pairs"]


class VerificationResult(NamedTuple):
    """Accuracy, area under the ROC curve and true accept rates of pairs of images."""

    accuracy: float
    deviation: float
    """Standard deviation over the folds; divided by √folds it is the standard error that LFW reports."""
    auc: float
    """Area under the ROC curve of all pairs: the probability that a pair of one class is nearer than one of two."""
    true_accepts: dict[float, tuple[float, float]]
    """Mean and standard deviation over the folds of the true accept rate, by false accept rate."""
    correct: Bool[Tensor, "folds pairs"]


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
        (torch.Size([2, 4, 2]), 4)
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
    return Pairs(torch.cat(kinds, 1), (torch.arange(2 * numbers) < numbers).repeat(settings.folds, 1))


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
    same, images = pairs.same, pairs.images.flatten(0, 1).to(features.device)
    scores = similarity_of_pairs(features, images, nearness).cpu().view_as(same)
    correct = torch.zeros_like(same)
    rates: dict[float, list[float]] = {}
    for fold in range(len(same)):
        others = torch.arange(len(same)) != fold
        threshold = best_threshold(scores[others].flatten(), same[others].flatten())
        correct[fold] = (scores[fold] > threshold) == same[fold]
        negatives = scores[others][~same[others]]
        for rate in settings.false_accept_rates:
            if rate * len(negatives) >= 1:
                accepted = scores[fold][same[fold]] > threshold_at(negatives, rate)
                rates.setdefault(rate, []).append(accepted.double().mean().item())
    by_fold = correct.double().mean(1)
    true_accepts = {}
    for rate, by_folds in rates.items():
        shares = torch.tensor(by_folds, dtype=torch.float64)
        true_accepts[rate] = shares.mean().item(), shares.std().item()
    auc = float(roc_auc_score(same.flatten().numpy(), scores.flatten().numpy()))
    return VerificationResult(by_fold.mean().item(), by_fold.std().item(), auc, true_accepts, correct)


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
