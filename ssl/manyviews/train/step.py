"""The pieces of an update: passes of the encoder and its twin, the objective's gradients, and buffers."""

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
    """The loss of a step and the tensors it was computed from; detached."""

    loss: Loss
    embeddings: Float[Tensor, "views batch dim"]
    ids: Int64[Tensor, " batch"]
    """As the objective knows them."""
    targets: Float[Tensor, "others batch dim"] | None


def embed(components: Components, views: Tensor, step: int, chunk: int = 0) -> tuple[Tensor, Tensor | None]:
    """What the objective gets: embeddings, and the twin's projections or those that the encoder's predictor is fed."""
    embedded = encode(components, queries_of(components, views), step, chunk)
    targets = None
    if components.twin is not None:
        keys = views[1:] if components.recipe.objective.traits.splits_views else views
        targets = _full(_encode_by_twin(components, keys, step, chunk))
    elif len(components.encoder.predictor):
        targets = embedded.projections.detach()
    return embedded.embeddings, targets


def queries_of(components: Components, views: Tensor) -> Tensor:
    """The views that pass the encoder, and not its twin."""
    return views[:1] if components.recipe.objective.traits.splits_views else views


def encode(components: Components, queries: Tensor, step: int, chunk: int) -> Embedded:
    """Passes views through the encoder; dropout is keyed by the step, so that a resumed step draws alike."""
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
        # Along the axis of images, which comes first on the way: all views of an image go together.
        shuffle = Shuffle.draw(views.shape[1], (components.recipe.seed, step, chunk))
        there = shuffle.away(views.transpose(0, 1))
        return shuffle.home(_full(components.twin(there.transpose(0, 1))).transpose(0, 1)).transpose(0, 1)


def _full(embeddings: Tensor) -> Tensor:
    """In float32 at least: objectives compute in no less."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def average_gradients(objective: nn.Module, sharded: set[str]) -> None:
    """Makes the gradients of an objective's parameters those of the whole batch, as DDP does the encoder's; collective.

    Of parameters that are alike on all processes it takes the mean. What reaches the `sharded` ones is the sum over
    processes of the gradients of local means: it is divided by their number.
    """
    for name, parameter in objective.named_parameters():
        # Alike on all processes, so all must come together here, also one whose anchors did not use it.
        if name not in sharded:
            parameter.grad = distributed.mean(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        elif parameter.grad is not None:
            parameter.grad /= distributed.world_size()


def buffers_of(*modules: nn.Module | None) -> list[tuple[Tensor, Tensor]]:
    """The buffers of modules, such as the statistics of batch norms that passes move, each with a copy."""
    return [(buffer, buffer.clone()) for module in modules if module is not None for buffer in module.buffers()]


def restore_buffers(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Gives buffers the values that they had when they were copied."""
    for buffer, value in buffers:
        buffer.copy_(value)
