"""Signs of what a run learns and of what goes wrong: spread, rank and similarities, and warnings in words."""

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
"""Images that are looked at, over all processes: the eigenvalues of as many take a tenth of a second on one core."""
PAIRED = 256
"""Images whose pairs make the histograms: 65,536 similarities."""

LEAST_SPREAD = 0.1
"""Below it two images have a cosine similarity above 0.99 on average."""
LEAST_RANK = 2.0
"""Below it one direction holds nearly all there is; networks begin above it, untrained ones included."""
LEAST_INFORMATION = 0.01
"""Share of its ceiling, log N, below which a loss says nothing."""
PASSES = 3
"""Passes over the images after which a loss should say something: until then a memory bank's rows are mostly noise,
against which the loss is above log N and rises before it falls."""
FAR = 2.0
"""How many times the loss of a guess, or the highest loss of the warm-up, a loss is that has diverged."""
LEARNED = 0.1
"""Share of its ceiling that information must have reached, so that losing half of it again says something."""
WARM_UP = 0.1
"""Share of the run in which nothing is judged, for untrained embeddings resemble collapsed ones; and in which
information that has not risen rests."""
PATIENCE = 5
"""Lines of metrics in a row that show the same sign before it is said."""


class EmbeddingSample(NamedTuple):
    """A few of a step's embeddings at length 1, but for zeros, from all processes, the same on each of them."""

    embeddings: Float[Tensor, "images dim"]
    others: Float[Tensor, "images dim"] | None
    """Of the same images in another view, by the twin where there is one; none if the step made one view only."""
    ids: Int[Tensor, " images"]


@torch.no_grad()
def glimpse(
    embeddings: Float[Tensor, "views batch dim"],
    ids: Int[Tensor, " batch"],
    targets: Float[Tensor, "others batch dim"] | None = None,
) -> EmbeddingSample:
    """A sample of the embeddings of all processes, for a look at their health; collective."""
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


def spread(embeddings: Float[Tensor, "images dim"]) -> float:
    """The standard deviation of unit embeddings per dimension, times √dim: 1 if they point everywhere, 0 if collapsed.

    Embeddings that are all zero have collapsed too.

    The root mean square over the dimensions, which no rotation changes, so that its square is 1 − the mean cosine
    similarity of all pairs. (Chen & He 2021, SimSiam, section 4.1, take the mean over the dimensions.)
    """
    mean = directions(embeddings.double().cpu()).mean(0)
    return math.sqrt(max(1 - mean.square().sum().item(), 0.0))


def effective_rank(embeddings: Float[Tensor, "images dim"]) -> float:
    """How many directions the embeddings use: e to the entropy of the singular values as shares (Garrido et al. 2023).

    RankMe, equations 1 and 2, which does not centre the embeddings either. At most the number of images or dimensions;
    0 where all are zero, and NaN where one is not finite.
    """
    rows = embeddings.double().cpu()
    if not bool(rows.isfinite().all()):
        return math.nan
    # The smaller of the two Gram matrices has all singular values, squared.
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    singular = torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_()
    # Squaring left half of the digits: what is smaller is rounding, here and in float32 embeddings.
    singular = singular[singular > 1e-7 * singular.max()]
    if not len(singular):
        return 0.0
    shares = singular / singular.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def figures(seen: EmbeddingSample) -> dict[str, float]:
    """The spread and the effective rank of the embeddings, by the names they have in the metrics."""
    return {"embedding_std": spread(seen.embeddings), "effective_rank": effective_rank(seen.embeddings)}


def similarities(seen: EmbeddingSample) -> dict[str, Float[Tensor, " pairs"]]:
    """The cosine similarities of pairs of equal ids (positives) and of different ids (negatives), where there are any.

    An embedding beside itself is no pair.
    """
    rows, ids = seen.embeddings[:PAIRED], seen.ids[:PAIRED]
    others = rows if seen.others is None else seen.others[:PAIRED]
    products, equal = directions(rows) @ directions(others).T, ids[:, None] == ids
    same = equal if seen.others is not None else equal & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    found = {"positive": products[same], "negative": products[~equal]}
    return {name: values for name, values in found.items() if len(values)}


class Watch:
    """Judges the lines of metrics as they come, and says in words what is wrong, each thing once."""

    def __init__(self, highest_rank: int) -> None:
        """`highest_rank` is what the embeddings can have at most: the images of a step, or the dimensions."""
        self._highest_rank = highest_rank
        self._shown: Counter[str] = Counter()
        self._past: deque[tuple[float, float]] = deque()
        self._most, self._highest = -math.inf, -math.inf

    def warnings(self, progress: float, epoch: float, values: Mapping[str, float]) -> list[str]:
        """What is to be said after a line of metrics.

        The signs are embeddings that collapse, a loss at log N, and a loss that has diverged: it is far above what a
        guess would give, or has lost half of what it knew; where it knows no guess, it is far above its own beginning.
        A sign counts once a tenth of the run is over and five lines in a row have shown it. A loss at log N counts
        where it has rested for a tenth of the run, and after three passes over the images or half of the run.

        Args:
            progress: how much of the run is done, in [0, 1].
            epoch: passes over the images so far.
            values: the line of metrics; what it does not hold is not judged.
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
        said = []
        for name, text in signs.items():
            # Beyond the patience the count stays where it is: what was said once is not said again.
            if self._shown[name] < PATIENCE:
                self._shown[name] = self._shown[name] + 1 if text else 0
                if text and self._shown[name] == PATIENCE:
                    said.append(text)
        return said

    def _rests(self, progress: float, values: Mapping[str, float]) -> bool:
        """Whether the information has not risen, by what would matter, in the last tenth of the run."""
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
            "the embeddings are all zero, so that nothing is learned from them any more; try a lower optim.rate, a "
            "longer optim.warmup or optim.clip=1"
        )
    return (
        f"the embeddings have collapsed: two images have a cosine similarity of {1 - deviation**2:.3f} on average "
        f"(embedding_std is {deviation:.3f}; spread out it would be 1); see in views.png whether the images themselves "
        "are alike, then try a lower optim.rate or a longer optim.warmup"
    )


def _flat(values: Mapping[str, float], highest: int) -> str | None:
    rank = values.get("effective_rank", math.inf)
    # Where there is room for a few directions only, as in two dimensions, a low rank is no fault. That all is zero is
    # said already.
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
        # A loss that is no InfoNCE is near to it where nothing is known any more.
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
        f"the loss sits at log N: it shows {information:.3f} of at most {ceiling:.2f} nats, so that a positive is "
        "hardly told from the other candidates; see in views.png whether two views of an image still have something "
        "in common, then try another optim.rate or a lower objective.temperature"
    )
