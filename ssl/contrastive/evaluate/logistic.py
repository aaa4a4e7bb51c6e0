"""Multinomial logistic regression for a whole grid of regularisations at once, as matrix work."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

MEMORY = 20
"""Pairs of steps and gradient changes that L-BFGS remembers."""
MOST_DIRECTIONS = 2048
"""Above so many features the eigenvectors cost more than they save."""
MOST_LOGITS = 1 << 26
"""Numbers in one array of logits (256 MB); a larger grid is fitted part by part."""


class LogisticFit(NamedTuple):
    """The minimiser for each regularisation."""

    weights: Float[Tensor, "grid classes dim"]
    biases: Float[Tensor, "grid classes"]
    converged: Bool[Tensor, " grid"]
    steps: Int[Tensor, " grid"]

    def predict(self, features: Float[Tensor, "images dim"]) -> Int[Tensor, "grid images"]:
        """The class with the largest logit, for each regularisation."""
        pairs = zip(self.weights, self.biases, strict=True)
        return torch.stack([(features @ weights.T + biases).argmax(1) for weights, biases in pairs])


def objective(
    fit: LogisticFit,
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"],
    regularisations: Float[Tensor, " grid"],
) -> Float[Tensor, " grid"]:
    """What is minimised: mean cross-entropy + regularisation / 2 × the squared weights (not biases), in float64."""
    values = []
    for weights, biases, strength in zip(fit.weights, fit.biases, regularisations.double(), strict=True):
        logits = features.double() @ weights.double().T + biases.double()
        values.append(F.cross_entropy(logits, labels) + strength / 2 * weights.double().square().sum())
    return torch.stack(values)


@torch.no_grad()
def logistic_regression(
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"],
    regularisations: Float[Tensor, " grid"],
    classes: int,
    *,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
) -> LogisticFit:
    """Minimises mean cross-entropy + regularisation / 2 × |weights|² for every regularisation, from zero.

    L-BFGS on all problems at once, so that each step is two large matrix products; problems that have converged leave.
    Two things make it short. The variables are turned to the eigenvectors of the features' second moments, where the
    Hessian is nearly diagonal, and its diagonal there (mean p(1 - p) × eigenvalue + regularisation) is what L-BFGS
    starts each direction from; the penalty does not change under a rotation. And logits move along a line by an
    addition, so that a line search costs no product. Deterministic; in the precision of the features.

    Args:
        features: centred, best standardised.
        labels: classes from 0.
        regularisations: strengths, > 0.
        classes: their number.
        tolerance: a problem is done when its expected decrease (half of gradient × step, in nats) is below this.
        max_steps: after so many steps a problem is given back as it is, not converged.
    """
    rotated, rotation, moments = _rotate(features)
    group = max(1, MOST_LOGITS // (len(features) * classes))
    parts = [
        _fit(rotated, moments, labels, strengths, classes, tolerance, max_steps)
        for strengths in torch.split(regularisations.to(features.dtype), group)
    ]
    solved, converged, steps = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    weights = solved[..., :-1] @ rotation.T if rotation is not None else solved[..., :-1]
    # All biases may move together without a change: the middle one of all equal answers.
    biases = solved[..., -1] - solved[..., -1].mean(1, keepdim=True)
    return LogisticFit(weights, biases, converged, steps)


def _rotate(features: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Features along their principal directions with a last column of ones; the rotation; each column's mean square."""
    ones = features.new_ones(len(features), 1)
    if features.shape[1] > MOST_DIRECTIONS:
        moments = features.square().mean(0)
        return torch.cat([features, ones], 1), None, torch.cat([moments, ones[0]])
    moments, rotation = torch.linalg.eigh((features.T @ features / len(features)).double())
    # With fewer images than features, nothing lies along the other directions: their weights are 0 at the minimum.
    present = slice(max(0, features.shape[1] - len(features)), None)
    rotation = rotation[:, present].to(features.dtype)
    moments = torch.cat([moments[present].clamp(min=0).to(features.dtype), ones[0]])
    return torch.cat([features @ rotation, ones], 1), rotation, moments


