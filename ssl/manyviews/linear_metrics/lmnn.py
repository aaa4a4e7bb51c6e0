"""LMNN (Weinberger and Saul 2009): a class nearer than other classes, by a margin."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from manyviews.config import Settings
from manyviews.engine import squared_distance_rows, top_k
from manyviews.engine.rows import slices
from manyviews.linear_metrics.linear_metric import ClassLabels, Features, Labelled, LinearMetric, Report, labelled
from manyviews.linear_metrics.mahalanobis import inverse_root, shrunk_covariance

Neighbours = Int[Tensor, "images neighbours"]
Pairs = Int[Tensor, "2 pairs"]
"""Images and, for each, one of another class that is, or may become, an impostor; sorted by image."""

PAIRS = 1 << 13
"""Pairs whose differences are in memory at a time: a few MiB, which fit in the cache."""
TILE = 512
"""Images whose distances to all others are in memory at a time."""
GPU_NUMBERS = 1 << 27
"""Numbers of differences, or distances, in the memory of a GPU at a time: 512 MiB."""
STEPS = 10
"""Steps between searches for impostors, and gradients that L-BFGS keeps."""
PULLED = 3.0
"""Mean squared distance of target neighbours at the start, in margins: about where rescaling gains nothing."""
RESERVE = 0.1
"""Share of the squared distance by which images beyond an impostor's reach are included, as they may become one."""


class LMNN(Settings):
    """Pulls neighbours of a class together, and pushes other classes out of their neighbourhood.

    Examples:
        >>> LMNN().fit(torch.eye(4), torch.tensor([0, 0, 1, 1])).weights.shape
        torch.Size([4, 4])
    """

    name: Literal["lmnn"] = "lmnn"

    neighbours: int = Field(3, ge=1, le=10_000)
    """Target neighbours of each image: the nearest of its class before anything is learned."""
    push: float = Field(0.5, gt=0, lt=1)
    """The paper's μ: the weight of the pushing terms; the pulling terms have the rest."""
    rank: int | None = Field(None, ge=1, le=65_536)
    """Dimensions of the transformed features; none: as many as before."""
    start: Literal["pca", "whitening"] = "pca"
    """pca: the principal components, all of which are the Euclidean distance; whitening: those after mahalanobis."""
    iterations: int = Field(100, ge=1, le=1_000_000)
    """Steps at most."""
    tolerance: float = Field(1e-2, gt=0, le=1e4)
    """It ends when ten steps lower the loss by less than this share."""

    @torch.no_grad()
    def fit(self, features: Features, labels: ClassLabels, *, report: Report | None = None) -> LinearMetric:
        """Fits the linear map L, [rank, dim], that minimises `lmnn_loss`, by descent from a start.

        The paper's solver takes subgradient steps on M = LᵀL and projects them (appendix A); descent on L needs no
        projection and allows a rank. Without a rank the minimum is that of the convex problem in M, whatever the start,
        and the Euclidean distance is the fastest one; with a rank, whitening finds the directions between classes that
        a large spread within them hides. Features are rescaled first, so their unit does not matter. Images labelled −1
        are left out. An image has fewer target neighbours if its class has fewer images; the only image of a class
        pulls nothing and only pushes.

        Raises:
            ValueError: if there is one class only, no class has two images, or the rank is above the dimensions.
        """
        data = labelled(features, labels, classes=2)
        dim = features.shape[1]
        if self.rank is not None and self.rank > dim:
            raise ValueError(f"rank {self.rank} is above the {dim} dimensions of the features; leave it unset")
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        targets = target_neighbours(data, self.neighbours)
        directions = self._initial(data)
        mapped = data.features @ directions.T
        pulled = _squared_distances(mapped, targets)[targets >= 0].mean() / PULLED
        if pulled == 0:
            raise ValueError("all target neighbours coincide; give features that differ within a class")
        unit = float(pulled.sqrt())
        inputs = (data.features / unit).to(dtype)
        weights, values, steps, active = descend(directions, inputs, data.labels, targets, self, report=report)
        return data.metric(weights / unit, self, loss=values[-1], start=values[0], iterations=steps, active=active)

    def _initial(self, data: Labelled) -> Float[Tensor, "rank dim"]:
        whitening = torch.eye(data.features.shape[1]).to(data.features)
        if self.start == "whitening":
            whitening = inverse_root(shrunk_covariance(data.residuals, None)[0])
        mapped = data.features @ whitening
        components = torch.linalg.eigh(mapped.T @ mapped).eigenvectors
        chosen: Tensor = components[:, -(self.rank or components.shape[1]) :].T @ whitening
        return chosen


