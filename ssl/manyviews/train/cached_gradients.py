"""The gradient of a batch that is beyond memory, in chunks: GradCache (Gao et al. 2021, section 3.2).

First all chunks pass the encoder without gradient; then comes the loss of all embeddings with its gradient in them;
then each chunk passes again and is differentiated with its part of that gradient. The result is the gradient of the
same batch in one piece, with the memory of one chunk, for one more forward pass. Only batch norms see a difference:
they normalise each chunk by its own statistics, which they follow once per chunk.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from manyviews.objectives import Loss
from manyviews.system import distributed
from manyviews.train.components import Components, smallest_part
from manyviews.train.step import buffers_of, embed, encode, queries_of, restore_buffers


def num_chunks(components: Components, batch: int) -> int:
    """How many chunks a process makes of its share of a batch: the same number on all processes; collective.

    As few as `train.chunk` allows, and of equal size but for one image: no rest of a single image remains, which
    batch norm could not normalise. Where that takes it, a chunk holds more images than it was asked to.
    """
    chunk = components.recipe.train.chunk
    if chunk is None:
        return 1
    shares = distributed.counts(batch)
    return max(1, min(-(-max(shares) // chunk), min(shares) // smallest_part(components.encoder)))


def cached_gradient(
    components: Components, images: Tensor, ids: Tensor, named: Tensor, epoch: int, step: int, chunks: int
) -> tuple[Loss, Tensor, Tensor | None]:
    """Leaves the gradient of the whole batch in the parameters; returns the loss, the embeddings and the targets.

    The arguments are those of `gradient`, with the ids as the objective knows them and the number of chunks. The step
    and the chunk determine the dropout, in both passes alike.
    """
    batches = list(zip(images.tensor_split(chunks), ids.tensor_split(chunks), strict=True))
    embeddings, targets, kept = _first_passes(components, batches, epoch, step)
    loss: Loss = components.objective(embeddings.requires_grad_(), named, targets, step)
    # With fp16 what arrives in the embeddings is scaled already, and the second pass must not scale it again.
    components.accelerator.backward(loss.total)
    assert embeddings.grad is not None
    for chunk, cached in enumerate(embeddings.grad.tensor_split(chunks, 1)):
        last = chunk == chunks - 1
        # Gradients add up on each process; DDP takes their mean when the last chunk brings its own.
        with nullcontext() if last else components.accelerator.no_sync(components.forward):
            queries = kept[chunk] if kept else queries_of(components, components.views(*batches[chunk], epoch))
            torch.autograd.backward(encode(components, queries, step, chunk).embeddings, cached)
            # Before the next views are made.
            del queries
    return loss, embeddings, targets


def finite_views(components: Components, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
    """Whether the views of each image are finite, made anew, with the memory of a chunk."""
    chunks = num_chunks(components, len(ids))
    batches = zip(images.tensor_split(chunks), ids.tensor_split(chunks), strict=True)
    return torch.cat([components.views(*batch, epoch).isfinite().flatten(2).all(2).all(0) for batch in batches])


def _first_passes(
    components: Components, batches: list[tuple[Tensor, Tensor]], epoch: int, step: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Embeddings and targets of all chunks, and the encoder's views of each chunk where they are kept."""
    buffers = buffers_of(components.encoder)
    embeddings, targets, kept = [], [], []
    for chunk, batch in enumerate(batches):
        embedded, target, queries = _first_pass(components, components.views(*batch, epoch), step, chunk)
        embeddings.append(embedded)
        targets += [target] if target is not None else []
        kept += [queries] if queries is not None else []
    # The second pass moves the running statistics; twice would be once too often.
    restore_buffers(buffers)
    return torch.cat(embeddings, 1), torch.cat(targets, 1) if targets else None, kept


def _first_pass(
    components: Components, views: Tensor, step: int, chunk: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of one chunk: embeddings, targets, and the encoder's views if they are kept."""
    # Without gradient a compiled encoder would be compiled once more, to a graph that may draw other dropout. What
    # autograd remembers of a chunk goes with the chunk, so that it needs no more memory than the second pass.
    with torch.set_grad_enabled(components.recipe.train.compile), components.accelerator.no_sync(components.forward):
        embeddings, targets = embed(components, views, step, chunk)
    queries = None
    if components.recipe.train.keep_views:
        queries = queries_of(components, views)
        # A slice would keep the twin's views too.
        queries = queries.clone() if len(queries) < len(views) else queries
    return embeddings.detach(), targets, queries
