"""Steps of L-BFGS (Nocedal and Wright, algorithm 7.4) that never raise the value, on a function that may change."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

MEMORY = 10
"""Pairs of moves and gradient changes that are remembered."""
SUFFICIENT = 1e-4
"""Share of the decrease that the slope promises which is enough (Armijo)."""
FIRST = 0.1
"""Length of the first move, as a share of the length of the place itself."""
ATTEMPTS = 20


class Point(NamedTuple):
    """A place, and the value and gradient there."""

    place: Float[Tensor, "rows columns"]
    value: float
    gradient: Float[Tensor, "rows columns"]


Function = Callable[[Tensor], Point]


class QuasiNewton:
    """The memory of a descent; deterministic, and no step raises the value."""

    def __init__(self) -> None:
        self._past: list[tuple[Tensor, Tensor]] = []

    def step(self, function: Function, here: Point) -> Point | None:
        """A lower point along the quasi-Newton direction, or along the gradient; none where there is no lower one."""
        for direction in (self._direction(here), self._first(here)) if self._past else (self._first(here),):
            found = _search(function, here, direction)
            if found is not None:
                move, bend = found.place - here.place, found.gradient - here.gradient
                # On a line search without a condition on the slope the curvature may be missing: nothing is learned.
                if (move * bend).sum() > 1e-10 * bend.square().sum():
                    self._past = [*self._past[1 - MEMORY :], (move, bend)]
                return found
            self._past = []
        return None

    def _first(self, here: Point) -> Tensor:
        length = here.gradient.norm()
        return -here.gradient * (FIRST * here.place.norm() / length) if length > 0 else torch.zeros_like(here.place)

    def _direction(self, here: Point) -> Tensor:
        direction, shares = here.gradient.clone(), []
        for move, bend in reversed(self._past):
            share = (move * direction).sum() / (move * bend).sum()
            direction -= share * bend
            shares.append(share)
        move, bend = self._past[-1]
        direction *= (move * bend).sum() / bend.square().sum()
        for (move, bend), share in zip(self._past, reversed(shares), strict=True):
            direction += (share - (bend * direction).sum() / (move * bend).sum()) * move
        return -direction


def _search(function: Function, here: Point, direction: Tensor) -> Point | None:
    """The first length, each the minimum of a parabola through what is known, at which the value is low enough."""
    slope, length = float((here.gradient * direction).sum()), 1.0
    if slope >= 0:
        return None
    for _ in range(ATTEMPTS):
        found = function(here.place + length * direction)
        if found.value <= here.value + SUFFICIENT * length * slope:
            return found
        curvature = found.value - here.value - length * slope
        best = -slope * length**2 / (2 * curvature)
        length = min(max(best, 0.1 * length), 0.5 * length)
    return None
