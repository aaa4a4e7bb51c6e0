"""Selection of the pairs and triplets of a batch: positives, and negatives sampled for each."""

from manyviews.objectives.mining.batch import Batch, batch_of, most_alike
from manyviews.objectives.mining.hardness import hardness, shares
from manyviews.objectives.mining.samplers import (
    All,
    DistanceWeighted,
    Easiest,
    Hard,
    Hardest,
    Random,
    Sampling,
    SemiHard,
    WithinMargin,
    of_objective,
    refuse_no_margin,
    refuse_off_sphere,
)
from manyviews.objectives.mining.sampling import choose

__all__ = [
    "All",
    "Batch",
    "DistanceWeighted",
    "Easiest",
    "Hard",
    "Hardest",
    "Random",
    "Sampling",
    "SemiHard",
    "WithinMargin",
    "batch_of",
    "choose",
    "hardness",
    "most_alike",
    "of_objective",
    "refuse_no_margin",
    "refuse_off_sphere",
    "shares",
]
