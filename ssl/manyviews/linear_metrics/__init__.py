"""Linear metrics learned on features: the Euclidean distance after a linear map, chosen by name."""

from typing import Annotated

from pydantic import Field

from manyviews.linear_metrics.linear_metric import LinearMetric
from manyviews.linear_metrics.lmnn import LMNN
from manyviews.linear_metrics.mahalanobis import Mahalanobis
from manyviews.linear_metrics.mmc import MMC

Metric = Annotated[Mahalanobis | MMC | LMNN, Field(discriminator="name")]

__all__ = ["LMNN", "MMC", "LinearMetric", "Mahalanobis", "Metric"]
