"""Linear metrics learned on features, chosen by name: the distance after a linear map."""

from typing import Annotated

from pydantic import Field

from manyviews.linear_metrics.linear_metric import LinearMetric
from manyviews.linear_metrics.lmnn import LMNN
from manyviews.linear_metrics.mahalanobis import Mahalanobis
from manyviews.linear_metrics.mmc import MMC

Metric = Annotated[Mahalanobis | MMC | LMNN, Field(discriminator="name")]

__all__ = ["LMNN", "MMC", "LinearMetric", "Mahalanobis", "Metric"]
