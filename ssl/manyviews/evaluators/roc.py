"""The ROC curve of pairs: equal error rate, best threshold, and their bootstrap intervals."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

DRAWS = 1_000
FEWEST_DRAWS = 100
HELD, LARGEST = 1 << 22, 1 << 26
"""Weights of pairs held at once, and weights of pairs drawn: of many pairs fewer draws are made."""


class Roc(NamedTuple):
    """Counts of accepted pairs at every possible threshold; the first point accepts none."""

    lowest: Float64[Tensor, " points"]
    """The lowest score that is accepted, descending from ∞."""
    threshold: Float64[Tensor, " points"]
    """A score is accepted if it is above: half way between two neighbouring scores; all are finite."""
    same: Float64[Tensor, "*draws points"]
    """Accepted pairs of the same class."""
    different: Float64[Tensor, "*draws points"]
    """Accepted pairs of different classes."""

    @property
    def true_accepts(self) -> Float64[Tensor, "*draws points"]:
        """The share of pairs of the same class that is accepted (TAR)."""
        return self.same / self.same[..., -1:]

    @property
    def false_accepts(self) -> Float64[Tensor, "*draws points"]:
        """The share of pairs of different classes that is accepted (FAR)."""
        return self.different / self.different[..., -1:]


def roc(
    scores: Float[Tensor, " pairs"],
    same: Bool[Tensor, " pairs"],
    weights: Float[Tensor, "draws pairs"] | None = None,
) -> Roc:
    """Counts the pairs that each threshold accepts; with weights, a row of counts for each draw.

    Examples:
        >>> curve = roc(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([True, False, True]))
        >>> curve.true_accepts.tolist(), curve.false_accepts.tolist()
        ([0.0, 0.5, 0.5, 1.0], [0.0, 0.0, 1.0, 1.0])
    """
    ordered, order = scores.double().sort(descending=True, stable=True)
    # No threshold separates equal scores.
    ends = torch.cat([(ordered[1:] != ordered[:-1]).nonzero().squeeze(1), torch.tensor([len(ordered) - 1])])
    lowest = ordered[ends]
    middle = (lowest[:-1] + lowest[1:]) / 2
    # Between neighbouring floats the middle may be the upper one, which has to stay accepted.
    middle = torch.where(middle < lowest[:-1], middle, lowest[1:])
    least = torch.nextafter(lowest[-1:], torch.tensor(-torch.inf, dtype=torch.float64))
    own = torch.ones_like(ordered) if weights is None else weights.double()[:, order]
    accepted = [(own * chosen).cumsum(-1)[..., ends] for chosen in (same[order], ~same[order])]
    return Roc(
        torch.cat([torch.tensor([torch.inf], dtype=torch.float64), lowest]),
        torch.cat([lowest[:1], middle, least]),
        *(torch.cat([torch.zeros_like(counts[..., :1]), counts], -1) for counts in accepted),
    )


def equal_error_rate(curve: Roc) -> Float64[Tensor, "*draws"]:
    """Computes the rate at which false accepts equal false rejects (EER), linear between points.

    Examples:
        >>> equal_error_rate(roc(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([True, False, True]))).item()
        0.5
    """
    false, excess = curve.false_accepts, curve.false_accepts + curve.true_accepts - 1
    # From −1, where none is accepted, to 1.
    after = (excess >= 0).to(torch.uint8).argmax(-1, keepdim=True)
    (low, high), (start, end) = ((values.gather(-1, after - 1), values.gather(-1, after)) for values in (excess, false))
    return (start + (end - start) * low / (low - high)).squeeze(-1)


def area(curve: Roc) -> Float64[Tensor, "*draws"]:
    """Computes the area under the curve (AUC), linear between points."""
    return torch.trapezoid(curve.true_accepts, curve.false_accepts)


def best_point(curve: Roc) -> Int64[Tensor, "*draws"]:
    """Returns the point with the most correct pairs, the highest threshold of equally good ones."""
    # Accepting is right for pairs of the same class, and wrong for the others.
    best: Tensor = (curve.same - curve.different).argmax(-1)
    return best


def intervals(
    scores: Float[Tensor, " pairs"],
    same: Bool[Tensor, " pairs"],
    images: Int64[Tensor, "pairs 2"],
    *,
    seed: int,
    draws: int = DRAWS,
) -> dict[str, tuple[float, float]]:
    """Computes 95 % intervals of AUC, EER and best threshold over bootstrap draws of the images.

    Percentiles (Efron and Tibshirani 1993, chapter 13). Images are drawn with replacement and a pair counts as often as
    both of its images together, cᵢ cⱼ: pairs that share an image are not independent. The spread is rather too large
    than too small (Owen 2007, The pigeonhole bootstrap), up to √3 times if no two pairs share an image. Of more than
    67,000 pairs fewer draws are made, at least 100.
    """
    generator = np.random.default_rng(seed)
    used, rows = images.unique(return_inverse=True)
    draws = max(min(draws, FEWEST_DRAWS), min(draws, LARGEST // len(scores)))
    at_once = max(1, HELD // len(scores))
    drawn: dict[str, list[Tensor]] = {"AUC": [], "EER": [], "threshold": []}
    for start in range(0, draws, at_once):
        size = min(at_once, draws - start)
        counts = torch.from_numpy(generator.multinomial(len(used), [1 / len(used)] * len(used), size)).double()
        curve = roc(scores, same, counts[:, rows[:, 0]] * counts[:, rows[:, 1]])
        # A draw of a few images may lack a kind of pairs.
        kept = (curve.same[:, -1] > 0) & (curve.different[:, -1] > 0)
        curve = curve._replace(same=curve.same[kept], different=curve.different[kept])
        drawn["AUC"].append(area(curve))
        drawn["EER"].append(equal_error_rate(curve))
        drawn["threshold"].append(curve.threshold[best_point(curve)])
    results = {}
    for name, values in drawn.items():
        low, high = np.quantile(torch.cat(values).numpy(), [0.025, 0.975]).tolist()
        results[name] = low, high
    return results


def thinned(curve: Roc, most: int) -> Int64[Tensor, " chosen"]:
    """Returns up to `most` of the points that accept a pair, dense where few are accepted.

    A third of the points is even in the share of false accepts, a third in its logarithm, a third in that of true ones.
    """
    points, third = len(curve.lowest), max(1, most // 3)
    if points - 1 <= most:
        return torch.arange(1, points)
    false, true = curve.false_accepts, curve.true_accepts
    even = torch.linspace(0, 1, third, dtype=torch.float64)
    few = torch.logspace(-float(curve.different[-1].log10()), 0, third, dtype=torch.float64)
    chosen = [torch.searchsorted(rates, wanted) for rates, wanted in ((false, even), (false, few), (true, even))]
    kept: Tensor = torch.cat(chosen).clamp(1, points - 1).unique()
    return kept
