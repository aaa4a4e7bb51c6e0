"""The loop: images → views → embeddings → objective → gradient → record. It does not know which method it runs."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from contrastive import distributed
from contrastive.clock import Clock, Record
from contrastive.config import dump_yaml
from contrastive.data import Images, Loader, Order, Split
from contrastive.encoder import Encoder, MomentumTwin, export
from contrastive.evaluate.features import extract
from contrastive.evaluate.knn import monitor_knn
from contrastive.launch import Stop, start
from contrastive.objectives import Loss, ObjectiveModule
from contrastive.optim import cosine, set_rate
from contrastive.progress import Teller, duration
from contrastive.recipe import Recipe
from contrastive.resume import resumable
from contrastive.run import CONFIG, DONE, Checkpoint, Run, prepare
from contrastive.views import MEAN, STD, Views, plain

MIN_MONITOR_IMAGES, MAX_MONITOR_IMAGES = 100, 5_000
MAX_SKIPPED_STEPS = 20


class Machine(NamedTuple):
    """The parts that move during a run, on their device, alike on every process."""

    recipe: Recipe
    accelerator: Accelerator
    views: Views
    encoder: Encoder
    forward: nn.Module
    """The encoder as Accelerate wraps it: what a step calls."""
    twin: MomentumTwin | None
    objective: ObjectiveModule
    optimiser: Any


def pretrain(recipe: Recipe, *, header: str = "") -> Path:
    """Runs a recipe and returns its run folder; on Ctrl-C, SIGTERM or SIGUSR1 it saves, then raises SystemExit.

    Raises:
        ValueError: for what is wrong with the recipe, the images or the launch, before anything is written.
    """
    accelerator = start(recipe.train.batch_size, recipe.train.precision, recipe.train.threads)
    teller = Teller(quiet=not accelerator.is_main_process)
    folder = Path(recipe.output or "runs/pretrain").expanduser()
    prepare(folder, resume=recipe.resume)
    if (folder / DONE).exists():
        teller.say(f"{folder} is finished: nothing is left to do")
        return folder

    with teller.bar():
        split = recipe.data.build(workers=recipe.train.workers, report=teller.report)
    order = Order(len(split.train), recipe.train.batch_size, recipe.seed)
    views = recipe.views.resolve(size=split.train.size, channels=split.train.channels)
    recipe = recipe.model_copy(update={"views": views})
    found = resumable(recipe, folder, split.train, accelerator.num_processes, teller) if recipe.resume else None
    machine = build(recipe, accelerator, split.train)
    if found is not None:
        _restore(machine, found)
    # No process may look at the folder after the first one has begun to write to it.
    distributed.barrier()
    run = _open(machine, folder, split, found, header, teller) if accelerator.is_main_process else None
    _describe(machine, split, order, teller)

    try:
        with Stop() as stop:
            step = train(machine, split.train, order, run, teller, found, stop)
    except BaseException:
        if run is not None:
            run.close()
        raise
    if run is not None and stop.signal is None:
        place, size = folder / "backbone", machine.views.window.size
        export(machine.encoder.backbone, place, channels=split.train.channels, size=size, mean=MEAN, std=STD)
        run.finish()
        teller.say(f"finished: the backbone is in {place}")
    elif run is not None:
        run.close()
        teller.say(f"stopped at step {step:,}, saved; the same words with resume=true go on from there")
    distributed.barrier()
    accelerator.end_training()
    if stop.signal is not None:
        raise SystemExit(128 + stop.signal)
    return folder


def build(recipe: Recipe, accelerator: Accelerator, images: Images) -> Machine:
    """All parts of a run for a set of images."""
    torch.manual_seed(recipe.seed)
    views = recipe.views.build(size=images.size, channels=images.channels, seed=recipe.seed)
    encoder = recipe.encoder.build(channels=images.channels, size=views.window.size)
    # A split batch norm is split on purpose: synchronising it would undo that.
    synchronised = accelerator.num_processes > 1 and recipe.encoder.batch_norm_splits == 1
    if synchronised and accelerator.device.type == "cuda":
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    encoder = encoder.to(accelerator.device)
    if recipe.train.channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)
    objective = recipe.objective.build(dim=encoder.dim, num_images=len(images), seed=recipe.seed)
    twin = MomentumTwin(encoder) if recipe.objective.twin_momentum is not None else None
    optimiser = recipe.optim.build(encoder, batch_size=recipe.train.batch_size)
    forward, optimiser = accelerator.prepare(torch.compile(encoder) if recipe.train.compile else encoder, optimiser)
    device = accelerator.device
    return Machine(recipe, accelerator, views.to(device), encoder, forward, twin, objective.to(device), optimiser)


def train_step(machine: Machine, images: Tensor, ids: Tensor, epoch: int, step: int) -> Loss | None:
    """One update: images → views → embeddings → loss → gradient → weights → memory; None if it had to be skipped.

    Args:
        machine: the parts.
        images: uint8 [batch, channels, height, width], this process's share.
        ids: int64 [batch], what the images are called.
        epoch: the pass over the images; with the ids it determines the views.
        step: the number of updates before this one; it determines the noise.
    """
    recipe, accelerator, twin, objective = machine.recipe, machine.accelerator, machine.twin, machine.objective
    views = machine.views(images, ids, epoch)
    embeddings = machine.forward(views).float()
    targets = None
    if twin is not None:
        with torch.no_grad(), accelerator.autocast():
            targets = twin(views).float()
    loss: Loss = objective(embeddings, ids, targets, step)
    accelerator.backward(loss.total)
    # All processes agree, and nothing has moved yet: one that skipped alone would leave the others' path.
    skip = distributed.any_rank(not math.isfinite(loss.total.item()))
    if not skip:
        if recipe.optim.clip is not None:
            accelerator.clip_grad_norm_(machine.encoder.parameters(), recipe.optim.clip)
        machine.optimiser.step()
        skip = accelerator.optimizer_step_was_skipped
    machine.optimiser.zero_grad(set_to_none=True)
    if skip:
        return None
    objective.update(embeddings.detach(), ids, targets)
    if twin is not None and recipe.objective.twin_momentum is not None:
        twin.update(machine.encoder, recipe.objective.twin_momentum)
    return Loss(loss.total.detach(), loss.terms)


def train(
    machine: Machine,
    images: Images,
    order: Order,
    run: Run | None,
    teller: Teller,
    found: Checkpoint | None,
    stop: Stop,
) -> int:
    """Steps from where the checkpoint ends to the end of the budget or to a signal; returns the steps taken in all."""
    recipe, device = machine.recipe, machine.accelerator.device
    settings, step = recipe.train, found.step if found else 0
    clock = Clock(recipe, order, float(found.facts["seconds"]) if found else 0.0)
    saved = clock.seconds()
    measured = int(clock.progress(step) * settings.monitor)
    record, skipped = Record(clock, step), 0
    monitored = images.labels is not None and int((images.labels >= 0).sum()) >= MIN_MONITOR_IMAGES
    loader = Loader(
        images, order, rank=distributed.rank(), size=distributed.size(), workers=settings.workers, start=step
    )
    machine.forward.train()
    with teller.bar():
        for batch, ids, epoch in loader:
            if clock.progress(step) >= 1 or stop.agreed():
                break
            # The middle of the step: at its beginning a warm-up's first rate is zero, and the step would be wasted.
            set_rate(machine.optimiser, cosine(clock.progress(step + 0.5), recipe.optim.warmup))
            # Dropout and drop path draw from the global generator: keyed here, a resumed step draws alike.
            torch.manual_seed((recipe.seed << 32) + step * distributed.size() + distributed.rank())
            loss = train_step(
                machine, batch.to(device, non_blocking=True), ids.to(device, non_blocking=True), epoch, step
            )
            step += 1
            skipped = 0 if loss else skipped + 1
            if skipped >= MAX_SKIPPED_STEPS:
                raise ValueError(
                    f"the loss was not finite in {skipped} steps in a row, up to step {step:,}; the newest checkpoint "
                    "is sound: resume it, or start anew with a lower optim.rate or train.precision=fp32"
                )
            record.losses += [loss] if loss else []
            progress = clock.progress(step)
            if record.losses and (step == 1 or step % settings.log_every == 0 or progress >= 1):
                values = record.take(step, machine.optimiser.param_groups[0]["lr"])
                if run is not None:
                    run.log(step, values)
                left = duration(clock.seconds() * (1 - progress) / progress) if progress else "?"
                pace = f"{values['images_per_second']:,.0f} images/s"
                teller.update("pretraining", progress, f"step {step:,}  loss {values['loss']:.3f}  {pace}  {left} left")
            if monitored and int(progress * settings.monitor) > measured:
                measured = int(progress * settings.monitor)
                with clock.paused():
                    accuracy = _monitor(machine, images)
                if run is not None:
                    run.log(step, {"knn": accuracy})
                teller.say(
                    f"{100 * progress:3.0f}%  kNN on held-out labels of the training images {100 * accuracy:.1f} %"
                )
            if clock.seconds() - saved > 60 * settings.save_minutes:
                with clock.paused():
                    save(machine, images, run, step, clock.seconds())
                saved = clock.seconds()
    save(machine, images, run, step, clock.seconds())
    return step


def save(machine: Machine, images: Images, run: Run | None, step: int, seconds: float) -> None:
    """Writes a checkpoint on the first process, while the others wait."""
    if run is not None:
        parts: dict[str, Mapping[str, Tensor]] = {"encoder": machine.encoder.state_dict()}
        parts["objective"] = machine.objective.state_dict()
        if machine.twin is not None:
            parts["twin"] = machine.twin.state_dict()
        facts = {"seconds": seconds, "images": images.fingerprint, "processes": distributed.size()}
        facts["channels"] = images.channels
        run.save(Checkpoint(step, parts, machine.optimiser.state_dict(), facts), keep=machine.recipe.train.keep)
    distributed.barrier()


def _monitor(machine: Machine, images: Images) -> float:
    assert images.labels is not None
    labelled = (images.labels >= 0).nonzero().flatten()
    generator = torch.Generator().manual_seed(machine.recipe.seed)
    chosen = labelled[torch.randperm(len(labelled), generator=generator)[:MAX_MONITOR_IMAGES]].sort().values
    device, size = machine.accelerator.device, machine.recipe.views.size
    assert size is not None
    features = extract(machine.encoder.backbone, images, prepare=partial(plain, size=size), device=device, ids=chosen)
    return monitor_knn(features, images.labels[chosen], seed=machine.recipe.seed)


def _restore(machine: Machine, found: Checkpoint) -> None:
    machine.encoder.load_state_dict(dict(found.parts["encoder"]))
    machine.objective.load_state_dict(dict(found.parts["objective"]))
    if machine.twin is not None:
        machine.twin.load_state_dict(dict(found.parts["twin"]))
    machine.optimiser.load_state_dict(found.optimiser)


def _open(machine: Machine, folder: Path, split: Split, found: Checkpoint | None, header: str, teller: Teller) -> Run:
    """The folder with its configuration, the list of what could not be read, and the picture of the views."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).exists():
        (folder / CONFIG).write_text(header + dump_yaml(machine.recipe))
    if split.unreadable:
        listing = folder / "unreadable.txt"
        listing.write_text("".join(f"{name}\t{reason}\n" for name, reason in split.unreadable))
        teller.warn(f"{len(split.unreadable)} files could not be read and were left out: {listing}")
    run = Run(folder, step=found.step if found else 0)
    if found is not None:
        teller.say(f"resumed at step {found.step:,}")
        return run
    run.text("config", dump_yaml(machine.recipe))
    shown = min(machine.recipe.train.preview, len(split.train))
    if shown:
        ids = torch.linspace(0, len(split.train) - 1, shown).long()
        device = machine.accelerator.device
        run.picture("views", machine.views.preview(split.train.read(ids).to(device), ids.to(device)))
    return run


