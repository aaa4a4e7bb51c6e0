"""The pretraining loop: images → views → embeddings → loss → gradient → update."""

from functools import partial
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from manyviews.data import Images, Loader, Order, background_of
from manyviews.data.images import Pictures
from manyviews.data.pictures import pictures
from manyviews.encoder.timm_format import export
from manyviews.objectives import Loss
from manyviews.optim import cosine, set_rate
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import Checkpoint, Saver, folder_name
from manyviews.run.folder import CHECKPOINTS, check_content, prepare
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.deterministic import deterministic
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.folder_lock import folder_lock
from manyviews.system.hardware import shortage
from manyviews.system.launch import start
from manyviews.train.budget import Budget
from manyviews.train.chunk_size import with_known_chunk
from manyviews.train.components import Components, less_memory
from manyviews.train.describe import describe
from manyviews.train.kept_buffers import KeptBuffers
from manyviews.train.not_finite import Guard, SkippedStep
from manyviews.train.recorder import Recorder
from manyviews.train.session import OnMetrics, Session, end, open_session
from manyviews.train.setup import finished, folder_of, make_setup, open_run
from manyviews.train.step import (
    StepResult,
    average_gradients,
    cached_gradient,
    embed,
    finite_views,
    num_chunks,
)
from manyviews.views import standard_view


def pretrain(recipe: Recipe, *, header: str = "", on_metrics: OnMetrics | None = None) -> Path:
    """Runs a recipe and returns its run folder.

    Saves on Ctrl-C, SIGTERM or SIGUSR1, then raises SystemExit. `header` is written to config.yaml, as comment lines;
    `on_metrics` is called on rank 0 with each line of metrics.

    Raises:
        ValueError: if recipe, images or launch are invalid, before anything is written.
    """
    with deterministic(recipe.train.deterministic, "train.deterministic"):
        return _pretrain(recipe, header, on_metrics)


def _pretrain(recipe: Recipe, header: str, on_metrics: OnMetrics | None) -> Path:
    accelerator = start(recipe.train.batch_size, recipe.train.precision, recipe.train.threads)
    console = Console(quiet=not accelerator.is_main_process)
    folder = folder_of(recipe)
    recipe = with_known_chunk(recipe, folder) if recipe.resume else recipe
    prepare(folder, resume=recipe.resume)
    if finished(recipe, folder, console):
        return folder
    with folder_lock(folder, partial(check_content, folder, resume=recipe.resume), console.warn) as lock_again:
        setup = make_setup(recipe, accelerator, folder, console, train_step)
        components, images, order, checkpoint = setup.components, setup.split.train, setup.order, setup.checkpoint
        warm_up(components, images, order, resumed=checkpoint is not None)
        settings = recipe.train
        saver = Saver(folder / CHECKPOINTS, keep=settings.keep, keep_best=settings.keep_best, warn=console.warn)
        opening = partial(open_run, setup, folder, console, header, lock_again)
        with open_session(opening, saver, console, on_metrics) as session:
            describe(setup, folder, console)
            with shortage(less_memory(components)):
                step = train(components, images, order, checkpoint, session)
        run = session.run
        exported, background = folder / "backbone", background_of(recipe.data)
        with raise_on_all_ranks():
            if run is not None and session.stop.signal is None:
                view = standard_view(components.views.settings, images.channels)
                export(components.encoder.backbone, exported, view.pretrained_cfg, background=background)
                run.finish(exported, [folder / CHECKPOINTS / folder_name(step)])
                console.say(f"finished: the backbone is in {exported}")
            elif run is not None:
                run.close()
        end(session, step)
    return folder


def train(components: Components, images: Images, order: Order, checkpoint: Checkpoint | None, session: Session) -> int:
    """Trains to the end of the budget or a signal; returns the number of steps."""
    settings, device = components.recipe.train, components.accelerator.device
    step, spent = (checkpoint.step, float(checkpoint.metadata["seconds"])) if checkpoint else (0, 0.0)
    steps = settings.steps(order.steps_per_epoch)
    budget = Budget(steps=steps, minutes=settings.minutes, spent=spent)
    recorder = Recorder(components, images, order, budget, session, checkpoint)
    rank, size = distributed.rank(), distributed.world_size()
    options = {"rank": rank, "size": size, "workers": settings.workers, "start": step, "device": device}
    loader = Loader(images, order, components.views, **options)
    progress = budget.progress(step)
    components.forward.train()
    with session.console.bar(), recorder.last_line():
        for batch, ids, epoch in loader:
            recorder.save_if_due(step, best=recorder.monitor(step, progress))
            if progress >= 1 or session.stop.agreed():
                break
            # The rate of the middle of the step: at its beginning the first rate of a warm-up is zero.
            set_rate(components.optimiser, cosine(budget.progress(step + 0.5), components.recipe.optim.warmup))
            result = train_step(components, batch, ids, epoch, step)
            step += 1
            progress = budget.progress(step)
            recorder.log(step, progress, result)
    recorder.save(step)
    session.saver.finish()
    return step


