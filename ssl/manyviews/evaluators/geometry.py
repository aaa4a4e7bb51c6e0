"""Geometry of features: alignment, uniformity, rank; common neighbours; stale bank rows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from manyviews.data import Images, sample_ids
from manyviews.data.pictures import pictures
from manyviews.engine import directions, log_sum_exp, normalize, top_k
from manyviews.evaluators.results.measurement import Measurement
from manyviews.features.encoding import evaluation_mode
from manyviews.run import health
from manyviews.system import distributed
from manyviews.views import MEAN, STD, Views, restored

IMAGES = 25_600
"""Most images that are used, sampled from more (Garrido et al. 2023 report that the rank has settled by then)."""
BANK = "memory bank"
QUANTILES: Mapping[str, float] = {"5 %": 0.05, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "95 %": 0.95}


@torch.no_grad()
def geometry(
    kind: str,
    features: Float[Tensor, "images dim"],
    views: tuple[Float[Tensor, "pairs wide"], Float[Tensor, "pairs wide"]] | None,
    *,
    seed: int,
) -> tuple[Measurement, ...]:
    """Measures effective rank, uniformity and alignment of one kind of features, without labels.

    The effective rank is the number of directions that the features use, at most the number of images or dimensions;
    the uniformity is 0 if all features are equal or zero, and about −4 + 8 / dim if they are spread evenly over the
    sphere; the alignment is 0 if both views of every image have one direction, 2 for unrelated views. Compare them
    between runs of one method.

    The rank is that of the features as they are, neither centred nor normalised (Garrido et al. 2023, RankMe, equations
    1 and 2, without the 1e-7 that they add to each share); the rest is of unit features. Of more than 25,600 images, a
    sample is used. Collective: all ranks pass all features and get the same numbers.

    `views` are features of two views of the same images, row by row; without them there is no alignment.

    Raises:
        ValueError: if there are fewer than 2 images, or numbers that are not finite.
    """
    count, dim = features.shape
    if count < 2:
        raise ValueError(f"{kind}: the geometry of features takes 2 images or more, and there are {count}")
    if count > IMAGES:
        features = features[sample_ids(count, IMAGES, seed=seed)]
    if not all(bool(torch.isfinite(rows).all()) for rows in (features, *(views or ()))):
        raise ValueError(f"{kind}: some features are not finite")
    values = {"effective rank": health.effective_rank(features), "uniformity": uniformity(features)}
    values |= {"alignment": alignment(*views)} if views is not None else {}
    return tuple(Measurement("geometry", kind, name, value, n=len(features), dim=dim) for name, value in values.items())


@torch.no_grad()
def alignment(first: Float[Tensor, "pairs dim"], second: Float[Tensor, "pairs dim"]) -> float:
    """Computes the mean squared distance of unit views (Wang & Isola 2020, equation 4, α = 2).

    The squared distance of zero features is 0 to each other and 2 to all others.

    Raises:
        ValueError: if there is no pair.

    Examples:
        >>> alignment(torch.eye(2), torch.eye(2).flip(0))
        2.0
    """
    if not len(first):
        raise ValueError("alignment takes the features of two views of 1 image or more, and there are none")
    return _by_row(lambda one, other: (one - other).square().sum(1), first, second).mean().item()


@torch.no_grad()
def uniformity(features: Float[Tensor, "images dim"]) -> float:
    """Computes log mean exp(−2 d²) of unit features (Wang & Isola 2020, equation 5, t = 2).

    Exact, by tiles: no image is paired with itself, and no matrix of all pairs is stored. Collective: all ranks pass
    all features and share the pairs. Zero features count as one direction of their own: if all are zero, it is 0.

    Raises:
        ValueError: if there are fewer than 2 images.

    Examples:
        >>> uniformity(torch.eye(2))  # log(exp(-2 * 2))
        -4.0
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"uniformity takes the features of 2 images or more, and there are {count}")
    own = distributed.share(count)
    ids = torch.arange(own.start, own.stop, device=features.device)
    # Of unit rows −2 d² is 4 s − 4, where s is their product.
    sums = log_sum_exp(directions(features[own]), None, 0.25, query_ids=ids)
    sums = distributed.gather_without_gradient(sums)
    return sums.double().logsumexp(0).item() - 4 - math.log(count) - math.log(count - 1)


