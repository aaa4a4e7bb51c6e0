"""MMC (Xing et al. 2002): similar images near, dissimilar ones far on average; convex."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.engine.rows import slices
from manyviews.linear_metrics.linear_metric import ClassLabels, Features, LinearMetric, Report, labelled
from manyviews.linear_metrics.mahalanobis import Shrinkage, inverse_root, shrunk_covariance

Pairs = Int[Tensor, "pairs 2"]
Same = Float[Tensor, " pairs"]
TILE, GPU_TILE = 1 << 9, 1 << 13
"""Rows and columns of a tile of pairs: 1 MiB of distances, and on a GPU 256 MiB."""
FIRST = 1_000
"""Images of a first, smaller problem, whose solution is a start from which few steps with all images remain."""


class MMC(Settings):
    """Minimises squared distances within classes for given distances between classes.

    Examples:
        >>> MMC().fit(torch.eye(4), torch.tensor([0, 0, 1, 1])).weights.shape
        torch.Size([4, 4])
    """

    name: Literal["mmc"] = "mmc"

    diagonal: bool = False
    """One weight for each feature instead of a full matrix."""
    prior: float = Field(0.9, ge=0, le=1)
    """Share of the squared distances within classes that is the Euclidean distance's in any case; the paper has 0."""
    shrinkage: Shrinkage | None = None
    """As of mahalanobis, of the scatter within classes; the paper has 0."""
    most: int = Field(20_000, ge=2, le=1_000_000)
    """Images whose pairs are dissimilar pairs, evenly drawn; the time grows with the square."""
    iterations: int = Field(200, ge=1, le=1_000_000)
    """Steps at most."""
    tolerance: float = Field(1e-3, gt=0, le=1e4)
    """It ends when the distances between classes are proved to be within this share of the largest possible."""

    relations: str | None = None
    """File of pairs (a,b,same) of training images that are pulled and pushed in place of their classes; `evaluate`
    reads it."""

    @torch.no_grad()
    def fit(self, features: Features, labels: ClassLabels, *, report: Report | None = None) -> LinearMetric:
        """Fits the metric A ⪰ 0 with the least Σ_S ‖x − y‖²_A such that the mean of ‖x − y‖_A over D is 1 at least.

        S are all pairs within a class, D all pairs of different classes (equation 3, with the mean for the sum, which
        only scales A). Images labelled −1 are left out. By homogeneity it is the A with the largest sum over D for a
        given sum over S, which in coordinates where the scatter within classes is the identity is the trace of A. There
        `ascend` replaces the paper's projected gradient steps, and its Newton steps on the diagonal problem.

        The paper's optimum is nearly of rank one if one difference between classes is much larger than all others: good
        to separate two clusters, bad for nearest neighbours in many classes. Hence the prior.

        Raises:
            ValueError: if there is one class only, or the scatter is singular without shrinkage.
        """
        data = labelled(features, labels, classes=2)
        # The sum over the pairs of a class of squared differences is its size times the sum of squared residuals.
        residuals = data.residuals * data.counts[data.labels].double().sqrt()[:, None]
        covariance, shrinkage = shrunk_covariance(residuals, self.shrinkage)
        whitening, fixed, free = self._start(covariance)
        inputs = (data.features @ whitening).to(features.dtype if features.dtype == torch.float64 else torch.float32)
        order = data.labels.argsort(stable=True)
        for images in sorted({min(images, self.most, len(order)) for images in (FIRST, len(order))}):
            chosen = order[torch.linspace(0, len(order) - 1, images).round().long().to(order.device)]
            apart = partial(between, inputs=inputs[chosen], labels=data.labels[chosen])
            ascent = ascend(inputs[chosen], apart, fixed, free, self, report=report)
            free = ascent.free
        weights = root(fixed + free) @ whitening / ascent.values[-1]
        # Over pairs of a class, the mean of squared differences is twice that of squared residuals, by pairs.
        sizes = data.counts[data.labels].double()
        within = float(sizes @ (data.residuals @ weights.T).square().sum(1)) / float((sizes - 1).sum() / 2)
        iterations = len(ascent.values) - 1
        return data.metric(weights, self, shrinkage=shrinkage, iterations=iterations, gap=ascent.gap, within=within)

    @torch.no_grad()
    def fit_pairs(self, features: Features, pairs: Pairs, same: Same, *, report: Report | None = None) -> LinearMetric:
        """Fits the metric A ⪰ 0 with the least Σ_S ‖x − y‖²_A such that the mean of ‖x − y‖_A over D is 1 at least.

        S and D are given pairs of images (the paper's equation 3): those that are the `same`, 1, and those that are
        not, 0. A pair that is s the same, between 0 and 1, counts s in S and 1 − s in D. All pairs are used; `most` is
        for classes. Otherwise it is `fit`, with the covariance of the differences of pairs in S.

        Args:
            features: of all images.
            pairs: indices of two images each.
            same: how similar they are.
            report: called with the steps done.

        Raises:
            ValueError: if a pair names an image that is not there, all pairs are similar, or all dissimilar, features
                of pairs are not finite, or those of similar pairs are equal, or singular without shrinkage.

        Examples:
            >>> features = torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 0.0], [1.0, 1.0]])
            >>> pairs, same = torch.tensor([[0, 1], [2, 3], [0, 2]]), torch.tensor([1.0, 1.0, 0.0])
            >>> MMC(prior=0.0, shrinkage=0.1).fit_pairs(features, pairs, same).weights.abs().argmax(1)
            tensor([0, 0])
        """
        apart, middle, near = _differences(features, pairs, same)
        similar, different = near[:, None], 1 - near
        covariance, shrinkage = shrunk_covariance((apart * similar.sqrt())[near > 0], self.shrinkage)
        whitening, fixed, free = self._start(covariance)
        inputs, weights_of = (apart @ whitening)[different > 0], different[different > 0]
        ascent = ascend(
            inputs, partial(between_pairs, inputs=inputs, weights=weights_of), fixed, free, self, report=report
        )
        weights = root(fixed + ascent.free) @ whitening / ascent.values[-1]
        within = float((near * (apart @ weights.T).square().sum(1)).sum() / near.sum())
        figures = {"shrinkage": shrinkage, "iterations": len(ascent.values) - 1, "gap": ascent.gap, "within": within}
        settings = self.model_dump(mode="json")
        return LinearMetric(weights.float(), middle.float(), settings, figures | {"pairs": len(pairs)})

    def _start(self, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whitening of a covariance and, in its coordinates, the Euclidean distance's share and the rest at first."""
        if self.diagonal:
            covariance = covariance.diagonal().diag()
        fixed = self.prior * covariance / covariance.trace()
        free = torch.eye(len(covariance)).to(fixed) * (1 - self.prior) / len(covariance)
        return inverse_root(covariance), fixed, free


class Ascent(NamedTuple):
    """Result of `ascend`."""

    free: Float[Tensor, "dim dim"]
    values: list[float]
    """Mean distance between classes before the first step and after each."""
    gap: float
    """Upper bound of the share by which any metric's mean distance exceeds the last one."""


def ascend(
    inputs: Features,
    apart: Callable[[Features], tuple[float, Tensor]],
    fixed: Float[Tensor, "dim dim"],
    free: Float[Tensor, "dim dim"],
    settings: MMC,
    *,
    report: Report | None = None,
) -> Ascent:
    """Maximises g(B) = mean of ‖z‖_(fixed + B) over differences z of dissimilar pairs; B ⪰ 0 of free's trace.

    `apart` is `between` or `between_pairs`, for inputs that are mapped.

    A step is B ← c G B G, with G = the gradient of g, and c such that the trace stays (a diagonal B stays diagonal with
    G's diagonal). With B = LᵀL it maximises the bound ‖z‖_new ≥ ⟨z, z⟩ / ‖z‖_old that Cauchy and Schwarz give, in
    which ⟨ ⟩ is between the old and the new image of z, so g never falls. g is concave, so
    trace · λ_max(G) − ⟨G, B⟩ bounds what is missing to the maximum.
    """
    trace, values = float(free.trace()), list[float]()
    for step in range(settings.iterations + 1):
        total, scatter = apart(inputs @ root(fixed + free).to(inputs))
        gradient = scatter / 2
        if settings.diagonal:
            gradient = gradient.diagonal().diag()
        largest = float(torch.linalg.eigvalsh(gradient)[-1])
        gap = max(0.0, trace * largest - float((gradient * free).sum())) / total
        values.append(total)
        if report is not None:
            report("MMC", step, settings.iterations)
        if gap <= settings.tolerance or step == settings.iterations:
            break
        free = gradient @ free @ gradient
        free = free * (trace / free.trace())
    return Ascent(free, values, gap)


def between(
    mapped: Float[Tensor, "images rank"], inputs: Features, labels: ClassLabels
) -> tuple[float, Float[Tensor, "dim dim"]]:
    """Means over all pairs of images with unlike labels: of ‖m‖, and of z zᵀ / ‖m‖.

    m are the differences of `mapped` and z those of `inputs`. In tiles of pairs, each pair once, with two products of a
    tile: Σ w z zᵀ = Zᵀ (diag(Σ w) − w) Z. Pairs that coincide count as very near, not with an infinite weight.
    """
    squares = mapped.square().sum(1)
    least = torch.finfo(mapped.dtype).eps * float(squares.mean())
    weighted, degrees = torch.zeros_like(inputs), torch.zeros_like(squares)
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    side = GPU_TILE if inputs.device.type == "cuda" else TILE
    for rows in slices(0, len(inputs), side):
        for columns in slices(rows.start, len(inputs), side):
            distances = torch.addmm(squares[columns][None], mapped[rows], mapped[columns].T, alpha=-2)
            distances = distances.add_(squares[rows, None]).clamp_(min=least or 1.0).sqrt_()
            unlike = labels[rows, None] != labels[columns]
            weights = distances.reciprocal().mul_(unlike)
            # A tile on the diagonal has each of its pairs twice.
            total += (distances.mul_(unlike)).sum() * (0.5 if rows == columns else 1.0)
            weighted[rows].addmm_(weights, inputs[columns])
            degrees[rows] += weights.sum(1)
            if rows != columns:
                weighted[columns].addmm_(weights.T, inputs[rows])
                degrees[columns] += weights.sum(0)
    pairs = (len(labels) ** 2 - int(labels.bincount().square().sum())) / 2
    scatter = (inputs.T @ (degrees[:, None] * inputs - weighted)).double()
    return float(total) / pairs, (scatter + scatter.T) / 2 / pairs


def between_pairs(
    mapped: Float[Tensor, "pairs rank"], inputs: Float[Tensor, "pairs dim"], weights: Float[Tensor, " pairs"]
) -> tuple[float, Float[Tensor, "dim dim"]]:
    """Weighted means over pairs, as of `between`; `mapped` are the differences m, and `inputs` the differences z."""
    squares, total = mapped.square().sum(1), float(weights.sum())
    least = torch.finfo(mapped.dtype).eps * float(squares.mean())
    distances = squares.clamp(min=least or 1.0).sqrt()
    scatter = inputs.T @ ((weights / distances)[:, None] * inputs)
    return float(weights @ distances) / total, (scatter + scatter.T) / 2 / total


def root(matrix: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    """Symmetric root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    symmetric: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return symmetric


def check_similarities(same: Same) -> None:
    """Raises ValueError unless some pairs are similar and some dissimilar."""
    similar, dissimilar = bool((same > 0).any()), bool((same < 1).any())
    if not (similar and dissimilar):
        raise ValueError(
            f"none of the {len(same)} pairs is {'dissimilar' if similar else 'similar'}: a metric pulls similar ones "
            "together and pushes dissimilar ones apart; give both, same=1 and same=0"
        )


def _differences(features: Features, pairs: Pairs, same: Same) -> tuple[Tensor, Tensor, Tensor]:
    """Differences of the features of pairs, the mean of all their images, and how similar they are; in float64."""
    last = int(pairs.max()) if len(pairs) else -1
    if len(pairs) != len(same) or (len(pairs) and not 0 <= int(pairs.min()) <= last < len(features)):
        raise ValueError(
            f"{len(pairs)} pairs of images up to {last}, with {len(same)} similarities, are not pairs of the "
            f"{len(features)} images whose features were given"
        )
    pairs, near = pairs.to(features.device), same.to(features.device).double()
    check_similarities(near)
    used = features.detach()[pairs.unique()].double()
    if not used.isfinite().all():
        raise ValueError("some features are not finite; extract them again in fp32, or train the backbone anew")
    first, second = features.detach()[pairs].double().unbind(1)
    apart = first - second
    if not bool(apart[near > 0].any()):
        raise ValueError("the features of all similar pairs are equal, in every direction; give pairs that differ")
    return apart, used.mean(0), near
