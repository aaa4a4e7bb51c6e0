"""An anchor's own row against random rows of all ranks: NCE, and the softmax over them."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyviews.engine.rows import slices, tile_numbers
from manyviews.objectives.losses import softplus, with_gradient
from manyviews.objectives.sharded_rows import owned
from manyviews.system import distributed
from manyviews.system.keyed_random import send, torch_generator

Weigh = Callable[[Tensor], Tensor]

NUMBERS = 1 << 22
"""Numbers in memory at a time on a CPU: 16 MiB of scores, or of rows where each image has its own."""
DENSE = 64
"""Rows for each one drawn for an image, up to which products with all rows cost less than gathering the drawn ones."""


def draw(total: int, count: int, images: int | None, *, seed: int, step: int) -> Int[Tensor, "*images count"]:
    """Draws rows uniformly with replacement, from seed and step alone (Wu et al. 2018, 3.2).

    One draw of `count` for all images if `images` is None, else one for each.
    """
    shape = (count,) if images is None else (images, count)
    return torch.randint(total, shape, generator=torch_generator(seed, step))


class Noise:
    """Sharded noise rows of a step; a draw of an anchor's own row does not count for it.

    Args:
        rows: of this rank.
        start: number of the first of them.
        total: rows of all ranks.
        ids: numbers of the rows drawn, equal on all ranks: [count] for all images, or [images of all ranks, count].
        lengths: images of each rank.
    """

    def __init__(self, rows: Tensor, start: int, total: int, ids: Tensor, lengths: list[int]) -> None:
        self.rows, self.start, self.total, self.lengths = rows, start, total, lengths
        self.ids, self.count = send(ids, rows.device), ids.shape[-1]
        # Of one draw this rank's rows, found where they were drawn: on the CPU.
        drawn = ids - start
        self.own_draws = send(drawn[owned(rows, drawn)], rows.device) if ids.ndim == 1 else None

    def own_hits(self, ids: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Number of draws that are the own row of each image of this rank."""
        drawn = self.ids if self.ids.ndim == 1 else self.ids.split(self.lengths)[distributed.rank()]
        return (drawn == ids[:, None]).sum(1)

    def gather(self, anchors: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """All ranks' anchors, [views · batch], their ids, their images' indices, and the lengths."""
        views = len(anchors) // max(self.lengths[distributed.rank()], 1)
        lengths = [views * length for length in self.lengths]
        indices = torch.arange(sum(self.lengths), device=ids.device).split(self.lengths)
        anchors = distributed.gather_without_gradient(anchors, lengths)
        ids = distributed.gather_without_gradient(ids, lengths)
        return anchors, ids, torch.cat([own.repeat(views) for own in indices]), lengths

    def scores(self, anchors: Tensor, ids: Tensor, images: Tensor) -> Iterator[tuple[slice, Tensor, Weigh]]:
        """Yields products with this rank's noise, some anchors at a time; −inf is no noise.

        Each comes with a function from weights of these products to weighted sums of the rows. `images` are the
        indices of the anchors' images in the whole batch.
        """
        if self.own_draws is not None:
            drawn = self.own_draws
            common = self.rows[drawn].to(anchors.dtype)
            for span in _spans(anchors, len(drawn)):
                scores = anchors[span] @ common.T
                yield span, self._masked(scores, drawn, ids[span]), partial(torch.matmul, other=common)
        elif 0 < len(self.rows) <= DENSE * self.count:
            rows = self.rows.to(anchors.dtype)
            for span in _spans(anchors, len(rows)):
                products, drawn = anchors[span] @ rows.T, self.ids[images[span]] - self.start
                own, drawn = owned(self.rows, drawn), drawn.clamp(0, len(rows) - 1)
                scores = products.gather(1, drawn).masked_fill_(~own, -torch.inf)
                yield span, self._masked(scores, drawn, ids[span]), partial(_sum_dense, rows, drawn)
        else:
            for span in _spans(anchors, self.count * self.rows.shape[1]):
                drawn, own = self._compact(self.ids[images[span]] - self.start)
                gathered = self.rows[drawn].to(anchors.dtype)
                scores = torch.einsum("ad,amd->am", anchors[span], gathered).masked_fill_(~own, -torch.inf)
                yield span, self._masked(scores, drawn, ids[span]), partial(_sum_gathered, gathered)

    def _masked(self, scores: Tensor, drawn: Tensor, ids: Tensor) -> Tensor:
        return scores.masked_fill_(drawn + self.start == ids[:, None], -torch.inf)

    def _compact(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Moves each anchor's draws of this rank's rows to the front of as few columns as possible."""
        own = owned(self.rows, drawn)
        if self.rows.device.type != "cpu":
            # The number of columns would be waited for.
            return (drawn % len(self.rows), own) if len(self.rows) else (drawn[:, :0], own[:, :0])
        if bool(own.all()):
            return drawn, own
        order = own.byte().argsort(dim=1, descending=True, stable=True)[:, : int(own.sum(1).max())]
        own = own.gather(1, order)
        return drawn.gather(1, order).masked_fill(~own, 0), own


def noise_contrast(
    anchors: Float[Tensor, "anchors dim"],
    positives: Float[Tensor, " anchors"],
    ids: Int[Tensor, " anchors"],
    noise: Noise,
    log_normaliser: Float[Tensor, ""],
    temperature: float,
) -> Float[Tensor, " anchors"]:
    """NCE with P = exp(s/τ) / Z against noise of 1/n (Wu et al. 2018, equations 4 to 7).

    With u = s/τ − log Z − log(m/n) the loss is softplus(−u₀) + Σₖ softplus(uₖ), summed over the m noise rows: the
    authors' code without its exponentials and without its 1e-7. Anchors are [views · batch]. Noise that is the anchor's
    own row adds nothing (the authors' code counts it).
    """
    offset = log_normaliser + math.log(noise.count / noise.total)
    with torch.no_grad():
        # The noise rows need no gradient, so one pass gives both losses and gradient.
        everyone, all_ids, images, lengths = noise.gather(anchors, ids)
        losses, gradient = everyone.new_empty(len(everyone)), torch.empty_like(everyone)
        for span, scores, weigh in noise.scores(everyone, all_ids, images):
            logits = scores.div_(temperature).sub_(offset)
            losses[span] = softplus(logits).sum(1)
            gradient[span] = weigh(logits.sigmoid_().div_(temperature))
        gradient, losses = (distributed.scatter_sum(part, lengths) for part in (gradient, losses))
    return softplus(offset - positives / temperature) + with_gradient(anchors, losses, gradient)


def log_sum_over_noise(
    anchors: Float[Tensor, "anchors dim"], ids: Int[Tensor, " anchors"], noise: Noise, temperature: float
) -> Float[Tensor, " anchors"]:
    """Log of Σ exp(anchor · row / temperature) over each anchor's noise rows; −inf without any.

    Anchors are [views · batch]. Differentiable in the anchors: the gradient is the softmax-weighted mean of the rows
    over the temperature.
    """
    with torch.no_grad():
        everyone, all_ids, images, lengths = noise.gather(anchors, ids)
        sums = everyone.new_zeros(len(everyone), 1)
        maximum = sums.clone()
        weighted = torch.zeros_like(everyone) if anchors.requires_grad else None
        for span, scores, weigh in noise.scores(everyone, all_ids, images):
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
        sums = distributed.scatter_sum(sums * shrink, lengths)
        logarithms = sums.log().add_(highest.split(lengths)[distributed.rank()]).squeeze(1)
        if weighted is None:
            return logarithms
        weighted = distributed.scatter_sum(weighted * shrink, lengths)
        weighted = weighted.div_((sums * temperature).clamp(min=torch.finfo(sums.dtype).tiny))
    return with_gradient(anchors, logarithms, weighted)


def normaliser_from_noise(
    others: Float[Tensor, " anchors"],
    positives: Float[Tensor, " anchors"],
    own_hits: Int[Tensor, " anchors"],
    noise: Noise,
    temperature: float,
) -> Float[Tensor, " anchors"]:
    """Log of an unbiased estimate of Z for each anchor: its own row, and the others by noise.

    `others` are the log-sums over the noise. The authors' code takes the mean of positive and noise scores together, in
    which a trained positive, e^(1/τ) times the rest, counts n/m times too much.
    """
    kept = (noise.count - own_hits).clamp(min=1)
    return torch.logaddexp(others + torch.log((noise.total - 1) / kept), positives / temperature)


def _spans(anchors: Tensor, numbers: int) -> Iterator[slice]:
    """Slices of anchors, for `numbers` numbers of each."""
    return slices(0, len(anchors), max(tile_numbers(anchors.device, NUMBERS) // max(numbers, 1), 1))


def _sum_dense(rows: Tensor, drawn: Tensor, weights: Tensor) -> Tensor:
    # Draws that are no noise have no weight, whatever their index.
    sums = weights.new_zeros(len(weights), len(rows))
    if rows.device.type == "cpu":
        return sums.scatter_add_(1, drawn, weights) @ rows
    # That adds equal draws in any order on a GPU.
    number = torch.arange(len(weights), device=rows.device)[:, None].expand_as(drawn)
    return sums.index_put_((number, drawn), weights, accumulate=True) @ rows


def _sum_gathered(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("am,amd->ad", weights, rows)
