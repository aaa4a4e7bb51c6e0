"""Mathematics that objectives share: cross-entropies, and means over all ranks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyviews.engine import log_sum_exp
from manyviews.system import distributed

P = ParamSpec("P")
R = TypeVar("R")


class Gathered(NamedTuple):
    """Embeddings of all ranks, as on a single one: all images of a view, then the next view."""

    rows: Float[Tensor, "all dim"]
    """With gradient to the rank that each came from."""
    ids: Int[Tensor, " all"]
    own: Int[Tensor, " anchors"]
    """Indices of this rank's embeddings, view by view; those of views that are no keys lie beyond the rows."""


def gather_views(
    embeddings: Float[Tensor, "views batch dim"], ids: Int[Tensor, " batch"], keys: int | None = None
) -> Gathered:
    """Gathers the embeddings of all ranks' first `keys` views (None: all) with their ids; collective."""
    views, lengths = len(embeddings), distributed.counts(len(ids))
    rows = distributed.gather(embeddings[:keys].transpose(0, 1), lengths).transpose(0, 1).flatten(0, 1)
    own = torch.arange(sum(lengths), device=ids.device).split(lengths)[distributed.rank()]
    starts = sum(lengths) * torch.arange(views, device=ids.device)
    gathered_ids = distributed.gather_without_gradient(ids, lengths).repeat(views if keys is None else keys)
    return Gathered(rows, gathered_ids, (starts[:, None] + own).flatten())


def share_of_mean(total: Float[Tensor, "*figures"], count: Tensor) -> Float[Tensor, "*figures"]:
    """This rank's part of a mean: the mean of the parts is Σ totals / Σ counts.

    0, with a zero gradient, where nothing was counted; counts may be sums of weights. Collective.
    """
    whole = distributed.total(count).to(total.dtype)
    return total * distributed.world_size() / whole.where(whole > 0, 1)


def average(losses: Float[Tensor, " anchors"]) -> Float[Tensor, ""]:
    """This rank's part of the mean over all ranks' anchors: the mean of the parts is that mean.

    It is the local mean where all ranks have equally many anchors, and stays exact where a last batch is uneven.
    """
    return losses.sum() * (distributed.world_size() / sum(distributed.counts(len(losses))))


def cross_entropy(
    negatives: Float[Tensor, "*anchors"], positives: Float[Tensor, "*anchors"]
) -> Float[Tensor, "*anchors"]:
    """−log(e^p / (e^p + Σ e^n)) from the log-sum-exp of the negatives n and the logit p.

    0, with a zero gradient, where the log-sum-exp is −inf because there are no negatives.
    """
    return softplus(negatives - positives)


def squared_distances(products: Float[Tensor, "*pairs"], *, normalized: bool) -> Float[Tensor, "*pairs"]:
    """Squared distances from products: cosines of `normalized` rows, or else squared distances but for rounding."""
    return 2 - 2 * products if normalized else products.clamp(min=0)


def distances(squares: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """Distances from squared ones; with a zero gradient where points coincide."""
    return squares.clamp(min=torch.finfo(squares.dtype).eps).sqrt()


def softplus(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 + e^x), exact in float64 too: PyTorch's own threshold of 20 is 2e-9 off."""
    return F.softplus(logits, threshold=40)


def softmax_cross_entropy(
    queries: Float[Tensor, "queries dim"],
    positives: Float[Tensor, " queries"],
    ids: Int[Tensor, " queries"],
    rows: Float[Tensor, "rows dim"],
    row_ids: Int[Tensor, " rows"],
    temperature: float,
    *,
    unit: bool = True,
) -> Float[Tensor, " queries"]:
    """Cross-entropy of each query's positive against the rows of all ranks that have another id.

    `positives` are the products of the queries with their own positives; `rows` are those of this rank. Rows that may
    be longer than 1 are not `unit`.
    """
    others = log_sum_exp(queries, rows, temperature, query_ids=ids, key_ids=row_ids, unit=unit, tf32_gradient=unit)
    return cross_entropy(others, positives / temperature)


def information(
    losses: Float[Tensor, " anchors"],
    candidates: Float[Tensor, " anchors"],
    *,
    positives: Float[Tensor, " anchors"] | None = None,
    counted: Bool[Tensor, " anchors"] | None = None,
) -> dict[str, Tensor]:
    """InfoNCE bound of the mutual information of anchor and positive, and its ceiling, in nats.

    I ≥ log N − loss (van den Oord et al. 2018, section 2.3), with N candidates for each anchor, its positives among
    them; and this for any scores (Poole et al. 2019, equation 10), whatever loss they are trained by. The bound is at
    most log N; with P positives that share the softmax, as in SupCon, at most log N − log P.

    Collective: the mean over the ranks is the mean over the anchors of all of them.

    Args:
        losses: of each anchor, the mean over its positives of −log of the positive's share of the softmax.
        candidates: N of each anchor.
        positives: P of each anchor; None: 1.
        counted: which anchors count; None: all.
    """
    highest = candidates.clamp(min=1).log()
    ceiling = highest if positives is None else highest - positives.clamp(min=1).log()
    if counted is None:
        counted = torch.ones_like(losses, dtype=torch.bool)
    figures = torch.stack([highest - losses.detach(), ceiling]).where(counted, 0).sum(1)
    bound, ceiling = share_of_mean(figures, counted.sum())
    return {"information": bound, "ceiling": ceiling}


def float32_island(function: Callable[P, R]) -> Callable[P, R]:
    """Disables autocast in a function: at temperature 0.07 bfloat16 logits are off by 0.02."""

    @functools.wraps(function)
    def island(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return island


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        incoming = gradients[0]
        return gradient * incoming.view(*incoming.shape, *[1] * (gradient.ndim - incoming.ndim)), None, None


def with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """Attaches to a value the known gradient of its sum in the inputs; saves autograd's memory.

    The value has one number for each row of the inputs, or one for all; the gradient has the shape of the inputs.
    """
    result: Tensor = _WithGradient.apply(inputs, value, gradient)
    return result
