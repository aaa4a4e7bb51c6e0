"""Mahalanobis distance: directions of large spread within classes have small weights."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.linear_metrics.linear_metric import ClassLabels, Features, LinearMetric, Report, labelled

Shrinkage = Annotated[float, Field(ge=0, le=1)]


class Mahalanobis(Settings):
    """Distances in units of the features' own spread: nothing is optimised."""

    name: Literal["mahalanobis"] = "mahalanobis"

    covariance: Literal["within", "total"] = "within"
    """within: of the images around the mean of their class; total: of all images around the common mean."""
    shrinkage: Shrinkage | None = None
    """Share of a multiple of the identity in the covariance; none: chosen from the features (Ledoit and Wolf 2004)."""

    @torch.no_grad()
    def fit(self, features: Features, labels: ClassLabels, *, report: Report | None = None) -> LinearMetric:
        """Fits d(x, y)² = (x − y)ᵀ Σ⁻¹ (x − y), with the shrunk covariance Σ of the labelled images.

        Images labelled −1 are left out.

        Examples:
            >>> features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
            >>> Mahalanobis(covariance="total", shrinkage=0).fit(features, torch.tensor([0, 0, 1, 1])).weights
            tensor([[1., 0.],
                    [0., 2.]])

        Raises:
            ValueError: if the features do not vary, or their covariance is singular without shrinkage.
        """
        data = labelled(features, labels)
        deviations = data.residuals if self.covariance == "within" else data.features
        covariance, shrinkage = shrunk_covariance(deviations, self.shrinkage)
        return data.metric(inverse_root(covariance), self, shrinkage=shrinkage)


def shrunk_covariance(deviations: Features, shrinkage: float | None) -> tuple[Float[Tensor, "dim dim"], float]:
    """(1 − s) S + s tr(S)/dim I and s, with S the mean of x xᵀ over deviations x from a mean.

    Without a shrinkage s, it is the one that Ledoit and Wolf (2004) estimate to have the least expected
    squared error: s = min(b², d²) / d², with d² = ‖S − tr(S)/dim I‖² and b² = Σ ‖x xᵀ − S‖² / images².

    Raises:
        ValueError: if no deviation differs from zero.
    """
    images, dim = deviations.shape
    matrix = deviations.T @ deviations / images
    scale = float(matrix.trace()) / dim
    if scale == 0:
        raise ValueError(
            "the features do not vary: within a class there is either a single image or equal features; "
            "give classes with several images"
        )
    if shrinkage is None:
        squares = float(matrix.square().sum())
        distance = squares - dim * scale**2
        # Σ ‖x xᵀ − S‖² = Σ |x|⁴ − images · ‖S‖², for S is the mean of x xᵀ.
        error = (float(deviations.square().sum(1).square().mean()) - squares) / images
        shrinkage = max(0.0, min(error, distance)) / distance if distance > 0 else 0.0
    identity = torch.eye(dim, dtype=matrix.dtype, device=matrix.device)
    return (1 - shrinkage) * matrix + shrinkage * scale * identity, shrinkage


def inverse_root(covariance: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    """Σ^(−1/2), symmetric.

    Raises:
        ValueError: if Σ is singular.
    """
    values, vectors = torch.linalg.eigh(covariance)
    least = float(values[-1]) * len(values) * torch.finfo(values.dtype).eps
    if float(values[0]) <= least:
        raise ValueError(
            f"the covariance has rank {int((values > least).sum())} of {len(values)}: there are directions in which "
            "the images of a class, or of similar pairs, do not differ; leave shrinkage unset, or give one above 0"
        )
    root: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return root
