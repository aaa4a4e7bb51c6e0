"""Linear metrics learned on features: the Euclidean distance after a linear map, chosen by name."""

from typing import Annotated

from pydantic import Field

from contrastive.distances.linear_metric import LinearMetric
from contrastive.distances.lmnn import LMNN
from contrastive.distances.mahalanobis import Mahalanobis
from contrastive.distances.mmc import MMC

Metric = Annotated[Mahalanobis | MMC | LMNN, Field(discriminator="name")]

__all__ = ["LMNN", "MMC", "LinearMetric", "Mahalanobis", "Metric"]
