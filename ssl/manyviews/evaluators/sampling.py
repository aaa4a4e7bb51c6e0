"""The distances that a sampler chooses among those of a batch, and what they mean for the gradient."""

import math
from functools import partial
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from scipy.special import gammaln, hyp1f1
from torch import Tensor

from manyviews.config import Settings
from manyviews.engine import normalize
from manyviews.objectives.mining import (
    Batch,
    DistanceWeighted,
    Hardest,
    Random,
    Sampling,
    SemiHard,
    WithinMargin,
    batch_of_rows,
    choose,
)

BINS = 80
"""Of equal width, from 0 to 2."""
MOST = 1_024
"""Embeddings that are compared: a million pairs take a third of a second on one core."""
NOISE = 0.3
"""Length of the noise that is added to a difference of embeddings, σ√n: of unit embeddings about a sixth of a turn."""
MARGIN = 0.2
"""FaceNet's, of squared distances."""
OWN = "this run"
"""Stands for the run's own sampler."""
PAIRS, DRAWS, POINTS = 2_000, 32, 10
"""Pairs and draws of noise for the simulated variance, and its points."""


Counts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=BINS, max_length=BINS)]


class SamplingFigures(Settings):
    """Distances of unit embeddings in a batch, counted in `BINS` bins, and of those that samplers choose."""

    step: int = Field(ge=0, le=10**12)
    dim: int = Field(ge=1, le=10**6)
    embeddings: int = Field(ge=0, le=10**6)
    whole: bool
    """Whether all embeddings of the batch are compared; `own` then counts exactly what the objective compared."""
    normalized: bool
    """Whether the objective compares unit embeddings; distances are of their directions in any case."""
    own: str = Field(pattern="^[a-z_]{1,40}$")
    """The name of the run's sampler."""
    positives: Counts
    negatives: Counts
    chosen: dict[Annotated[str, Field(pattern="^[a-z -]{1,40}$")], Counts] = Field(max_length=10)
    """By sampler, the negatives that it chooses; those of the run last, by the key `OWN`."""
    simulated: tuple[tuple[float, float], ...] = Field(max_length=POINTS)
    """Distances of negative pairs, and the variance of the gradient's direction under noise."""


