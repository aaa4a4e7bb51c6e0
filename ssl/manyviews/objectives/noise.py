"""An anchor's own row against rows drawn at random, which lie on all processes: NCE, and the softmax over the few."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyviews.engine.rows import slices
from manyviews.objectives.losses import softplus, with_gradient
from manyviews.objectives.sharded_rows import owned
from manyviews.system import distributed
from manyviews.system.keyed_random import torch_generator

Weigh = Callable[[Tensor], Tensor]

NUMBERS = 1 << 22
"""Numbers held at once: 16 MiB of scores, or of rows where each image has its own."""
DENSE = 64
"""Rows for each that is drawn for an image, up to which products with all rows cost less than gathering the few."""


class Noise:
    """The noise of one step: the same draw on every process, of rows that each process owns a part of.

    Uniform over all `total` rows with replacement (Wu et al. 2018, section 3.2): one draw of `count` for the whole
    batch, or one for each image. A draw depends on the seed, the step and the image's place in the whole batch, not on
    the number of processes. What falls on the anchor's own row is no noise for it, and counts for nothing.
    """

    def __init__(
        self, rows: Tensor, start: int, total: int, *, count: int, images: int | None, seed: int, step: int
    ) -> None:
        shape = (count,) if images is None else (images, count)
        self.rows, self.start, self.total, self.count = rows, start, total, count
        self.ids = torch.randint(total, shape, generator=torch_generator(seed, step)).to(rows.device)
        """What was drawn, [count] for all images, or [images of all processes, count]."""

    def own_hits(self, ids: Int[Tensor, " batch"], first: int) -> Int[Tensor, " batch"]:
        """For each image of this process, the draws that are its own row; `first` is its place in the whole batch."""
        drawn = self.ids if self.ids.ndim == 1 else self.ids[first : first + len(ids)]
        return (drawn == ids[:, None]).sum(1)

    def scores(self, anchors: Tensor, ids: Tensor, images: Tensor) -> Iterator[tuple[slice, Tensor, Weigh]]:
        """Products with this process's part of the noise, some anchors at a time; −inf is no noise.

        `images` are the anchors' places in the whole batch. With them comes what turns weights of these products into
        the weighted sums of the rows.
        """
        if self.ids.ndim == 1:
            places = self.ids - self.start
            places = places[owned(self.rows, places)]
            common = self.rows[places].to(anchors.dtype)
            for span in _spans(len(anchors), len(places)):
                scores = anchors[span] @ common.T
                yield span, self._masked(scores, places, ids[span]), partial(_sum_common, common)
        elif 0 < len(self.rows) <= DENSE * self.count:
            rows = self.rows.to(anchors.dtype)
            for span in _spans(len(anchors), len(rows)):
                products, drawn = anchors[span] @ rows.T, self.ids[images[span]] - self.start
                own, drawn = owned(self.rows, drawn), drawn.clamp(0, len(rows) - 1)
                scores = products.gather(1, drawn).masked_fill_(~own, -torch.inf)
                yield span, self._masked(scores, drawn, ids[span]), partial(_sum_dense, rows, drawn)
        else:
            for span in _spans(len(anchors), self.count * self.rows.shape[1]):
                drawn, own = self._compact(self.ids[images[span]] - self.start)
                gathered = self.rows[drawn].to(anchors.dtype)
                scores = torch.einsum("ad,amd->am", anchors[span], gathered).masked_fill_(~own, -torch.inf)
                yield span, self._masked(scores, drawn, ids[span]), partial(_sum_gathered, gathered)

    def _masked(self, scores: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        return scores.masked_fill_(places + self.start == ids[:, None], -torch.inf)

    def _compact(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Of each anchor's draws those that are rows of this process, moved to the front of as few columns as hold."""
        own = owned(self.rows, places)
        if bool(own.all()):
            return places, own
        order = own.byte().argsort(dim=1, descending=True, stable=True)[:, : int(own.sum(1).max())]
        own = own.gather(1, order)
        return places.gather(1, order).masked_fill(~own, 0), own


def noise_contrast(
    anchors: Float[Tensor, "anchors dim"],
    positives: Float[Tensor, " anchors"],
    ids: Int[Tensor, " anchors"],
    noise: Noise,
    log_normaliser: Float[Tensor, ""],
    temperature: float,
    lengths: Sequence[int],
) -> Float[Tensor, " anchors"]:
    """Is this the anchor's row or noise? (Wu et al. 2018, equations 4 to 7), with P = exp(s/τ) / Z and noise 1/n.

    With u = s/τ − log Z − log(m/n) the loss is softplus(−u₀) + Σₖ softplus(uₖ), summed over the m noise rows: the
    authors' code without its exponentials and without its 1e-7. Anchors are [views · batch], and `lengths` the images
    of each process. Noise that is the anchor's own row adds nothing (the authors' code counts it).
    """
    offset = log_normaliser + math.log(noise.count / noise.total)
    terms, gradient = _noise_term(anchors, ids, noise, temperature, offset, list(lengths))
    return softplus(offset - positives / temperature) + with_gradient(anchors, terms, gradient)


