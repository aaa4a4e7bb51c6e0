"""The objectives, chosen by name: each contrasts views of one image with other images, and differs in which."""

from typing import Annotated

from pydantic import Field

from contrastive.objectives.bank import Bank
from contrastive.objectives.in_batch import InBatch
from contrastive.objectives.log_ratio import LogRatio
from contrastive.objectives.loss import Loss, Population
from contrastive.objectives.loss import Objective as ObjectiveModule
from contrastive.objectives.margin import Margin
from contrastive.objectives.margin_softmax import MarginSoftmax
from contrastive.objectives.n_pair import NPair
from contrastive.objectives.nearest_neighbours import NearestNeighbours
from contrastive.objectives.noise_contrastive import NoiseContrastive
from contrastive.objectives.pairs import Contrastive
from contrastive.objectives.queue import Queue
from contrastive.objectives.ranking import Ranking
from contrastive.objectives.supervised import Supervised
from contrastive.objectives.triplets import Triplet

Objective = Annotated[
    InBatch
    | Queue
    | Bank
    | Supervised
    | NearestNeighbours
    | Contrastive
    | Triplet
    | Margin
    | MarginSoftmax
    | NoiseContrastive
    | NPair
    | LogRatio
    | Ranking,
    Field(discriminator="name"),
]

__all__ = [
    "Bank",
    "Contrastive",
    "InBatch",
    "LogRatio",
    "Loss",
    "Margin",
    "MarginSoftmax",
    "NPair",
    "NearestNeighbours",
    "NoiseContrastive",
    "Objective",
    "ObjectiveModule",
    "Population",
    "Queue",
    "Ranking",
    "Supervised",
    "Triplet",
]
