"""How features lie: alignment of two views, uniformity and rank; whether two runs agree; how stale a memory bank is."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from manyviews.data import Images, sample_ids
from manyviews.engine import directions, log_sum_exp, normalize, top_k
from manyviews.evaluators.results.kinds import LAYERS
from manyviews.evaluators.results.measurement import Measurement
from manyviews.features.encoding import evaluation_mode
from manyviews.run import health
from manyviews.system import distributed
from manyviews.views import MEAN, STD, Views

IMAGES = 25_600
"""Images that are looked at; of more, as many are drawn (Garrido et al. 2023 find the rank settled by then)."""
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
    """Measures how one kind of features lies; of more than 25,600 images, of as many drawn by the seed.

    The effective rank is how many directions the features use (RankMe), at most the number of images or of dimensions;
    the uniformity is 0 where all features are one, or all zero, and about −4 + 8 / dim where they are spread evenly
    over the sphere; the alignment is 0 where both views of every image have one direction, 2 for unrelated views. They
    need no labels, and are to be compared between runs of one method.

    The rank is that of the features as they are, neither centred nor normalised (Garrido et al. 2023, RankMe, equations
    1 and 2, without the 1e-7 that they add to each share); the rest is of unit features. All processes call together,
    each with all features, and get the same numbers.

    Args:
        kind: what the features are called.
        features: of images.
        views: features of two views of the same images, row by row; without them there is no alignment.
        seed: of the draw.

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
    return tuple(
        Measurement("geometry", kind, name, value, n=len(features), dim=dim, layer=LAYERS.get(kind))
        for name, value in values.items()
    )


@torch.no_grad()
def alignment(first: Float[Tensor, "pairs dim"], second: Float[Tensor, "pairs dim"]) -> float:
    """The mean squared distance of unit features of two views of an image (Wang & Isola 2020, equation 4, α = 2).

    Features that are zero lie in one place of their own: 0 from each other, 2 from all others.

    Raises:
        ValueError: if there is no pair.
    """
    if not len(first):
        raise ValueError("alignment takes the features of two views of 1 image or more, and there are none")
    distances = [
        (directions(one.double()) - directions(other.double())).square().sum(1)
        for one, other in zip(first.split(4096), second.split(4096), strict=True)
    ]
    return torch.cat(distances).mean().item()


@torch.no_grad()
def uniformity(features: Float[Tensor, "images dim"]) -> float:
    """The log of the mean of exp(−2 d²) over all pairs of two unit features (Wang & Isola 2020, equation 5, t = 2).

    Exact, by tiles: no image is paired with itself, and no matrix of all pairs is stored. All processes call together,
    each with all features: the pairs are shared out among them. Features that are zero lie in one place of their own,
    so that it is 0, as for all that are one, where all are zero.

    Raises:
        ValueError: if there are fewer than 2 images.
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
    """The mean share of an image's k nearest neighbours by one kind of features that are so by another kind too.

    Neighbours are found among the other images by the cosine. 1 where both kinds agree; about k / (images − 1) where
    they have nothing to do with each other.

    Raises:
        ValueError: if k is not between 1 and the number of other images.
    """
    count = len(first)
    if not 1 <= k < count:
        raise ValueError(f"k {k} must be between 1 and the number of other images, {count - 1}")
    neighbours = []
    for features in (first, second):
        unit, ids = normalize(features), torch.arange(count, device=features.device)
        neighbours.append(top_k(unit, unit, k, query_ids=ids, key_ids=ids)[1].sort(dim=1).values)
    one, other = neighbours
    places = torch.searchsorted(other, one).clamp_(max=k - 1)
    return (other.gather(1, places) == one).double().mean().item()


@torch.no_grad()
def staleness(rows: Float[Tensor, "images dim"], embeddings: Float[Tensor, "images dim"]) -> tuple[Measurement, ...]:
    """Measures how far a memory bank's rows are behind fresh embeddings of the same images, in the same order.

    The mean of their cosines, 1 where nothing moved, and what the given shares of the rows are at most: 5 % to 95 %.

    Raises:
        ValueError: if there is no row.
    """
    if not len(rows):
        raise ValueError("staleness takes 1 row of a memory bank or more, and there are none")
    cosines = torch.cat(
        [
            (directions(old.double()) * directions(new.double())).sum(1)
            for old, new in zip(rows.split(4096), embeddings.split(4096), strict=True)
        ]
    ).cpu()
    shares = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    # By sorting: torch.quantile takes no more than 2²⁴ values.
    ordered, places = cosines.sort().values, shares * (len(cosines) - 1)
    values = torch.lerp(ordered[places.floor().long()], ordered[places.ceil().long()], places.frac())
    named = {"mean": cosines.mean().item(), **dict(zip(QUANTILES, values.tolist(), strict=True))}
    return tuple(Measurement("staleness", BANK, name, value, n=len(rows)) for name, value in named.items())


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
    """The features of the first two views, of so many channels, of the images that `ids` names, float32 on the CPU.

    Views are a function of their seed and the images' ids: those of the first epoch of a run that saw these images.
    """
    first, second = [], []
    with evaluation_mode(backbone):
        for part in ids.split(batch_size):
            # Grey images are shown in grey to a backbone that has learned from colour.
            pixels = images.read(part).to(device).expand(-1, channels, -1, -1)
            made = views(pixels, part.to(device), 0)
            first.append(backbone(made[0]).float().cpu())
            second.append(backbone(made[1]).float().cpu())
    return torch.cat(first), torch.cat(second)


class Pixels(nn.Module):
    """A backbone that has learned nothing and changes nothing: the pixels of a view, in [0, 1] and flattened."""

    def forward(self, views: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch pixels"]:
        """The pixels as they were before they were normalised for an encoder."""
        return views.mul(STD).add(MEAN).flatten(1)
