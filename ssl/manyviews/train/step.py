"""Parts of an update: forward passes, gradient in chunks, objective's gradients."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from manyviews.data.images import Pictures
from manyviews.encoder.batch_norm import Shuffle
from manyviews.encoder.encoder import Embedded
from manyviews.objectives import Loss
from manyviews.system import distributed
from manyviews.system.keyed_random import seed_of
from manyviews.train.components import Components, smallest_part
from manyviews.train.kept_buffers import KeptBuffers
from manyviews.train.not_finite import SkippedStep

Groups = tuple[Float[Tensor, "_ batch channels _ _"], ...]
"""Views, those of each size in a tensor of their own; local ones come last."""


class StepResult(NamedTuple):
    """Result of an optimizer step: the loss and the detached tensors it was computed from."""

    loss: Loss
    embeddings: Float[Tensor, "views batch dim"]
    ids: Int64[Tensor, " batch"]
    """The ids that the objective gets."""
    targets: Float[Tensor, "others batch dim"] | None
    skipped: Callable[[], SkippedStep | None] = lambda: None
    """What was not finite, if a GPU has skipped the step; waits until it has. Asked one step later, the GPU is busy."""


def embed(components: Components, views: Groups, step: int, chunk: int = 0) -> tuple[Tensor, Tensor | None]:
    """Embeddings and targets: projections of the twin, or the inputs of the predictor."""
    embedded = encode(components, queries_of(components, views), step, chunk)
    targets = None
    if components.twin is not None:
        # Local views are the encoder's alone.
        keys = views[0][1:] if components.recipe.objective.traits.splits_views else views[0]
        targets = _full(_encode_by_twin(components, keys, step, chunk))
    elif len(components.encoder.predictor):
        targets = embedded.projections.detach()
    return embedded.embeddings, targets


def queries_of(components: Components, views: Groups) -> Groups:
    """The views for the encoder, without those for its twin."""
    return (views[0][:1], *views[1:]) if components.recipe.objective.traits.splits_views else views


def encode(components: Components, queries: Groups, step: int, chunk: int) -> Embedded:
    """Passes views through the encoder; dropout is seeded by step, rank and chunk."""
    key = f"{components.recipe.seed} {step} {distributed.rank()} {chunk}"
    torch.manual_seed(seed_of(key) >> 1)
    embedded: Embedded = components.forward(*queries)
    return Embedded(_full(embedded.embeddings), _full(embedded.projections))


@torch.no_grad()
def _encode_by_twin(components: Components, views: Tensor, step: int, chunk: int) -> Tensor:
    assert components.twin is not None
    with components.accelerator.autocast():
        if not components.shuffled:
            projections: Tensor = components.twin(views)
            return projections
        # All views of an image are sent together: the axis of images comes first.
        shuffle = Shuffle.draw(views.shape[1], (components.recipe.seed, step, chunk), views.device)
        shuffled = shuffle.away(views.transpose(0, 1))
        return shuffle.home(_full(components.twin(shuffled.transpose(0, 1))).transpose(0, 1)).transpose(0, 1)


def _full(embeddings: Tensor) -> Tensor:
    """Casts to float32 or wider, for the objective."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def num_chunks(components: Components, batch: int) -> int:
    """Number of chunks of a rank's share of a batch, the same on all ranks; collective.

    The fewest that `train.chunk` allows, with sizes that differ by at most one image. A chunk may exceed `train.chunk`
    where batch norms would otherwise get too few images.
    """
    chunk = components.recipe.train.part
    if chunk is None:
        return 1
    shares = distributed.counts(batch)
    return max(1, min(-(-max(shares) // chunk), min(shares) // smallest_part(components.encoder)))


def cached_gradient(
    components: Components, images: Pictures, ids: Tensor, named: Tensor, epoch: int, step: int, chunks: int
) -> tuple[Loss, Tensor, Tensor | None]:
    """Gradient of a batch that does not fit in memory: GradCache (Gao et al. 2021, section 3.2).

    All chunks pass the encoder without gradient; the loss of all embeddings gives the gradient in them; then each chunk
    passes again and is differentiated with its part of that gradient. The result is the gradient of the whole batch,
    with the memory of one chunk, for one more forward pass; only batch norms differ, which see one chunk at a time.

    Accumulates the gradient in the parameters; returns loss, embeddings and targets. Arguments as of `gradient`, with
    the objective's ids in `named`.
    """
    batches = list(zip(images.tensor_split(chunks), ids.tensor_split(chunks), strict=True))
    embeddings, targets, kept = _first_passes(components, batches, epoch, step)
    loss: Loss = components.objective(embeddings.requires_grad_(), named, targets, step)
    # With fp16 the gradient in the embeddings is scaled already: the second pass must not scale it again.
    components.accelerator.backward(loss.total)
    assert embeddings.grad is not None
    for chunk, cached in enumerate(embeddings.grad.tensor_split(chunks, 1)):
        last = chunk == chunks - 1
        # Gradients accumulate on each rank; DDP averages them in the backward of the last chunk.
        with nullcontext() if last else components.accelerator.no_sync(components.forward):
            queries = kept[chunk] if kept else queries_of(components, components.views(*batches[chunk], epoch))
            torch.autograd.backward(encode(components, queries, step, chunk).embeddings, cached)
            # Freed before the next views are made.
            del queries
    return loss, embeddings, targets


def finite_views(components: Components, images: Pictures, ids: Tensor, epoch: int) -> Tensor:
    """Whether the views of each image are finite; makes them again, chunk by chunk."""
    chunks = num_chunks(components, len(ids))
    batches = zip(images.tensor_split(chunks), ids.tensor_split(chunks), strict=True)
    finite = []
    for batch in batches:
        groups = [group.isfinite().flatten(2).all(2).all(0) for group in components.views(*batch, epoch)]
        finite.append(torch.stack(groups).all(0))
    return torch.cat(finite)


def _first_passes(
    components: Components, batches: list[tuple[Pictures, Tensor]], epoch: int, step: int
) -> tuple[Tensor, Tensor | None, list[Groups]]:
    """Embeddings and targets of all chunks, and with `train.keep_views` the views of each."""
    buffers = KeptBuffers(components.encoder)
    embeddings, targets = [], []
    kept: list[Groups] = []
    for chunk, batch in enumerate(batches):
        views = components.views(*batch, epoch)
        # Without gradient a compiled encoder would be compiled again, to a graph that may draw other dropout.
        grad = torch.set_grad_enabled(components.recipe.train.compile)
        with grad, components.accelerator.no_sync(components.forward):
            embedded, target = embed(components, views, step, chunk)
        embeddings.append(embedded.detach())
        targets += [target] if target is not None else []
        if components.recipe.train.keep_views:
            first, *local = queries_of(components, views)
            # A slice would keep the twin's views in memory too.
            kept.append((first.clone() if len(first) < len(views[0]) else first, *local))
        # The memory of the chunk and its graph is freed before the next one.
        del views, embedded
    # The second pass updates the running statistics.
    buffers.restore()
    return torch.cat(embeddings, 1), torch.cat(targets, 1) if targets else None, kept


def average_gradients(objective: nn.Module, sharded: set[str]) -> None:
    """Averages the gradients of an objective's parameters over the ranks; collective.

    Replicated parameters get the mean. `sharded` ones hold the sum over ranks of gradients of local means: it is
    divided by the world size.
    """
    for name, parameter in objective.named_parameters():
        # Collective, so a rank whose anchors did not use the parameter takes part too.
        if name not in sharded:
            parameter.grad = distributed.mean(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        elif parameter.grad is not None:
            parameter.grad /= distributed.world_size()
