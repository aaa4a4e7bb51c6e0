"""Gradient of a batch that does not fit in memory, in chunks: GradCache (Gao et al. 2021, section 3.2).

All chunks pass the encoder without gradient; the loss of all embeddings gives the gradient in them; then each chunk
passes again and is differentiated with its part of that gradient. The result equals the gradient of the whole batch,
with the memory of one chunk, for one more forward pass. Only batch norms differ: they normalise each chunk by its own
statistics.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from manyviews.objectives import Loss
from manyviews.system import distributed
from manyviews.train.components import Components, smallest_part
from manyviews.train.step import buffers_of, embed, encode, queries_of, restore_buffers


def num_chunks(components: Components, batch: int) -> int:
    """Number of chunks of a rank's share of a batch, the same on all ranks; collective.

    The fewest that `train.chunk` allows, with sizes that differ by at most one image. A chunk may exceed `train.chunk`
    where batch norms would otherwise get too few images.
    """
    chunk = components.recipe.train.chunk
    if chunk is None:
        return 1
    shares = distributed.counts(batch)
    return max(1, min(-(-max(shares) // chunk), min(shares) // smallest_part(components.encoder)))


def cached_gradient(
    components: Components, images: Tensor, ids: Tensor, named: Tensor, epoch: int, step: int, chunks: int
) -> tuple[Loss, Tensor, Tensor | None]:
    """Accumulates the gradient of the whole batch in the parameters; returns loss, embeddings and targets.

    Arguments as of `gradient`, with the objective's ids in `named`. Step and chunk seed the dropout of both passes.
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


def finite_views(components: Components, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
    """Whether the views of each image are finite; makes them again, chunk by chunk."""
    chunks = num_chunks(components, len(ids))
    batches = zip(images.tensor_split(chunks), ids.tensor_split(chunks), strict=True)
    return torch.cat([components.views(*batch, epoch).isfinite().flatten(2).all(2).all(0) for batch in batches])


def _first_passes(
    components: Components, batches: list[tuple[Tensor, Tensor]], epoch: int, step: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Embeddings and targets of all chunks, and with `train.keep_views` the encoder's views of each."""
    buffers = buffers_of(components.encoder)
    embeddings, targets, kept = [], [], []
    for chunk, batch in enumerate(batches):
        embedded, target, queries = _first_pass(components, components.views(*batch, epoch), step, chunk)
        embeddings.append(embedded)
        targets += [target] if target is not None else []
        kept += [queries] if queries is not None else []
    # The second pass updates the running statistics.
    restore_buffers(buffers)
    return torch.cat(embeddings, 1), torch.cat(targets, 1) if targets else None, kept


def _first_pass(
    components: Components, views: Tensor, step: int, chunk: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # Without gradient a compiled encoder would be compiled again, to a graph that may draw other dropout. Autograd's
    # memory of the chunk is freed with it: no more than in the second pass.
    with torch.set_grad_enabled(components.recipe.train.compile), components.accelerator.no_sync(components.forward):
        embeddings, targets = embed(components, views, step, chunk)
    queries = None
    if components.recipe.train.keep_views:
        queries = queries_of(components, views)
        # A slice would keep the twin's views in memory too.
        queries = queries.clone() if len(queries) < len(views) else queries
    return embeddings.detach(), targets, queries
