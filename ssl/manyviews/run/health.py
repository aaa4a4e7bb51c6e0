"""Health of a run: spread, effective rank and similarities of embeddings, and warnings."""

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyviews.engine import directions
from manyviews.system import distributed

ROWS = 512
"""Images of a sample, over all ranks: their eigenvalues take a tenth of a second on one core."""
PAIRED = 256
"""Images of the histograms: 65,536 pairs."""

LEAST_SPREAD = 0.1
"""Below it the mean cosine similarity exceeds 0.99."""
LEAST_RANK = 2.0
"""Below it one direction has nearly all variance; untrained networks are above it."""
LEAST_INFORMATION = 0.01
"""Share of its ceiling, log N, below which information is at chance."""
PASSES = 3
"""Epochs after which a loss is judged: until then a memory bank is mostly noise, with a loss above log N."""
FAR = 2.0
"""Multiple of the loss at chance, or of the highest loss of the warm-up, from which a loss has diverged."""
LEARNED = 0.1
"""Share of its ceiling that information must have reached before a loss of half of it is divergence."""
WARM_UP = 0.1
"""Share of the run without warnings (untrained embeddings resemble collapsed ones), and of a flat information."""
PATIENCE = 5
"""Lines of metrics in a row with the same sign before a warning."""


class EmbeddingSample(NamedTuple):
    """Some unit embeddings of a step (zeros stay zero), from all ranks, identical on each."""

    embeddings: Float[Tensor, "images dim"]
    others: Float[Tensor, "images dim"] | None
    """The same images in another view, of the twin if there is one; None with one view."""
    ids: Int[Tensor, " images"]