def _fit(
    inputs: Tensor, moments: Tensor, labels: Tensor, strengths: Tensor, classes: int, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Solves the problems of some strengths: weights [grid, classes, dim + 1], converged [grid], steps [grid]."""
    images, dim = inputs.shape
    columns = inputs.T.contiguous()
    targets = F.one_hot(labels, classes).T.to(inputs.dtype)
    penalty = strengths[:, None, None].repeat(1, 1, dim)
    penalty[..., -1] = 0
    solved = inputs.new_zeros(len(strengths), classes, dim)
    converged = torch.zeros(len(strengths), dtype=torch.bool)
    steps = torch.full((len(strengths),), max_steps)
    active = torch.arange(len(strengths))

    def gradient_at(weights: Tensor, probabilities: Tensor) -> Tensor:
        residual = (probabilities - targets).view(-1, images)
        return (residual @ inputs).view(-1, classes, dim).div_(images).add_(penalty * weights)

    weights = torch.zeros_like(solved)
    logits = inputs.new_zeros(len(strengths), classes, images)
    probabilities = torch.softmax(logits, 1)
    gradient = gradient_at(weights, probabilities)
    past: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(max_steps):
        spread = (probabilities * (1 - probabilities)).mean(2, keepdim=True)
        direction = _quasi_newton(gradient, 1 / (spread * moments + penalty).clamp_(min=1e-12), past)
        slope = _dot(gradient, direction)
        done = -slope / 2 <= tolerance
        if done.any():
            solved[active[done]], converged[active[done]], steps[active[done]] = weights[done], True, step
            left = ~done
            if not left.any():
                return solved, converged, steps
            active, penalty, past = active[left], penalty[left], [(s[left], y[left], r[left]) for s, y, r in past]
            weights, logits, gradient = weights[left], logits[left], gradient[left]
            direction, slope = direction[left], slope[left]
        moved = (direction.reshape(-1, dim) @ columns).view(-1, classes, images)
        linear = _dot(penalty * weights, direction) - (moved * targets).sum(1).mean(1)
        length, probabilities = _line_search(logits, moved, linear, _dot(penalty * direction, direction), slope)
        change = length[:, None, None] * direction
        logits.addcmul_(length[:, None, None], moved)
        weights = weights + change
        previous, gradient = gradient, gradient_at(weights, probabilities)
        bend = gradient - previous
        curvature = _dot(change, bend)
        # A pair that rounding has spoilt gets no weight.
        sound = curvature > 1e-10 * _dot(bend, bend)
        past = [*past[1 - MEMORY :], (change, bend, torch.where(sound, 1 / curvature, 0))]
    solved[active] = weights
    return solved, converged, steps


def _quasi_newton(gradient: Tensor, scale: Tensor, past: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The two loops of L-BFGS (Nocedal and Wright, algorithm 7.4), from a diagonal of one's own."""
    direction, shares = gradient.clone(), []
    for change, bend, inverse in reversed(past):
        share = (inverse * _dot(change, direction))[:, None, None]
        direction.addcmul_(share, bend, value=-1)
        shares.append(share)
    direction *= scale
    for (change, bend, inverse), share in zip(past, reversed(shares), strict=True):
        direction.addcmul_(share - (inverse * _dot(bend, direction))[:, None, None], change)
    return direction.neg_()


def _line_search(logits: Tensor, moved: Tensor, linear: Tensor, square: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """How far to go: to where the slope has fallen to half, by Newton's method in a bracket; the probabilities there.

    The problem is convex along the line, so the sign of the slope tells on which side of the minimum a point lies; the
    values, which float32 could not tell apart near the end, are never compared.
    """
    length, low = torch.ones_like(slope), torch.zeros_like(slope)
    high = torch.full_like(slope, torch.inf)
    for attempt in range(20):
        probabilities = torch.softmax(torch.addcmul(logits, length[:, None, None], moved), 1)
        weighted = probabilities * moved
        mean = weighted.sum(1)
        here = mean.mean(1) + linear + length * square
        enough = here.abs() <= 0.5 * slope.abs()
        if enough.all() or attempt == 19:
            break
        curvature = (weighted.mul_(moved).sum(1) - mean.square()).mean(1) + square
        low, high = torch.where(here < 0, length, low), torch.where(here > 0, length, high)
        newton = length - here / curvature
        middle = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        inside = (newton > low) & (newton < high)
        length = torch.where(enough, length, torch.where(inside, newton, middle))
    return length, probabilities


def _dot(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(left.flatten(1), right.flatten(1))
    return product