def log_sum_over_noise(
    anchors: Float[Tensor, "anchors dim"],
    ids: Int[Tensor, " anchors"],
    noise: Noise,
    temperature: float,
    lengths: Sequence[int],
) -> Float[Tensor, " anchors"]:
    """For each anchor, the log of the sum of exp(anchor · row / temperature) over its noise rows; −inf without any.

    Anchors are [views · batch], and `lengths` the images of each process. Differentiable in the anchors.
    """
    result, gradient = _log_sum(anchors, ids, noise, temperature, list(lengths))
    return result if gradient is None else with_gradient(anchors, result, gradient)


def normaliser_from_noise(
    others: Float[Tensor, " anchors"],
    positives: Float[Tensor, " anchors"],
    own_hits: Int[Tensor, " anchors"],
    noise: Noise,
    temperature: float,
) -> Float[Tensor, " anchors"]:
    """For each anchor an unbiased estimate of Z, as logarithm: its own row once, the other rows by the noise.

    `others` are the log-sums over the noise. The authors' code takes the mean of positive and noise scores alike, in
    which a trained positive, e^(1/τ) times the rest, counts n/m times too much.
    """
    kept = (noise.count - own_hits).clamp(min=1)
    return torch.logaddexp(others + torch.log((noise.total - 1) / kept), positives / temperature)


@torch.no_grad()
def _noise_term(
    anchors: Tensor, ids: Tensor, noise: Noise, temperature: float, offset: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Σₖ softplus(uₖ) for each anchor and its gradient; the rows need none, so one pass gives both."""
    world = _World(anchors, ids, lengths)
    losses = world.anchors.new_empty(len(world.anchors))
    gradient = torch.empty_like(world.anchors)
    for span, scores, weigh in noise.scores(world.anchors, world.ids, world.images):
        logits = scores.div_(temperature).sub_(offset)
        losses[span] = softplus(logits).sum(1)
        gradient[span] = weigh(logits.sigmoid_().div_(temperature))
    gradient = distributed.scatter_sum(gradient, world.lengths)
    return distributed.scatter_sum(losses, world.lengths), gradient


@torch.no_grad()
def _log_sum(
    anchors: Tensor, ids: Tensor, noise: Noise, temperature: float, lengths: list[int]
) -> tuple[Tensor, Tensor | None]:
    """The logarithm and, if it is wanted, its gradient: the softmax-weighted mean of the rows over the temperature."""
    world = _World(anchors, ids, lengths)
    sums = world.anchors.new_zeros(len(world.anchors), 1)
    maximum = sums.clone()
    weighted = torch.zeros_like(world.anchors) if anchors.requires_grad else None
    for span, scores, weigh in noise.scores(world.anchors, world.ids, world.images):
        if not scores.shape[1]:
            maximum[span] = torch.finfo(scores.dtype).min
            continue
        logits = scores.div_(temperature)
        # Finite also where there is no noise, so that e^(−inf − maximum) is 0 and not NaN.
        maximum[span] = logits.amax(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        exponentials = logits.sub_(maximum[span]).exp_()
        sums[span] = exponentials.sum(1, keepdim=True)
        if weighted is not None:
            weighted[span] = weigh(exponentials)
    highest = distributed.maximum(maximum)
    shrink = torch.exp(maximum - highest)
    sums = distributed.scatter_sum(sums * shrink, world.lengths)
    if weighted is not None:
        weighted = distributed.scatter_sum(weighted * shrink, world.lengths)
        weighted = weighted.div_((sums * temperature).clamp(min=torch.finfo(sums.dtype).tiny))
    highest_own: Tensor = highest.split(world.lengths)[distributed.rank()]
    return sums.log().add_(highest_own).squeeze(1), weighted


class _World:
    """The anchors of all processes, with their ids and their images' places in the whole batch."""

    def __init__(self, anchors: Tensor, ids: Tensor, lengths: list[int]) -> None:
        views = len(anchors) // max(lengths[distributed.rank()], 1)
        self.lengths = [views * length for length in lengths]
        self.anchors = distributed.gather_without_gradient(anchors, self.lengths)
        self.ids = distributed.gather_without_gradient(ids, self.lengths)
        places = torch.arange(sum(lengths), device=ids.device).split(lengths)
        self.images = torch.cat([place.repeat(views) for place in places])


def _spans(anchors: int, numbers: int) -> Iterator[slice]:
    """Anchors in parts, of which each holds `numbers` numbers."""
    return slices(0, anchors, max(NUMBERS // max(numbers, 1), 1))


def _sum_common(rows: Tensor, weights: Tensor) -> Tensor:
    return weights @ rows


def _sum_dense(rows: Tensor, drawn: Tensor, weights: Tensor) -> Tensor:
    # What is no noise has no weight, wherever it points.
    return weights.new_zeros(len(weights), len(rows)).scatter_add_(1, drawn, weights) @ rows


def _sum_gathered(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("am,amd->ad", weights, rows)
