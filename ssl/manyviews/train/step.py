"""One update: images → views → embeddings → loss → gradient → weights → memory, all at once or in chunks."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from manyviews.data import Images, Order
from manyviews.encoder.batch_norm import Shuffle
from manyviews.encoder.encoder import Embedded
from manyviews.objectives import Loss
from manyviews.system import distributed
from manyviews.system.keyed_random import seed_of
from manyviews.train.components import Components, smallest_part
from manyviews.train.not_finite import Skipped, skipped


class StepResult(NamedTuple):
    """A step that was taken, and what it was taken on; detached."""

    loss: Loss
    embeddings: Float[Tensor, "views batch dim"]
    ids: Int64[Tensor, " batch"]
    """As the objective knows them."""
    targets: Float[Tensor, "others batch dim"] | None


def train_step(
    components: Components,
    images: UInt8[Tensor, "batch channels height width"],
    ids: Int64[Tensor, " batch"],
    epoch: int,
    step: int,
) -> StepResult | Skipped:
    """One update of the weights and, after it, of what the objective remembers.

    Where the loss or a gradient is not finite on any process, all of them skip the step, and it leaves no trace: not in
    the weights, nor in the optimiser, the objective's memory, the twin, or the statistics of batch norms.

    Args:
        components: the parts.
        images: this process's share of the batch.
        ids: the indices of the images.
        epoch: the pass over the images; with the ids it determines the views.
        step: the number of updates before this one; it determines the noise.
    """
    recipe, accelerator, twin = components.recipe, components.accelerator, components.twin
    # Passes in training move the running statistics. An objective's passes move nothing: only its updates do.
    passed = [components.encoder] if twin is None else [components.encoder, twin]
    before = [(buffer, buffer.clone()) for module in passed for buffer in module.buffers()]
    taken = gradient(components, images, ids, epoch, step)
    # What fp16 has scaled; nothing otherwise.
    accelerator.unscale_gradients(components.optimiser)
    norm = _norm(components.encoder.parameters(), accelerator.device)
    numbers = taken.loss.total, norm, _norm(components.objective.parameters(), accelerator.device)
    judged = torch.stack([number.isfinite() for number in numbers])
    # All processes agree, and nothing else has moved yet: one that skipped alone would leave the others' path.
    if distributed.any_over_ranks(not bool(judged.all())):
        embeddings = taken.embeddings.isfinite().all(2).all(0)
        loss = {"loss": taken.loss.total, **taken.loss.terms}
        found = skipped(components, step, epoch, ids, _finite_views(components, images, ids, epoch), embeddings, loss)
        for buffer, value in before:
            buffer.copy_(value)
        if accelerator.scaler is not None:
            # As its own step would have done: in fp16 a scale that is too high is the usual reason.
            accelerator.scaler.update(accelerator.scaler.get_scale() * accelerator.scaler.get_backoff_factor())
        components.optimiser.zero_grad(set_to_none=True)
        return found
    if recipe.optim.clip is not None:
        clip_grads_with_norm_(components.encoder.parameters(), recipe.optim.clip, norm)
    components.optimiser.step()
    components.optimiser.zero_grad(set_to_none=True)
    components.objective.update(taken.embeddings, taken.ids, taken.targets)
    if twin is not None and recipe.objective.twin_momentum is not None:
        twin.update(components.encoder, recipe.objective.twin_momentum)
    return taken


def gradient(
    components: Components,
    images: UInt8[Tensor, "batch channels height width"],
    ids: Int64[Tensor, " batch"],
    epoch: int,
    step: int,
) -> StepResult:
    """The first half of `train_step`, with its arguments: leaves the gradient of the whole batch in the parameters.

    With `train.chunk`, the gradient is that of the same batch in one piece (Gao et al. 2021, GradCache, section 3.2):
    first all chunks pass the encoder without gradient; then comes the loss of all embeddings with its gradient in
    them; then each chunk passes again and is differentiated with its part of that gradient. Each chunk draws its
    dropout alike in both passes. The memory is that of one chunk, and the price one more forward pass. Only batch
    norms see a difference: they normalise each chunk by its own statistics, which they follow once per chunk.

    Gradients of the encoder are means over the processes, by DDP. So are those of parameters that an objective has
    alike on all processes. What reaches parameters that are spread over the processes is the sum over processes of the
    gradients of local means: it is divided by their number.
    """
    pieces = num_chunks(components, len(ids))
    named = ids if components.names is None else components.names[ids]
    batches = list(zip(images.tensor_split(pieces), ids.tensor_split(pieces), strict=True))
    if pieces == 1:
        views = components.views(images, ids, epoch)
        embeddings, targets = _embed(components, views, step, 0)
        loss: Loss = components.objective(embeddings, named, targets, step)
        components.accelerator.backward(loss.total)
    else:
        embeddings, targets, kept = _first_passes(components, batches, epoch, step)
        loss = components.objective(embeddings.requires_grad_(), named, targets, step)
        # With fp16 what arrives in the embeddings is scaled already, and the second pass must not scale it again.
        components.accelerator.backward(loss.total)
        assert embeddings.grad is not None
        for chunk, cached in enumerate(embeddings.grad.tensor_split(pieces, 1)):
            last = chunk == pieces - 1
            # Gradients add up on each process; DDP takes their mean when the last chunk brings its own.
            with nullcontext() if last else components.accelerator.no_sync(components.forward):
                queries = kept[chunk] if kept else _queries(components, components.views(*batches[chunk], epoch))
                torch.autograd.backward(_encode(components, queries, step, chunk).embeddings, cached)
                # Before the next views are made.
                del queries
    spread = components.objective.shards()
    for name, parameter in components.objective.named_parameters():
        # Alike on all processes, so all must come together here, also one whose anchors did not use it.
        if name not in spread:
            gradient_here = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = distributed.mean(gradient_here)
        elif parameter.grad is not None:
            parameter.grad /= distributed.world_size()
    return StepResult(Loss(loss.total.detach(), loss.terms), embeddings.detach(), named, targets)


def compile_encoder(components: Components, images: Images, order: Order, step: int) -> None:
    """Compiles an encoder that is to be compiled, by the gradient of its next batch, which leaves no trace; collective.

    Raises:
        ValueError: if that cannot be done here; in a run it would be noticed after its folder was made.
    """
    if not components.recipe.train.compile:
        return
    passed = [components.encoder] if components.twin is None else [components.encoder, components.twin]
    before = [(buffer, buffer.clone()) for module in passed for buffer in module.buffers()]
    epoch, batch = order.batch(step)
    ids, device = batch[distributed.share(len(batch))], components.accelerator.device
    components.forward.train()
    try:
        gradient(components, images.read(ids).to(device), ids.to(device), epoch, step)
    except (RuntimeError, OSError, ImportError) as problem:
        # The compiler's own errors are RuntimeErrors of a private module.
        kinds = [kind.__module__ for kind in type(problem).__mro__]
        if isinstance(problem, RuntimeError) and not any(kind.startswith("torch._dynamo") for kind in kinds):
            raise
        reason = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise ValueError(
            f"train.compile=true: the encoder cannot be compiled here ({reason.strip()}); it takes a C++ compiler (the "
            "Debian package g++), on a GPU Triton too, and a folder that may be written (TORCHINDUCTOR_CACHE_DIR); or "
            "leave train.compile out"
        ) from problem
    components.optimiser.zero_grad(set_to_none=True)
    for buffer, value in before:
        buffer.copy_(value)


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


def _first_passes(
    components: Components, batches: list[tuple[Tensor, Tensor]], epoch: int, step: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Embeddings and targets of all chunks, and the encoder's views of each chunk where they are kept."""
    before = [(buffer, buffer.clone()) for buffer in components.encoder.buffers()]
    embeddings, targets, kept = [], [], []
    for chunk, batch in enumerate(batches):
        found, target, queries = _first_pass(components, components.views(*batch, epoch), step, chunk)
        embeddings.append(found)
        targets += [target] if target is not None else []
        kept += [queries] if queries is not None else []
    # The second pass moves the running statistics; twice would be once too often.
    for buffer, value in before:
        buffer.copy_(value)
    return torch.cat(embeddings, 1), torch.cat(targets, 1) if targets else None, kept


