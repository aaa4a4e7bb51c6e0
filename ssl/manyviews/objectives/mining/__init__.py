"""Selection of the pairs and triplets of a batch: positives, and negatives sampled for each."""

from manyviews.objectives.mining.batch import Batch, batch_of, most_alike
from manyviews.objectives.mining.hardness import hardness, shares
from manyviews.objectives.mining.sampling import (
    All,
    DistanceWeighted,
    Easiest,
    Hard,
    Hardest,
    Random,
    Sampling,
    SemiHard,
    choose,
    refuse_off_sphere,
)

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
    "batch_of",
    "choose",
    "hardness",
    "most_alike",
    "refuse_off_sphere",
    "shares",
]
