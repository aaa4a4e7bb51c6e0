"""Similarity of features, by cosine or Euclidean distance, as searchable inner products."""

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.data import Report
from manyviews.engine import squared_distance_rows
from manyviews.features.placing import placed
from manyviews.linear_metrics import MMC, LinearMetric
from manyviews.linear_metrics import Metric as Fitted

Nearness = Literal["cosine", "euclidean"]


class Cosine(Settings):
    """The cosine of the features."""

    name: Literal["cosine"] = "cosine"


class Euclidean(Settings):
    """The Euclidean distance of the features as they are, which the fitted metrics begin from."""

    name: Literal["euclidean"] = "euclidean"


Metric = Annotated[Cosine | Euclidean | Fitted, Field(discriminator="name")]


class MetricPairs(NamedTuple):
    """Pairs of training images that a metric is fitted on in place of classes."""

    images: Int[Tensor, "pairs 2"]
    """Their indices."""
    same: Float[Tensor, " pairs"]
    """How similar they are, from 0 to 1."""


class MappedFeatures(NamedTuple):
    """Features that neighbours are searched in, and the similarity to search by."""

    train: Float[Tensor, "train dim"] | None
    test: Float[Tensor, "test dim"]
    nearness: Nearness
    fitted: LinearMetric | None
    metric: str


def searchable(
    queries: Float[Tensor, "queries dim"], references: Float[Tensor, "references dim"], nearness: Nearness
) -> tuple[Float[Tensor, "queries wide"], Float[Tensor, "references wide"]]:
    """Returns rows for `engine.top_k` with the similarities as their inner products.

    The similarity is the cosine, or −d² / (2 v) of the Euclidean distance d, where v is the mean squared distance of
    the references from their mean. Pairs of references then have −1 on average whatever the scale of the features, and
    for unit rows with mean 0 it is the cosine less 1: the temperatures of a kNN vote mean the same in both. Either
    side stays on its device.
    """
    if nearness == "cosine":
        return F.normalize(queries, dim=1, eps=1e-6), F.normalize(references, dim=1, eps=1e-6)
    variance = (references - references.mean(0)).square().sum(1).mean()
    left, right = squared_distance_rows(queries.to(references.device), references)
    return (left / (-2 * torch.where(variance > 0, variance, 1))).to(queries.device), right


def similarity_of_pairs(
    features: Float[Tensor, "images dim"], pairs: Int[Tensor, "pairs 2"], nearness: Nearness
) -> Float[Tensor, " pairs"]:
    """Computes the cosine, or minus the squared Euclidean distance, of each pair, in float64."""
    if nearness == "cosine":
        features = F.normalize(features, dim=1, eps=1e-6)
    pieces = []
    for part in pairs.split(8192):
        first, second = features[part[:, 0]].double(), features[part[:, 1]].double()
        pieces.append((first * second).sum(1) if nearness == "cosine" else -(first - second).square().sum(1))
    return torch.cat(pieces)


def distance_of(similarity: float, nearness: Nearness) -> float:
    """Returns a result of `similarity_of_pairs` as the cosine, or as the Euclidean distance.

    Examples:
        >>> distance_of(-4.0, "euclidean"), distance_of(0.5, "cosine")
        (2.0, 0.5)
    """
    return similarity if nearness == "cosine" else max(-similarity, 0.0) ** 0.5


def is_fitted(metric: Metric | None) -> bool:
    """Returns whether the metric is learned from training features; None is the cosine."""
    return not isinstance(metric, Cosine | Euclidean | None)


def takes_classes(metric: Metric | None) -> bool:
    """Returns whether the metric is learned from the classes of training images."""
    return is_fitted(metric) and not (isinstance(metric, MMC) and metric.relations is not None)


def map_features(
    metric: Metric,
    train: Float[Tensor, "train dim"] | None,
    test: Float[Tensor, "test dim"],
    labels: Int[Tensor, " train"],
    fitting: Int[Tensor, " fitting"],
    *,
    pairs: MetricPairs | None = None,
    report: Report | None = None,
) -> MappedFeatures:
    """Fits the metric's linear map on the images `fitting`, or on `pairs`, if it has one, and applies it."""
    if isinstance(metric, Cosine | Euclidean):
        return MappedFeatures(train, test, metric.name, None, metric.name)
    assert train is not None, "a metric is fitted on training images"
    if pairs is not None and isinstance(metric, MMC):
        fitted = metric.fit_pairs(train, *pairs, report=report)
    else:
        # Copies in float64: of the features, centred, and their residuals.
        fitted = metric.fit(placed(train[fitting], 8), labels[fitting], report=report)
    return MappedFeatures(fitted.transform(train), fitted.transform(test), "euclidean", fitted, metric.name)