def _first_pass(
    components: Components, views: Tensor, step: int, chunk: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of one chunk: embeddings, targets, and the encoder's views if they are kept."""
    # Without gradient a compiled encoder would be compiled once more, to a graph that may draw other dropout. What
    # autograd remembers of a chunk goes with the chunk, so that it needs no more memory than the second pass.
    with torch.set_grad_enabled(components.recipe.train.compile), components.accelerator.no_sync(components.forward):
        embeddings, targets = _embed(components, views, step, chunk)
    queries = None
    if components.recipe.train.keep_views:
        queries = _queries(components, views)
        # A slice would keep the twin's views too.
        queries = queries.clone() if len(queries) < len(views) else queries
    return embeddings.detach(), targets, queries


def _embed(components: Components, views: Tensor, step: int, chunk: int) -> tuple[Tensor, Tensor | None]:
    """What the objective gets: embeddings, and the twin's projections or those that the encoder's predictor is fed."""
    embedded = _encode(components, _queries(components, views), step, chunk)
    targets = None
    if components.twin is not None:
        targets = _full(
            _twin(components, views[1:] if components.recipe.objective.splits_views else views, step, chunk)
        )
    elif len(components.encoder.predictor):
        targets = embedded.projections.detach()
    return embedded.embeddings, targets


def _encode(components: Components, queries: Tensor, step: int, chunk: int) -> Embedded:
    # Dropout and drop path draw from the global generator: keyed here, a resumed step and a second pass draw alike.
    key = f"{components.recipe.seed} {step} {distributed.rank()} {chunk}"
    torch.manual_seed(seed_of(key) >> 1)
    embedded: Embedded = components.forward(queries)
    return Embedded(_full(embedded.embeddings), _full(embedded.projections))


@torch.no_grad()
def _twin(components: Components, views: Tensor, step: int, chunk: int) -> Tensor:
    assert components.twin is not None
    with components.accelerator.autocast():
        if not components.shuffled:
            projections: Tensor = components.twin(views)
            return projections
        # Along the axis of images, which comes first on the way: all views of an image go together.
        shuffle = Shuffle.draw(views.shape[1], (components.recipe.seed, step, chunk))
        there = shuffle.away(views.transpose(0, 1))
        return shuffle.home(_full(components.twin(there.transpose(0, 1))).transpose(0, 1)).transpose(0, 1)


def _queries(components: Components, views: Tensor) -> Tensor:
    return views[:1] if components.recipe.objective.splits_views else views


def _full(embeddings: Tensor) -> Tensor:
    """In float32 at least: objectives compute in no less."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def _norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The norm of a whole gradient: it is finite if all numbers are, and none is beyond 1e19."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return get_total_norm(gradients) if gradients else torch.zeros((), device=device)


def _finite_views(components: Components, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
    """Whether the views of each image are finite, made anew, with the memory of a chunk."""
    pieces = num_chunks(components, len(ids))
    chunks = zip(images.tensor_split(pieces), ids.tensor_split(pieces), strict=True)
    return torch.cat([components.views(*chunk, epoch).isfinite().flatten(2).all(2).all(0) for chunk in chunks])