@torch.no_grad()
def glimpse(
    embeddings: Float[Tensor, "views batch dim"],
    ids: Int[Tensor, " batch"],
    targets: Float[Tensor, "others batch dim"] | None = None,
) -> EmbeddingSample:
    """Samples the embeddings of all ranks; collective."""
    images = slice(0, max(ROWS // distributed.world_size(), 1))
    first, other = embeddings[0, images], None
    if targets is not None:
        other = targets[-1, images]
    elif len(embeddings) > 1:
        other = embeddings[-1, images]
    lengths = distributed.counts(len(first))
    return EmbeddingSample(
        distributed.gather_without_gradient(directions(first)[:, :-1], lengths),
        None if other is None else distributed.gather_without_gradient(directions(other)[:, :-1], lengths),
        distributed.gather_without_gradient(ids[images], lengths),
    )


def without_repeats(sample: EmbeddingSample) -> EmbeddingSample:
    """The sample with the first embedding of each image."""
    ids, where = sample.ids.unique(return_inverse=True)
    first = torch.full_like(ids, len(where)).scatter_reduce_(0, where, torch.arange(len(where)), "amin")
    others = None if sample.others is None else sample.others[first]
    return EmbeddingSample(sample.embeddings[first], others, ids)


def spread(embeddings: Float[Tensor, "images dim"]) -> float:
    """Standard deviation of unit embeddings, times √dim: 1 if uniform, 0 if collapsed.

    The root mean square over the dimensions, invariant to rotations: its square is 1 − the mean cosine similarity of
    all pairs. (Chen & He 2021, SimSiam, section 4.1, take the mean over the dimensions.)
    """
    mean = directions(embeddings.double().cpu()).mean(0)
    return math.sqrt(max(1 - mean.square().sum().item(), 0.0))


def effective_rank(embeddings: Float[Tensor, "images dim"]) -> float:
    """Exponential of the entropy of the normalised singular values: RankMe.

    Garrido et al. 2023, equations 1 and 2, who do not centre the embeddings either. At most the number of images or
    dimensions; 0 if all are zero, NaN if one is not finite.
    """
    rows = embeddings.double().cpu()
    if not bool(rows.isfinite().all()):
        return math.nan
    # The smaller of the two Gram matrices has all singular values, squared.
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    singular = torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_()
    # Squaring has left half of the digits: smaller values are rounding errors.
    singular = singular[singular > 1e-7 * singular.max()]
    if not len(singular):
        return 0.0
    shares = singular / singular.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def figures(seen: EmbeddingSample) -> dict[str, float]:
    """Spread and effective rank, by their names in the metrics."""
    return {"embedding_std": spread(seen.embeddings), "effective_rank": effective_rank(seen.embeddings)}


def similarities(seen: EmbeddingSample) -> dict[str, Float[Tensor, " pairs"]]:
    """Cosine similarities of positive pairs (equal ids, distinct embeddings) and negatives."""
    rows, ids = seen.embeddings[:PAIRED], seen.ids[:PAIRED]
    others = rows if seen.others is None else seen.others[:PAIRED]
    products, equal = directions(rows) @ directions(others).T, ids[:, None] == ids
    same = equal if seen.others is not None else equal & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    pairs = {"positive": products[same], "negative": products[~equal]}
    return {name: values for name, values in pairs.items() if len(values)}


class Watch:
    """Detects collapse, loss at chance and divergence in the metrics; warns once of each.

    `highest_rank` bounds the rank of the embeddings: the images of a step, or the dimensions.
    """

    def __init__(self, highest_rank: int) -> None:
        self._highest_rank = highest_rank
        self._shown: Counter[str] = Counter()
        self._past: deque[tuple[float, float]] = deque()
        self._most, self._highest = -math.inf, -math.inf

    def warnings(self, progress: float, epoch: float, values: Mapping[str, float]) -> list[str]:
        """Returns the warnings after a line of metrics, whose missing values are not judged.

        Embeddings may collapse, and the loss may be at log N or diverge: far above chance, at half of its information,
        or without a ceiling far above its warm-up. A warning needs five lines in a row, after a tenth of the run; for a
        loss at log N also no rise within a tenth of the run, and three epochs or half of the run.
        """
        rests = self._rests(progress, values)
        if progress < WARM_UP:
            self._highest = max(self._highest, values.get("loss", -math.inf))
            return []
        self._most = max(self._most, values.get("information", -math.inf))
        signs = {"divergence": _diverged(values, self._most, self._highest)}
        signs |= {"spread": _collapsed(values), "rank": _flat(values, self._highest_rank)}
        judged = rests and (epoch >= PASSES or progress >= 0.5) and signs["divergence"] is None
        signs["information"] = _at_chance(values) if judged else None
        warnings = []
        for name, text in signs.items():
            # The count stays at PATIENCE after the warning.
            if self._shown[name] < PATIENCE:
                self._shown[name] = self._shown[name] + 1 if text else 0
                if text and self._shown[name] == PATIENCE:
                    warnings.append(text)
        return warnings

    def _rests(self, progress: float, values: Mapping[str, float]) -> bool:
        """Whether the information has not risen in the last tenth of the run."""
        if "information" not in values:
            return False
        past, information = self._past, values["information"]
        past.append((progress, information))
        while len(past) > 1 and progress - past[1][0] >= WARM_UP:
            past.popleft()
        risen = information - past[0][1]
        return progress - past[0][0] >= WARM_UP and risen < LEAST_INFORMATION * values["ceiling"]


def _collapsed(values: Mapping[str, float]) -> str | None:
    deviation = values.get("embedding_std", math.inf)
    if not deviation < LEAST_SPREAD:
        return None
    if values.get("effective_rank") == 0:
        return (
            "the embeddings are all zero, and nothing is learned from them any more; try a lower optim.rate, a "
            "longer optim.warmup or optim.clip=1"
        )
    return (
        f"the embeddings have collapsed: two images have a cosine similarity of {1 - deviation**2:.3f} on average "
        f"(embedding_std is {deviation:.3f}; spread out it would be 1); see in views.png whether the images themselves "
        "are alike, then try a lower optim.rate or a longer optim.warmup"
    )


def _flat(values: Mapping[str, float], highest: int) -> str | None:
    rank = values.get("effective_rank", math.inf)
    # In a few dimensions a low rank is normal. `_collapsed` warns of zeros.
    if highest < 4 * LEAST_RANK or not 0 < rank < LEAST_RANK:
        return None
    return (
        f"the embeddings have collapsed to a line: their effective rank is {rank:.1f} of at most {highest}; try a "
        "lower optim.rate or optim.weight_decay"
    )


def _diverged(values: Mapping[str, float], most: float, highest: float) -> str | None:
    """`most` is the highest information of the run, `highest` the highest loss of its warm-up."""
    cure = "try a lower optim.rate, a longer optim.warmup or optim.clip=1; an older checkpoint may still be good"
    loss, information, ceiling = (values.get(name, math.nan) for name in ("loss", "information", "ceiling"))
    if information < (1 - FAR) * ceiling:
        # Other losses are close to InfoNCE at chance.
        return f"the loss has diverged: it is {loss:.2f}, and a guess would give {loss + information:.2f}; {cure}"
    if most > LEARNED * ceiling and information < most / 2:
        return (
            f"the loss is far above the run's best: it shows {information:.2f} nats, of {most:.2f} that it had reached "
            f"(at most {ceiling:.2f}); {cure}"
        )
    if math.isnan(information) and 0 < FAR * highest < loss:
        return f"the loss has diverged: it is {loss:.3g}, and was at most {highest:.3g} in the warm-up; {cure}"
    return None


def _at_chance(values: Mapping[str, float]) -> str | None:
    information, ceiling = values.get("information", math.inf), values.get("ceiling", math.inf)
    if not information < LEAST_INFORMATION * ceiling:
        return None
    deviation = values.get("embedding_std", math.inf)
    if deviation < LEAST_SPREAD:
        return (
            f"the loss sits at log N, {ceiling:.2f} nats, for the embeddings of all images are nearly the same "
            f"(embedding_std is {deviation:.3f}): either the images or their views are all alike (see views.png), or "
            "the embeddings have collapsed"
        )
    return (
        f"the loss sits at log N: it shows {information:.3f} of at most {ceiling:.2f} nats: a positive is "
        "hardly distinguished from the other candidates; see in views.png whether two views of an image still have "
        "something in common, then try another optim.rate or a lower objective.temperature"
    )