@torch.no_grad()
def neighbourhood_overlap(first: Float[Tensor, "images dim"], second: Float[Tensor, "images other"], k: int) -> float:
    """Computes the mean share of k nearest neighbours that two kinds of features have in common.

    Neighbours are the other images nearest by cosine. 1 if both kinds agree; about k / (images − 1) if they are
    unrelated.

    Raises:
        ValueError: if k is not between 1 and the number of other images.

    Examples:
        >>> neighbourhood_overlap(torch.eye(4), torch.eye(4), 1)
        1.0
    """
    count = len(first)
    if not 1 <= k < count:
        raise ValueError(f"k {k} must be between 1 and the number of other images, {count - 1}")
    neighbours = []
    for features in (first, second):
        unit, ids = normalize(features), torch.arange(count, device=features.device)
        neighbours.append(top_k(unit, unit, k, query_ids=ids, key_ids=ids)[1].sort(dim=1).values)
    one, other = neighbours
    columns = torch.searchsorted(other, one).clamp_(max=k - 1)
    return (other.gather(1, columns) == one).double().mean().item()


@torch.no_grad()
def staleness(rows: Float[Tensor, "images dim"], embeddings: Float[Tensor, "images dim"]) -> tuple[Measurement, ...]:
    """Measures the cosines of a memory bank's rows with fresh embeddings, row by row.

    Their mean, 1 if nothing has moved, and their quantiles from 5 % to 95 %.

    Raises:
        ValueError: if there is no row.
    """
    if not len(rows):
        raise ValueError("staleness takes 1 row of a memory bank or more, and there are none")
    cosines = _by_row(lambda old, new: (old * new).sum(1), rows, embeddings).cpu()
    # torch.quantile takes at most 2²⁴ values.
    values = np.quantile(cosines.numpy(), list(QUANTILES.values()))
    named = {"mean": cosines.mean().item(), **dict(zip(QUANTILES, values.tolist(), strict=True))}
    return tuple(Measurement("staleness", BANK, name, value, n=len(rows)) for name, value in named.items())


def _by_row(function: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Applies a function to the unit rows of two matrices, block by block in float64."""
    blocks = zip(first.split(4096), second.split(4096), strict=True)
    return torch.cat([function(directions(one.double()), directions(other.double())) for one, other in blocks])


@torch.inference_mode()
def two_views(
    backbone: nn.Module,
    views: Views,
    images: Images,
    ids: Int64[Tensor, " chosen"],
    *,
    channels: int,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> tuple[Float[Tensor, "chosen width"], Float[Tensor, "chosen width"]]:
    """Encodes two views of the images with these ids; float32 on the CPU.

    Views are a function of seed and id: those of the first epoch of a run on these images. Grey images are repeated to
    `channels`.
    """
    first, second = [], []
    device = torch.device(device)
    with evaluation_mode(backbone):
        for part in ids.split(batch_size):
            read = pictures(images, part, views).to(device)
            squares = tuple(square.expand(*square.shape[:-3], channels, -1, -1) for square in read.squares)
            one, other, *_ = views(replace(read, squares=squares), part.to(device), 0)[0]
            first.append(backbone(one).float())
            second.append(backbone(other).float())
    return torch.cat(first).cpu(), torch.cat(second).cpu()


class Pixels(nn.Module):
    """A baseline backbone that returns the pixels of views with this normalisation, in [0, 1] and flattened."""

    def __init__(self, mean: float | tuple[float, ...] = MEAN, std: float | tuple[float, ...] = STD) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, views: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch pixels"]:
        """Undoes the normalisation of the views."""
        return restored(views, self.mean, self.std).flatten(1)
