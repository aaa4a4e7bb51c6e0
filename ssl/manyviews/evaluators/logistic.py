"""Multinomial logistic regression for a grid of regularisations at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MEMORY, FEWEST_REMEMBERED = 20, 4
"""Pairs of steps and gradient changes in the memory of L-BFGS, and their least number if memory is short."""
MOST_DIRECTIONS = 2048
"""Number of features above which the principal axes cost more than they save."""
MOST_SEEN = 16_384
"""Images that the principal axes are computed from: the minimum does not depend on the axes."""
MOST_LOGITS = 1 << 26
"""Numbers in one array of logits (256 MB); a larger grid is fitted part by part."""
MOST_REMEMBERED = 1 << 28
"""Numbers in the memory of L-BFGS for all problems at once (1 GB)."""
MOST_MODES = 512
"""Number of classes above which the Hessian over the classes is taken as diagonal: its eigenvectors would cost far more
time than they save, and memory as the square of the classes."""
MOST_CLASSES_SOLVED = 512
STEPS, STEPS_OF_MANY = 1000, 20
"""Most steps of a fit, and with more classes than `MOST_CLASSES_SOLVED`: there a step takes long, and a weak
regularisation would take hundreds of them."""
TILE, GPU_TILE = 1 << 10, 1 << 17
"""Images whose logits are one product: for few rows of weights that is faster on a CPU than all images at once."""


def cut_short(classes: int) -> str | None:
    """Returns a warning if fits of this many classes end after `STEPS_OF_MANY` steps, else None."""
    if classes <= MOST_CLASSES_SOLVED:
        return None
    return (
        f"With {classes:,} classes each fit of the probe ends after {STEPS_OF_MANY} steps, maybe before its optimum: "
        "the probe's accuracies may be too low."
    )


class LogisticFit(NamedTuple):
    """The minimiser for each regularisation."""

    weights: Float[Tensor, "grid classes dim"]
    biases: Float[Tensor, "grid classes"]
    converged: Bool[Tensor, " grid"]
    steps: Int[Tensor, " grid"]

    def predict(self, features: Float[Tensor, "images dim"]) -> Int[Tensor, "grid images"]:
        """Returns the class with the largest logit, for each regularisation."""
        pairs = zip(self.weights, self.biases, strict=True)
        return torch.stack([(features @ weights.T + biases).argmax(1) for weights, biases in pairs])


@torch.no_grad()
def logistic_regression(
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"],
    regularisations: Float[Tensor, " grid"],
    classes: int,
    *,
    used: Bool[Tensor, "grid images"] | None = None,
    start: LogisticFit | None = None,
    axes: Float[Tensor, "dim directions"] | None = None,
    tolerance: float = 1e-5,
    max_steps: int | None = None,
    report: Callable[[int], object] | None = None,
) -> LogisticFit:
    """Minimises mean cross-entropy + regularisation / 2 × |weights|² for every regularisation.

    L-BFGS on all problems at once: each step is two large matrix products, and problems that have converged leave. Two
    things speed it up. The variables are rotated to the principal axes of the features, where the Hessian is nearly the
    Kronecker product of mean(diag p - p pᵀ) and each direction's mean square, plus the regularisation, which is
    invariant to rotation; its inverse, exact at weights of zero, is the initial inverse Hessian of L-BFGS. And logits
    along a line are a sum, so that a line search needs no product. Deterministic; in the precision of the features.

    Features are centred, best standardised. `used` are the images of each problem (default: all), `start` the
    initial weights (default: zero), `axes` the result of `principal_axes` for these features or similar ones, to save
    its time. A problem has converged when its expected decrease (half of gradient × step, in nats) is below
    `tolerance`, and otherwise ends after `max_steps` (default: `STEPS`, or `STEPS_OF_MANY` with many classes).
    `report` gets the number of problems solved after each step.
    """
    if max_steps is None:
        max_steps = STEPS if classes <= MOST_CLASSES_SOLVED else STEPS_OF_MANY
    axes = principal_axes(features) if axes is None else axes
    inputs = features @ axes if axes.shape[1] else features
    # The bias is a weight of one more feature, which is 1 everywhere.
    moments = torch.cat([torch.linalg.vector_norm(inputs, dim=0).square() / len(inputs), inputs.new_ones(1)])
    first = features.new_zeros(len(regularisations), classes, len(moments))
    if start is not None:
        first[..., :-1], first[..., -1] = start.weights @ axes if axes.shape[1] else start.weights, start.biases
    # The weight of each image in each problem's mean.
    shares = features.new_full((len(regularisations), 1), 1 / len(features))
    if used is not None:
        used = used.to(features.device)
        shares = used / used.sum(1, keepdim=True, dtype=features.dtype)
    # Where the logit of each image's own class is.
    own = labels.to(features.device), torch.arange(len(features), device=features.device)
    size = at_once(len(features), classes, len(moments))
    memory = MOST_REMEMBERED // (2 * min(size, len(regularisations)) * classes * len(moments))
    memory = min(MEMORY, max(FEWEST_REMEMBERED, memory))
    groups = zip(*(torch.split(each, size) for each in (regularisations.to(features), shares, first)), strict=True)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for strengths, share, initial in groups:
        before = sum(len(solved) for solved, _, _ in parts)
        parts.append(
            _fit(inputs, moments, own, strengths, share, initial, tolerance, max_steps, memory, report, before)
        )
    solved, converged, steps = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    weights = solved[..., :-1] @ axes.T if axes.shape[1] else solved[..., :-1]
    # A constant added to all biases changes nothing: their mean is set to 0.
    biases = solved[..., -1] - solved[..., -1].mean(1, keepdim=True)
    return LogisticFit(weights, biases, converged, steps)


def at_once(images: int, classes: int, dim: int) -> int:
    """Returns how many problems are solved at once: as many as fit in a few GB, at least one."""
    return max(1, min(MOST_LOGITS // (images * classes), MOST_REMEMBERED // (2 * MEMORY * classes * dim)))


def principal_axes(features: Float[Tensor, "images dim"]) -> Float[Tensor, "dim directions"]:
    """Computes eigenvectors of the features' second moments, as orthonormal columns.

    With fewer images than features, only the directions that the images span: the weights along the others are 0 at
    the minimum. No directions above `MOST_DIRECTIONS` images and features: the features' own axes are used.
    """
    images, dim = features.shape
    if min(images, dim) > MOST_DIRECTIONS:
        return features.new_empty(dim, 0)
    if images >= dim:
        seen = features[:: max(1, images // MOST_SEEN)]
        axes: Tensor = torch.linalg.eigh(seen.T @ seen / len(seen))[1]
        return axes
    # Directions whose square is all rounding error are dropped.
    rows = features.double()
    squares, left = torch.linalg.eigh(rows @ rows.T)
    present = squares > 1e-10 * squares[-1]
    axes = rows.T @ (left[:, present] / squares[present].sqrt())
    return axes.to(features.dtype)


def _fit(
    inputs: Tensor,
    moments: Tensor,
    own: tuple[Tensor, Tensor],
    strengths: Tensor,
    shares: Tensor,
    initial: Tensor,
    tolerance: float,
    max_steps: int,
    memory: int,
    report: Callable[[int], object] | None,
    solved_before: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns weights [grid, classes, dim + 1], converged [grid] and steps [grid]."""
    images, classes, dim, device = len(inputs), initial.shape[1], len(moments), inputs.device
    penalty = strengths[:, None, None].repeat(1, 1, dim)
    penalty[..., -1] = 0
    solved = torch.empty_like(initial)
    converged = torch.zeros(len(strengths), dtype=torch.bool, device=device)
    steps = torch.full((len(strengths),), max_steps, device=device)
    active = torch.arange(len(strengths), device=device)
    width = GPU_TILE if device.type == "cuda" else TILE
    tiles = inputs.split(width)

    def logits_of(weights: Tensor) -> Tensor:
        rows = weights.reshape(-1, dim)
        logits = rows.new_empty(len(rows), images)
        for tile, part in zip(tiles, logits.split(width, 1), strict=True):
            torch.addmm(rows[:, -1:], rows[:, :-1], tile.T, out=part)
        return logits.view(-1, classes, images)

    def gradient_at(weights: Tensor, probabilities: Tensor) -> Tensor:
        residual = probabilities.clone()
        residual[:, *own] -= 1
        residual = residual.mul_(shares[:, None]).view(-1, images)
        gradient = torch.cat([residual @ inputs, residual.sum(1, keepdim=True)], 1)
        return gradient.view(-1, classes, dim).add_(penalty * weights)

    weights, logits = initial, logits_of(initial)
    probabilities = torch.softmax(logits, 1)
    gradient = gradient_at(weights, probabilities)
    past: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(max_steps):
        # It settles soon, and with many classes its eigenvectors are expensive.
        if step & (step - 1) == 0:
            spread, modes = _spread(probabilities, shares)
            scale = 1 / (spread[..., None] * moments + penalty)
        direction = _quasi_newton(gradient, modes, scale, past)
        slope = _dot(gradient, direction)
        done = (-slope / 2 <= tolerance).cpu()
        if done.any():
            out, left = (chosen.nonzero().squeeze(1).to(device) for chosen in (done, ~done))
            leaving = active[out]
            solved[leaving], converged[leaving], steps[leaving] = weights[out], True, step
            if done.all():
                return solved, converged, steps
            active, penalty, past = active[left], penalty[left], [(s[left], y[left], r[left]) for s, y, r in past]
            weights, logits, gradient = weights[left], logits[left], gradient[left]
            direction, slope, shares = direction[left], slope[left], shares[left]
            modes, scale = None if modes is None else modes[left], scale[left]
        if report is not None:
            report(solved_before + len(strengths) - len(active))
        moved = logits_of(direction)
        linear = _dot(penalty * weights, direction) - (moved[:, *own] * shares).sum(1)
        length, probabilities = _line_search(logits, moved, shares, linear, _dot(penalty * direction, direction), slope)
        change = length[:, None, None] * direction
        logits.addcmul_(length[:, None, None], moved)
        weights = weights + change
        previous, gradient = gradient, gradient_at(weights, probabilities)
        bend = gradient - previous
        curvature = _dot(change, bend)
        # A pair of nothing but rounding error gets no weight.
        valid = curvature > 1e-10 * _dot(bend, bend)
        past = [*past[1 - memory :], (change, bend, torch.where(valid, 1 / curvature, 0))]
    solved[active] = weights
    return solved, converged, steps


