"""Noise-contrastive estimation: an anchor's own row against rows drawn at random, without the softmax's sum."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SCORES = 1 << 22
"""Numbers held at once: 16 MiB of scores, or of rows where each image has its own."""


def noise_contrast(
    anchors: Float[Tensor, "anchors dim"],
    positives: Float[Tensor, " anchors"],
    ids: Int[Tensor, " anchors"],
    rows: Float[Tensor, "rows dim"],
    noise_ids: Int[Tensor, "... noise"],
    log_normaliser: Float[Tensor, ""],
    temperature: float,
) -> Float[Tensor, " anchors"]:
    """Is this the anchor's row or noise? (Wu et al. 2018, equations 4 to 7), with P = exp(s/τ) / Z and noise 1/n.

    With u = s/τ − log Z − log(m/n) the loss is softplus(−u₀) + Σₖ softplus(uₖ), summed over the m noise rows: the
    authors' code without its exponentials and without its 1e-7. `noise_ids` are [m] for all anchors, or [batch, m]
    with the anchors [views · batch]. Noise that is the anchor's own row adds nothing (the authors' code counts it).
    """
    offset = log_normaliser + math.log(noise_ids.shape[-1] / len(rows))
    noise: Tensor = _NoiseTerm.apply(anchors, ids, rows, noise_ids, temperature, offset)
    return F.softplus(offset - positives / temperature, threshold=40) + noise


@torch.no_grad()
def normaliser_from_noise(
    anchors: Float[Tensor, "anchors dim"],
    positives: Float[Tensor, " anchors"],
    ids: Int[Tensor, " anchors"],
    rows: Float[Tensor, "rows dim"],
    noise_ids: Int[Tensor, "... noise"],
    temperature: float,
) -> Float[Tensor, " anchors"]:
    """For each anchor an unbiased estimate of Z, as logarithm: its own row once, the other rows by the noise.

    The authors' code takes the mean of positive and noise scores alike, in which a trained positive, e^(1/τ) times
    the rest, counts n/m times too much.
    """
    others = torch.empty_like(positives)
    for span, _, scores in _noise_scores(anchors, ids, rows, noise_ids):
        kept = scores.isfinite().sum(1).clamp(min=1)
        others[span] = (scores / temperature).logsumexp(1) + torch.log((len(rows) - 1) / kept)
    return torch.logaddexp(others, positives / temperature)


def log_mean_exp(logarithms: Float[Tensor, " count"]) -> Float[Tensor, ""]:
    """The logarithm of the mean of the numbers whose logarithms are given."""
    return logarithms.logsumexp(0) - math.log(len(logarithms))


class _NoiseTerm(torch.autograd.Function):
    """Σₖ softplus(uₖ) for each anchor; the rows need no gradient, so one pass gives the value and the gradient."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, ids: Tensor, rows: Tensor, noise_ids: Tensor, temperature: float, offset: Tensor
    ) -> Tensor:
        losses = anchors.new_empty(len(anchors))
        gradient = torch.empty_like(anchors)
        for span, noise, scores in _noise_scores(anchors, ids, rows, noise_ids):
            logits = scores.div_(temperature).sub_(offset)
            losses[span] = F.softplus(logits, threshold=40).sum(1)
            weights = logits.sigmoid_().div_(temperature)
            gradient[span] = weights @ noise if noise.ndim == 2 else torch.einsum("am,amd->ad", weights, noise)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].unsqueeze(1), None, None, None, None, None


def _noise_scores(
    anchors: Tensor, ids: Tensor, rows: Tensor, noise_ids: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The products with the noise rows, some anchors at a time, −inf where a noise row is the anchor's own."""
    shared = noise_ids.ndim == 1
    common = rows[noise_ids].to(anchors.dtype) if shared else None
    per_anchor = noise_ids.shape[-1] * (1 if shared else rows.shape[1])
    step = max(SCORES // per_anchor, 1)
    for start in range(0, len(anchors), step):
        span = slice(start, min(start + step, len(anchors)))
        if common is not None:
            drawn, noise, scores = noise_ids, common, anchors[span] @ common.T
        else:
            drawn = noise_ids[torch.arange(span.start, span.stop, device=ids.device) % len(noise_ids)]
            noise = rows[drawn].to(anchors.dtype)
            scores = torch.einsum("ad,amd->am", anchors[span], noise)
        yield span, noise, scores.masked_fill_(ids[span, None] == drawn, -torch.inf)
