"""Parts of an update: forward passes of encoder and twin, gradients of the objective, buffers."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from manyviews.encoder.batch_norm import Shuffle
from manyviews.encoder.encoder import Embedded
from manyviews.objectives import Loss
from manyviews.system import distributed
from manyviews.system.keyed_random import seed_of
from manyviews.train.components import Components


class StepResult(NamedTuple):
    """Result of an optimizer step: the loss and the detached tensors it was computed from."""

    loss: Loss
    embeddings: Float[Tensor, "views batch dim"]
    ids: Int64[Tensor, " batch"]
    """The ids that the objective gets."""
    targets: Float[Tensor, "others batch dim"] | None


def embed(components: Components, views: Tensor, step: int, chunk: int = 0) -> tuple[Tensor, Tensor | None]:
    """Embeddings and targets: the twin's projections, or those that the encoder's predictor is fed."""
    embedded = encode(components, queries_of(components, views), step, chunk)
    targets = None
    if components.twin is not None:
        keys = views[1:] if components.recipe.objective.splits_views else views
        targets = _full(_encode_by_twin(components, keys, step, chunk))
    elif len(components.encoder.predictor):
        targets = embedded.projections.detach()
    return embedded.embeddings, targets


def queries_of(components: Components, views: Tensor) -> Tensor:
    """The views for the encoder, without those for its twin."""
    return views[:1] if components.recipe.objective.splits_views else views


def encode(components: Components, queries: Tensor, step: int, chunk: int) -> Embedded:
    """Passes views through the encoder; dropout is seeded by step, rank and chunk, for an exact resume."""
    key = f"{components.recipe.seed} {step} {distributed.rank()} {chunk}"
    torch.manual_seed(seed_of(key) >> 1)
    embedded: Embedded = components.forward(queries)
    return Embedded(_full(embedded.embeddings), _full(embedded.projections))


@torch.no_grad()
def _encode_by_twin(components: Components, views: Tensor, step: int, chunk: int) -> Tensor:
    assert components.twin is not None
    with components.accelerator.autocast():
        if not components.shuffled:
            projections: Tensor = components.twin(views)
            return projections
        # All views of an image are sent together: the axis of images comes first.
        shuffle = Shuffle.draw(views.shape[1], (components.recipe.seed, step, chunk))
        shuffled = shuffle.away(views.transpose(0, 1))
        return shuffle.home(_full(components.twin(shuffled.transpose(0, 1))).transpose(0, 1)).transpose(0, 1)


def _full(embeddings: Tensor) -> Tensor:
    """Casts to float32 or wider, for the objective."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def average_gradients(objective: nn.Module, sharded: set[str]) -> None:
    """Averages the gradients of an objective's parameters over the ranks, as DDP does the encoder's; collective.

    Replicated parameters get the mean. `sharded` ones hold the sum over ranks of gradients of local means: it is
    divided by the world size.
    """
    for name, parameter in objective.named_parameters():
        # Collective, so a rank whose anchors did not use the parameter takes part too.
        if name not in sharded:
            parameter.grad = distributed.mean(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        elif parameter.grad is not None:
            parameter.grad /= distributed.world_size()


def buffers_of(*modules: nn.Module | None) -> list[tuple[Tensor, Tensor]]:
    """The buffers of modules (statistics of batch norms), each with a copy."""
    return [(buffer, buffer.clone()) for module in modules if module is not None for buffer in module.buffers()]


def restore_buffers(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Restores buffers from their copies."""
    for buffer, value in buffers:
        buffer.copy_(value)