def lmnn_loss(
    weights: Float[Tensor, "rank dim"], features: Features, targets: Neighbours, impostors: Pairs, push: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "rank dim"], Int[Tensor, ""]]:
    """(1 − μ) Σ_{j⇝i} d_ij + μ Σ_{j⇝i, l} [1 + d_ij − d_il]₊ with d = ‖L(x − y)‖², its gradient, and active triplets.

    With L = `weights`, x = `features` and μ = `push`. l runs over the impostor pairs of i; with all pairs of unlike
    labels among them it is the paper's loss, and with all that are nearer than 1 + max_j d_ij as well. float64 in the
    sums over images, and in the result. Active is a triplet with a hinge above zero.
    """
    mapped = features @ weights.to(features).T
    pulled = _squared_distances(mapped, targets)
    reach = (1 + pulled).masked_fill_(targets < 0, -torch.inf)
    pushed = torch.zeros((), dtype=torch.float64, device=features.device)
    counts = torch.zeros_like(reach)
    weight = torch.empty(impostors.shape[1], dtype=features.dtype, device=features.device)
    at_once = max(PAIRS, GPU_NUMBERS // mapped.shape[1]) if mapped.device.type == "cuda" else PAIRS
    for part in slices(0, len(weight), at_once):
        images, others = impostors[:, part]
        distances = (mapped[images] - mapped[others]).square_().sum(1)
        hinges = (reach[images] - distances[:, None]).clamp_(min=0)
        pushed += hinges.sum(dtype=torch.float64)
        active = (hinges > 0).to(features.dtype)
        weight[part] = active.sum(1)
        counts.index_add_(0, images, active)
    # Σ w (x − y)(x − y)ᵀ over pairs is Xᵀ (degrees − w − wᵀ) X, with w as a sparse matrix of all pairs.
    pull = ((1 - push) + push * counts).masked_fill_(targets < 0, 0)
    weight *= -push
    degrees = pull.sum(1).index_add_(0, targets.clamp(min=0).flatten(), pull.flatten())
    images, others = impostors
    degrees.index_add_(0, images, weight).index_add_(0, others, weight)
    offsets = torch.searchsorted(images, torch.arange(len(features), device=features.device))
    products = F.embedding_bag(targets.clamp(min=0), features, per_sample_weights=pull, mode="sum")
    products = products + F.embedding_bag(others, features, offsets, per_sample_weights=weight, mode="sum")
    scatter = (features.T @ (degrees[:, None] * features)).double()
    crossed = (features.T @ products).double()
    gradient = 2 * weights.double() @ (scatter - crossed - crossed.T)
    loss = (1 - push) * pulled[targets >= 0].sum(dtype=torch.float64) + push * pushed
    return loss, gradient, counts.sum(dtype=torch.float64).long()


def target_neighbours(data: Labelled, neighbours: int) -> Neighbours:
    """Finds the nearest images of the same class, nearest first; −1 where the class has no more.

    Raises:
        ValueError: if no class has two images.
    """
    most = min(neighbours, int(data.counts.max()) - 1)
    if most < 1:
        raise ValueError("no class has two images, hence no neighbours to pull; give classes with several images")
    targets = data.labels.new_full((len(data.labels), most), -1)
    members = torch.split(data.labels.argsort(stable=True), data.counts.tolist())
    for own in members:
        if len(own) > 1:
            left, right = squared_distance_rows(data.features[own], data.features[own])
            ids = torch.arange(len(own), device=own.device)
            nearest = top_k(-left, right, min(most, len(own) - 1), query_ids=ids, key_ids=ids)[1]
            targets[own, : nearest.shape[1]] = own[nearest]
    return targets


def find_impostors(
    weights: Float[Tensor, "rank dim"], features: Features, labels: ClassLabels, targets: Neighbours, reserve: float
) -> Pairs:
    """Finds all pairs of unlike labels nearer than (1 + max_j d_ij) · (1 + reserve); exact."""
    mapped = features @ weights.to(features).T
    reach = (1 + reserve) * (1 + _squared_distances(mapped, targets)).masked_fill_(targets < 0, -torch.inf).amax(1)
    left, right = squared_distance_rows(mapped, mapped)
    impostors = []
    height = max(1, GPU_NUMBERS // len(mapped)) if mapped.device.type == "cuda" else TILE
    for rows in slices(0, len(mapped), height):
        near = left[rows] @ right.T < reach[rows, None]
        pairs = near.logical_and_(labels[rows, None] != labels).nonzero()
        pairs[:, 0] += rows.start
        impostors.append(pairs)
    return torch.cat(impostors).T.contiguous()


class Descent(NamedTuple):
    """Result of `descend`."""

    weights: Float[Tensor, "rank dim"]
    values: list[float]
    """Loss with all impostors, at the start and after each search for them."""
    steps: int
    active: int
    """Active triplets of the last loss."""


def descend(
    weights: Float[Tensor, "rank dim"],
    features: Features,
    labels: ClassLabels,
    targets: Neighbours,
    settings: LMNN,
    *,
    report: Report | None = None,
) -> Descent:
    """Lowers `lmnn_loss` from `weights` by L-BFGS; deterministic.

    Impostors are searched exactly every few steps; in between only those and some reserve are used, which gives a lower
    bound of the loss. If an image outside them has come too near and the loss has risen, the steps are undone and
    repeated with that image among the impostors. So the loss never rises.
    """
    values, steps, active = list[float](), 0, 0
    start, impostors = weights, find_impostors(weights, features, labels, targets, RESERVE)
    point, optimiser = _optimiser(start)
    while True:

        def closure(among: Pairs = impostors, at: nn.Parameter = point) -> float:
            loss, at.grad, _ = lmnn_loss(at.detach(), features, targets, among, settings.push)
            return float(loss)

        values = values or [closure()]
        before, optimiser.param_groups[0]["max_iter"] = steps, min(STEPS, settings.iterations - steps)
        done = optimiser.state[point].get("n_iter", 0)
        optimiser.step(closure)
        steps += optimiser.state[point]["n_iter"] - done
        if report is not None:
            report("LMNN", steps, settings.iterations)
        reached = point.detach().clone()
        nearest = find_impostors(reached, features, labels, targets, RESERVE)
        loss, _, triplets = lmnn_loss(reached, features, targets, nearest, settings.push)
        if steps > before and float(loss) > values[-1]:
            impostors = torch.cat([impostors, nearest], 1).unique(dim=1).contiguous()
            point, optimiser = _optimiser(start)
        else:
            start, impostors = reached, nearest
            values.append(min(float(loss), values[-1]))
            active = int(triplets)
            if values[-2] - values[-1] <= settings.tolerance * values[-2]:
                return Descent(start, values, steps, active)
        if steps in (before, settings.iterations):
            return Descent(start, values, steps, active)


def _optimiser(start: Tensor) -> tuple[nn.Parameter, torch.optim.LBFGS]:
    """L-BFGS with a line search, without its own thresholds for a minimum."""
    point = nn.Parameter(start.clone())
    search: Any = {"history_size": STEPS, "line_search_fn": "strong_wolfe"}
    return point, torch.optim.LBFGS([point], tolerance_grad=0, tolerance_change=0, **search)


def _squared_distances(mapped: Float[Tensor, "images rank"], targets: Neighbours) -> Float[Tensor, "images neighbours"]:
    columns = [(mapped - mapped[column]).square().sum(1) for column in targets.clamp(min=0).T]
    return torch.stack(columns, 1)
