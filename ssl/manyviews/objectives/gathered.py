"""The embeddings of all processes, for objectives that compare each of their own with every one."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyviews.system import distributed


class Gathered(NamedTuple):
    """All embeddings in the order one process would have them: all images of a view, then those of the next view."""

    rows: Float[Tensor, "all dim"]
    """With gradient to the process that each came from."""
    ids: Int[Tensor, " all"]
    own: Int[Tensor, " anchors"]
    """The places of this process's embeddings, view by view."""


def gather_views(embeddings: Float[Tensor, "views batch dim"], ids: Int[Tensor, " batch"]) -> Gathered:
    """The embeddings of all processes with their ids; collective."""
    views, lengths = len(embeddings), distributed.counts(len(ids))
    rows = distributed.gather(embeddings.transpose(0, 1), lengths).transpose(0, 1).flatten(0, 1)
    places = torch.arange(sum(lengths), device=ids.device)
    own = places.split(lengths)[distributed.rank()]
    starts = sum(lengths) * torch.arange(views, device=ids.device)
    found = distributed.gather_without_gradient(ids, lengths).repeat(views)
    return Gathered(rows, found, (starts[:, None] + own).flatten())


def share_of_mean(total: Float[Tensor, "*figures"], count: Tensor) -> Float[Tensor, "*figures"]:
    """This process's part of a mean: the mean of the parts is the sum of all totals over the sum of all counts.

    0, with a zero gradient, where nothing was counted; collective.
    """
    return total * distributed.world_size() / distributed.total(count).to(total.dtype).clamp(min=1)
