"""A line of metrics whose figures, losses and health, are computed from copies while training goes on."""

from concurrent.futures import Future
from typing import NamedTuple

from torch import Tensor

from manyviews.run.health import EmbeddingSample, figures, similarities, without_repeats
from manyviews.system.background import HostCopy
from manyviews.train.budget import LossHistory


class Figures(NamedTuple):
    """What a line of metrics holds beside the pace."""

    losses: dict[str, float]
    health: dict[str, float]
    histograms: dict[str, Tensor]
    """Similarities of embeddings, by the name of their kind."""
    problem: Exception | None
    """Why the embeddings could not be examined."""


class Line(NamedTuple):
    """A line of metrics that is not written yet."""

    step: int
    progress: float
    values: dict[str, float]
    """What is known at its step."""
    figures: "Future[Figures]"


def figures_of(losses: LossHistory, sample: HostCopy | None, *, histograms: bool, once: bool = False) -> Figures:
    """Computes the figures of a line from copies, in any thread; with `once`, of each image once."""
    known = Figures(losses.means(), {}, {}, None)
    if sample is None:
        return known
    try:
        first, *others, ids = sample.read()
        seen = EmbeddingSample(first, others[0] if others else None, ids)
        seen = without_repeats(seen) if once else seen
        return known._replace(histograms=similarities(seen) if histograms else {}, health=figures(seen))
    except Exception as problem:
        return known._replace(problem=problem)
