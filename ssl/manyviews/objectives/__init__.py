"""Objectives, chosen by name; they differ in what an image's views are contrasted with."""

from typing import Annotated, get_args

from pydantic import Field, SerializeAsAny, WrapValidator

from manyviews.objectives.bank import Bank
from manyviews.objectives.contrastive import Contrastive
from manyviews.objectives.cpc import CPC
from manyviews.objectives.in_batch import InBatch
from manyviews.objectives.log_ratio import LogRatio
from manyviews.objectives.margin import Margin
from manyviews.objectives.margin_softmax import MarginSoftmax
from manyviews.objectives.n_pair import NPair
from manyviews.objectives.nnclr import NearestNeighbours
from manyviews.objectives.noise_contrastive import NoiseContrastive
from manyviews.objectives.objective import Loss
from manyviews.objectives.objective import Objective as ObjectiveModule
from manyviews.objectives.queue import Queue
from manyviews.objectives.ranking import Ranking
from manyviews.objectives.settings import ObjectiveSettings, Population, validate_external
from manyviews.objectives.supervised import Supervised
from manyviews.objectives.triplet import Triplet

Objective = Annotated[
    InBatch
    | CPC
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
    WrapValidator(validate_external),
    SerializeAsAny(),
]

OBJECTIVES: dict[str, type[ObjectiveSettings]] = {
    settings.model_fields["name"].default: settings for settings in get_args(get_args(Objective)[0])
}
"""Settings class of every objective of the union, by name."""

__all__ = [
    "CPC",
    "OBJECTIVES",
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