def sampling_figures(
    embeddings: Float[Tensor, "views batch dim"],
    ids: Int[Tensor, " batch"],
    sampling: Sampling,
    *,
    normalized: bool,
    seed: int,
    step: int,
) -> SamplingFigures:
    """Counts the distances of a batch and those that each sampler would choose (Wu et al. 2017, figure 2).

    `sampling` is the run's own, with its margin. Random draws are those of the objective with this seed and step. Of a
    larger batch the first images are compared, `MOST` embeddings. Each sampler chooses for all positives, the run's own
    for those that it chooses too.

    Raises:
        ValueError: if embeddings are not finite.
    """
    views, images, dim = embeddings.shape
    kept = max(min(images, MOST // views), 1)
    rows, names = embeddings[:, :kept].flatten(0, 1).float(), ids[:kept].repeat(views)
    if not bool(rows.isfinite().all()):
        raise ValueError("the embeddings of the batch are not finite")
    batch = batch_of_rows(rows, names, normalized=normalized, seed=seed, step=step)
    unit = normalize(rows)
    distances = (2 - 2 * unit @ unit.T).clamp(min=0, max=4).sqrt()
    products = batch.anchors @ batch.candidates.T
    everything = slice(0, len(rows))
    listed, there = batch.positives(everything)
    apart = names[:, None] != names
    samplers = rivals(sampling, normalized) | {OWN: sampling}
    chosen = {name: chosen_distances(kind, batch, products, distances, apart) for name, kind in samplers.items()}
    simulated = simulated_variance(unit, apart, seed=seed)
    return SamplingFigures(
        step=step,
        dim=dim,
        embeddings=len(rows),
        whole=kept == images,
        normalized=normalized,
        own=sampling.name,
        positives=counts(distances.gather(1, listed)[there]),
        negatives=counts(distances[apart]),
        chosen={name: counts(own) for name, own in chosen.items()},
        simulated=tuple(simulated),
    )


def rivals(sampling: Sampling, normalized: bool) -> dict[str, Sampling]:
    """The samplers that are shown beside the run's own."""
    within = sampling if isinstance(sampling, WithinMargin) else WithinMargin(margin=MARGIN, squared=True)
    samplers: dict[str, Sampling] = {"random": Random(), "semi-hard": SemiHard(fallback=None)}
    samplers |= {"within the margin": within, "hardest": Hardest(positives="all")}
    return samplers | ({"distance-weighted": DistanceWeighted()} if normalized else {})


def chosen_distances(
    sampling: Sampling,
    batch: Batch,
    products: Float[Tensor, "all all"],
    distances: Float[Tensor, "all all"],
    apart: Tensor,
) -> Float[Tensor, " chosen"]:
    """Distances of the negatives that a sampler chooses, once for each positive; all of them if it compares all."""
    triples = choose(sampling, batch, slice(0, len(products)), products)
    if triples.negatives is None:
        return distances[apart & triples.chosen.any(1)[:, None]]
    return distances.gather(1, triples.negatives)[triples.chosen]


def counts(distances: Float[Tensor, " pairs"]) -> tuple[int, ...]:
    """Numbers of distances in each of `BINS` bins from 0 to 2."""
    bins = (distances * (BINS / 2)).long().clamp(0, BINS - 1)
    return tuple(bins.bincount(minlength=BINS).tolist())


def gradient_variance(distances: Float[np.ndarray, " pairs"], dim: int, noise: float) -> Float[np.ndarray, " pairs"]:
    """Variance of the direction of a negative's gradient, by its distance (Wu et al. 2017, figure 3).

    The gradient of a loss of pairs in the negative has the direction of h = f(a) − f(n). With noise z ~ N(0, σ²I) of
    the embeddings it is u = (h + z) / ‖h + z‖, and the trace of its covariance, which is 1 − ‖E u‖², is 0 without
    noise and 1 where noise decides alone. With κ = ‖h‖ / σ and n dimensions

        ‖E u‖ = κ/√2 · Γ((n+1)/2) / Γ((n+2)/2) · ₁F₁(1/2; (n+2)/2; −κ²/2),

    the mean direction of a normal distribution that is projected onto the sphere. The authors measured it (the nuclear
    norm of the covariance, which is the trace).

    Args:
        distances: ‖h‖.
        dim: n.
        noise: the length of the noise, σ√n.

    Examples:
        >>> gradient_variance(np.array([0.0, 0.3, 1.4]), 128, 0.3).round(2).tolist()
        [1.0, 0.5, 0.04]
    """
    ratio = distances * math.sqrt(dim) / noise
    factor = math.exp(gammaln((dim + 1) / 2) - gammaln((dim + 2) / 2)) / math.sqrt(2)
    mean = factor * ratio * hyp1f1(0.5, (dim + 2) / 2, -(ratio**2) / 2)
    variance: np.ndarray = np.clip(1 - mean**2, 0.0, 1.0)
    return variance


def simulated_variance(
    unit: Float[Tensor, "all dim"], apart: Tensor, *, seed: int, noise: float = NOISE
) -> list[tuple[float, float]]:
    """Mean distance and variance of the gradient's direction of groups of negative pairs, by draws of noise.

    At most `PAIRS` pairs, sorted by distance, in `POINTS` groups; the variance of `DRAWS` draws, without bias.
    """
    pairs = apart.nonzero()
    if not len(pairs):
        return []
    generator = torch.Generator().manual_seed(seed)
    pairs = pairs[torch.randint(len(pairs), (min(PAIRS, len(pairs)),), generator=generator)]
    differences = unit[pairs[:, 0]] - unit[pairs[:, 1]]
    distances, order = differences.norm(dim=1).sort()
    drawn = partial(torch.randn, differences.shape, generator=generator)
    scale = noise / math.sqrt(unit.shape[1])
    mean = torch.zeros_like(differences)
    for _ in range(DRAWS):
        mean += normalize(differences + scale * drawn()) / DRAWS
    variances = ((1 - mean.square().sum(1)) * DRAWS / (DRAWS - 1))[order]
    groups = zip(distances.tensor_split(POINTS), variances.tensor_split(POINTS), strict=True)
    return [(own.mean().item(), variance.mean().item()) for own, variance in groups if len(own)]
