"""The objectives, chosen by name: each contrasts views of one image with other images, and differs in which."""

from typing import Annotated

from pydantic import Field

from contrastive.objectives.bank import Bank
from contrastive.objectives.in_batch import InBatch
from contrastive.objectives.loss import Loss, Population
from contrastive.objectives.loss import Objective as ObjectiveModule
from contrastive.objectives.nearest_neighbours import NearestNeighbours
from contrastive.objectives.queue import Queue
from contrastive.objectives.supervised import Supervised

Objective = Annotated[InBatch | Queue | Bank | Supervised | NearestNeighbours, Field(discriminator="name")]

__all__ = [
    "Bank",
    "InBatch",
    "Loss",
    "NearestNeighbours",
    "Objective",
    "ObjectiveModule",
    "Population",
    "Queue",
    "Supervised",
]