def train_step(
    components: Components,
    images: Pictures,
    ids: Int64[Tensor, " batch"],
    epoch: int,
    step: int,
) -> StepResult | SkippedStep:
    """Updates the weights, then the state of the objective and the twin.

    If the loss or a gradient is not finite on any rank, all ranks skip the step: weights, optimiser, objective, twin
    and the statistics of batch norms stay as they were. On a GPU that is decided there, and the host does not wait:
    whether the step was skipped is known by the result's `skipped`.

    Args:
        components: the training components.
        images: this rank's share of the batch.
        ids: the indices of the images.
        epoch: seeds the views, with the ids.
        step: the number of earlier updates; seeds the dropout.
    """
    encoder, twin, objective = components.encoder, components.twin, components.objective
    accelerator, optimiser, recipe = components.accelerator, components.optimiser, components.recipe
    # The objective has no buffers to restore: only its updates change it.
    modules, late = {"encoder": encoder, "objective": objective}, accelerator.device.type == "cuda"
    guard = Guard(accelerator, optimiser, modules, encoder, twin, late=late)
    result = gradient(components, images, ids, epoch, step)
    norm = guard.gradient_norm(result.loss.total)

    def skip() -> SkippedStep:
        finite = finite_views(components, images, ids, epoch), result.embeddings.isfinite().all(2).all(0)
        return guard.skip(step, epoch, ids, *finite, {"loss": result.loss.total, **result.loss.terms})

    if norm is None:
        return skip()
    if recipe.optim.clip is not None:
        clip_grads_with_norm_(encoder.parameters(), recipe.optim.clip, norm)
    guard.step()
    objective.update(result.embeddings, result.ids, result.targets, guard.taken)
    if twin is not None and recipe.objective.traits.twin_momentum is not None:
        with guard.undone(twin.state_dict().values()):
            twin.update(encoder, recipe.objective.traits.twin_momentum)
    return result._replace(skipped=guard.skipped(skip))


def gradient(
    components: Components,
    images: Pictures,
    ids: Int64[Tensor, " batch"],
    epoch: int,
    step: int,
) -> StepResult:
    """Accumulates the gradient of the whole batch; arguments as of `train_step`."""
    named, chunks = ids if components.names is None else components.names[ids], num_chunks(components, len(ids))
    if chunks > 1:
        loss, embeddings, targets = cached_gradient(components, images, ids, named, epoch, step, chunks)
    else:
        views = components.views(images, ids, epoch)
        embeddings, targets = embed(components, views, step)
        loss = components.objective(embeddings, named, targets, step)
        components.accelerator.backward(loss.total)
    # DDP has averaged the encoder's.
    average_gradients(components.objective, sharded={*components.objective.shards()})
    return StepResult(Loss(loss.total.detach(), loss.terms), embeddings.detach(), named, targets)


def warm_up(components: Components, images: Images, order: Order, *, resumed: bool = False) -> None:
    """Passes batches before the run and drops their gradients, where a run needs that; collective.

    With train.compile=true the encoder is compiled for the batches of an epoch. The last batch may be smaller, and the
    chunks of a batch unequal: each length is compiled here, and none in the run. A run that is resumed on several ranks
    passes a batch, since DDP orders its buckets anew after the first one, and with them the sums of three ranks.

    Raises:
        ValueError: if it cannot be compiled; earlier than in a run, whose folder would exist by then.
    """
    compiled = components.recipe.train.compile
    if not compiled and not (resumed and distributed.world_size() > 1):
        return
    buffers = KeptBuffers(components.encoder, components.twin)
    device, batches = (
        components.accelerator.device,
        [order.batch(step)[1] for step in ((0, order.steps_per_epoch - 1) if compiled else (0,))],
    )
    components.forward.train()
    try:
        for batch in {len(batch): batch for batch in batches}.values():
            ids = batch[distributed.share(len(batch))]
            given = pictures(images, ids, components.views).to(device)
            gradient(components, given, ids.to(device), 0, 0)
    except (RuntimeError, OSError, ImportError) as problem:
        # The compiler's errors are RuntimeErrors of a private module.
        kinds = [kind.__module__ for kind in type(problem).__mro__]
        if not compiled or (
            isinstance(problem, RuntimeError) and not any(kind.startswith("torch._dynamo") for kind in kinds)
        ):
            raise
        reason = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise ValueError(
            f"train.compile=true: the encoder cannot be compiled here ({reason.strip()}); it takes a C++ compiler (the "
            "Debian package g++), on a GPU Triton too, and a folder that may be written (TORCHINDUCTOR_CACHE_DIR); or "
            "leave train.compile out"
        ) from problem
    components.optimiser.zero_grad(set_to_none=True)
    buffers.restore()
