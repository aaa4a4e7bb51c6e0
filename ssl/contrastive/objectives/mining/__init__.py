"""Which pairs and triplets of a batch are compared: an anchor's positives, and the negatives sampled for each."""

from contrastive.objectives.mining.batch import Batch, Classes, batch_of
from contrastive.objectives.mining.sampling import (
    All,
    DistanceWeighted,
    Easy,
    Hard,
    Random,
    Sampling,
    SemiHard,
    Triples,
    choose,
    refuse_off_sphere,
    shares,
)

__all__ = [
    "All",
    "Batch",
    "Classes",
    "DistanceWeighted",
    "Easy",
    "Hard",
    "Random",
    "Sampling",
    "SemiHard",
    "Triples",
    "batch_of",
    "choose",
    "refuse_off_sphere",
    "shares",
]