def _describe(machine: Machine, split: Split, order: Order, teller: Teller) -> None:
    """Says what will run, so that a mistake is seen before hours have gone by."""
    recipe, accelerator, train = machine.recipe, machine.accelerator, split.train
    processes, parameters = distributed.size(), sum(p.numel() for p in machine.encoder.parameters())
    each = f" ({recipe.train.batch_size // processes} on each)" if processes > 1 else ""
    budget = f"{recipe.train.minutes:g} minutes" if recipe.train.minutes else f"{recipe.train.epochs:g} epochs"
    budget += f", {order.steps_per_epoch:,} steps an epoch"
    precision = accelerator.mixed_precision.replace("no", "fp32")
    teller.say(f"images     {len(train):,} of {recipe.data.name}, {train.channels} × {train.size} × {train.size}")
    teller.say(f"views      {recipe.views.num_views} per image, {recipe.views.size} px")
    teller.say(
        f"encoder    {recipe.encoder.name}: {machine.encoder.num_features:,} features, {parameters:,} parameters"
    )
    teller.say(f"objective  {recipe.objective.name}")
    teller.say(
        f"training   {budget}, batch {recipe.train.batch_size}{each}, {recipe.optim.name}, {precision} on "
        f"{processes} × {accelerator.device.type} ({torch.get_num_threads()} threads)"
    )
    teller.say(f"run        {Path(recipe.output or '').resolve()}")
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in machine.encoder.modules())
    if machine.twin is not None and normed and processes == 1 and recipe.encoder.batch_norm_splits == 1:
        teller.warn(
            "the encoder and its twin normalise the same batch, through which the loss can be lowered without "
            "learning anything (He et al. 2020, section 3.3); encoder.batch_norm_splits=2 hides it"
        )
