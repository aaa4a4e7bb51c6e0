"""The distance that neighbours are found by: cosine, Euclidean, or a linear metric fitted on training images."""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.evaluators.distance import Nearness
from manyviews.linear_metrics import LinearMetric
from manyviews.linear_metrics import Metric as Fitted

Report = Callable[[str, int, int], None]


class Cosine(Settings):
    """The cosine of the features."""

    name: Literal["cosine"] = "cosine"


class Euclidean(Settings):
    """The Euclidean distance of the features as they are, which the fitted metrics begin from."""

    name: Literal["euclidean"] = "euclidean"


Metric = Annotated[Cosine | Euclidean | Fitted, Field(discriminator="name")]


class Measured(NamedTuple):
    """Features in which neighbours are searched, and by which of the two products."""

    train: Float[Tensor, "train dim"] | None
    test: Float[Tensor, "test dim"]
    nearness: Nearness
    fitted: LinearMetric | None


def is_fitted(metric: Metric) -> bool:
    """Whether the metric is learned from training features."""
    return not isinstance(metric, Cosine | Euclidean)


def apply(
    metric: Metric,
    train: Float[Tensor, "train dim"] | None,
    test: Float[Tensor, "test dim"],
    labels: Int[Tensor, " train"],
    fitting: Int[Tensor, " fitting"],
    *,
    report: Report | None = None,
) -> Measured:
    """The features after the metric's linear map, if it has one, fitted on the training images that `fitting` names."""
    if isinstance(metric, Cosine | Euclidean):
        return Measured(train, test, metric.name, None)
    assert train is not None, "a metric is fitted on training images"
    fitted = metric.fit(train[fitting], labels[fitting], report=report)
    return Measured(fitted.transform(train), fitted.transform(test), "euclidean", fitted)