def _spread(probabilities: Tensor, shares: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues, eigenvectors of mean(diag p - p pᵀ); with many classes its diagonal and None."""
    weighted = probabilities * shares[:, None]
    if probabilities.shape[1] > MOST_MODES:
        diagonal = weighted.sum(2) - (weighted * probabilities).sum(2)
        return diagonal.clamp(min=1e-6 / probabilities.shape[1]), None
    spread = torch.diag_embed(weighted.sum(2)) - weighted @ probabilities.transpose(1, 2)
    values, modes = torch.linalg.eigh(spread)
    # It is 0 along (1, …, 1), a direction without any gradient.
    return values.clamp(min=1e-6 / spread.shape[1]), modes


def _quasi_newton(
    gradient: Tensor, modes: Tensor | None, scale: Tensor, past: list[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """The two loops of L-BFGS (Nocedal and Wright, algorithm 7.4), from `scale` in the modes."""
    direction, shares = gradient.clone(), []
    for change, bend, inverse in reversed(past):
        share = (inverse * _dot(change, direction))[:, None, None]
        direction.addcmul_(share, bend, value=-1)
        shares.append(share)
    if modes is None:
        direction *= scale
    else:
        direction = modes @ ((modes.transpose(1, 2) @ direction) * scale)
    for (change, bend, inverse), share in zip(past, reversed(shares), strict=True):
        direction.addcmul_(share - (inverse * _dot(bend, direction))[:, None, None], change)
    return direction.neg_()


def _line_search(
    logits: Tensor, moved: Tensor, shares: Tensor, linear: Tensor, square: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Finds the step length that halves the slope, by bracketed Newton steps; the softmax there.

    The problem is convex along the line, so the slope's sign shows on which side of the minimum a point lies; values,
    which float32 cannot tell apart near the end, are never compared.
    """
    length, low = torch.ones_like(slope), torch.zeros_like(slope)
    high = torch.full_like(slope, torch.inf)
    for attempt in range(20):
        probabilities = torch.softmax(torch.addcmul(logits, length[:, None, None], moved), 1)
        weighted = probabilities * moved
        mean = weighted.sum(1)
        here = (mean * shares).sum(1) + linear + length * square
        enough = here.abs() <= 0.5 * slope.abs()
        if enough.all() or attempt == 19:
            break
        curvature = ((weighted.mul_(moved).sum(1) - mean.square()) * shares).sum(1) + square
        low, high = torch.where(here < 0, length, low), torch.where(here > 0, length, high)
        newton = length - here / curvature
        middle = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        inside = (newton > low) & (newton < high)
        length = torch.where(enough, length, torch.where(inside, newton, middle))
    return length, probabilities


def _dot(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(left.flatten(1), right.flatten(1))
    return product
