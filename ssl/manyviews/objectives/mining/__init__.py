"""Selection of the pairs and triplets of a batch: positives, and negatives sampled for each."""

from manyviews.objectives.mining.batch import Batch, batch_of, batch_of_rows, most_alike
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
from manyviews.objectives.mining.sphere import density

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
    "batch_of_rows",
    "choose",
    "density",
    "hardness",
    "most_alike",
    "of_objective",
    "refuse_no_margin",
    "refuse_off_sphere",
    "shares",
]
