"""The loop: images → views → embeddings → objective → gradient → record. It does not know which method it runs."""

from functools import partial
from pathlib import Path

import torch

from contrastive import distributed
from contrastive.checkpoints import Checkpoint, optimiser_shards, save_checkpoint
from contrastive.clock import Clock, Record
from contrastive.config import dump_yaml
from contrastive.data import ClassOrder, Images, Loader, Order, Split, leave_out
from contrastive.encoder import export
from contrastive.evaluate.features import extract
from contrastive.evaluate.knn import monitor_knn
from contrastive.health import Watch, figures, glimpse, similarities
from contrastive.launch import Stop, start
from contrastive.machine import Machine, batches, build, cautions
from contrastive.optim import cosine, set_rate
from contrastive.progress import Teller, duration
from contrastive.recipe import Recipe
from contrastive.resume import check_lengths, resumable
from contrastive.run import CHECKPOINTS, CONFIG, DONE, Run, prepare
from contrastive.scale import in_words, scale
from contrastive.step import Taken, train_step
from contrastive.views import MEAN, STD, plain

MIN_MONITOR_IMAGES, MAX_MONITOR_IMAGES = 100, 5_000
MAX_SKIPPED_STEPS = 20
LINES_PER_HISTOGRAM = 10


def pretrain(recipe: Recipe, *, header: str = "") -> Path:
    """Runs a recipe and returns its run folder; on Ctrl-C, SIGTERM or SIGUSR1 it saves, then raises SystemExit.

    Raises:
        ValueError: for what is wrong with the recipe, the images or the launch, before anything is written.
    """
    accelerator = start(recipe.train.batch_size, recipe.train.precision, recipe.train.threads)
    teller = Teller(quiet=not accelerator.is_main_process)
    folder = _folder(recipe)
    prepare(folder, resume=recipe.resume)
    if (folder / DONE).exists():
        teller.say(f"{folder} is finished: nothing is left to do")
        return folder

    with teller.bar():
        split = recipe.data.build(workers=recipe.train.workers, report=teller.report)
    split = split._replace(train=leave_out(split.train, recipe.unseen))
    views = recipe.views.resolve(size=split.train.size, channels=split.train.channels)
    recipe = recipe.model_copy(update={"views": views})
    found = resumable(recipe, folder, split.train, accelerator.num_processes, teller) if recipe.resume else None
    begun_on = found.facts["processes"] if found else None
    order = batches(recipe, split.train, accelerator.num_processes, begun_on)
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
    watch = Watch(min(settings.batch_size, machine.encoder.dim))
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
            taken = train_step(
                machine, batch.to(device, non_blocking=True), ids.to(device, non_blocking=True), epoch, step
            )
            step += 1
            skipped = 0 if taken else skipped + 1
            if skipped >= MAX_SKIPPED_STEPS:
                raise ValueError(
                    f"the loss was not finite in {skipped} steps in a row, up to step {step:,}; the newest checkpoint "
                    "is sound: resume it, or start anew with a lower optim.rate or train.precision=fp32"
                )
            record.losses += [taken.loss] if taken else []
            progress = clock.progress(step)
            if record.losses and (step == 1 or step % settings.log_every == 0 or progress >= 1):
                values = record.take(step, machine.optimiser.param_groups[0]["lr"])
                values |= _look(taken, step, run, step % (LINES_PER_HISTOGRAM * settings.log_every) == 0 or step == 1)
                if run is not None:
                    run.log(step, values)
                for warning in watch.warnings(progress, values["epoch"], values):
                    teller.warn(warning)
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
    """Writes a checkpoint: the first process what is equal on all, every process the part that only it holds."""
    lengths = machine.objective.shards()
    parts = {"encoder": machine.encoder.state_dict(), "objective": machine.objective.state_dict()}
    if machine.twin is not None:
        parts["twin"] = machine.twin.state_dict()
    owned = machine.objective.named_parameters()
    sharded = [(parameter, lengths[name]) for name, parameter in owned if name in lengths]
    shards = {f"objective.{name}": length for name, length in lengths.items()}
    shards |= optimiser_shards(machine.optimiser, sharded)
    facts = {"seconds": seconds, "images": images.fingerprint, "processes": distributed.size()}
    facts["channels"] = images.channels
    checkpoint = Checkpoint(step, parts, machine.optimiser.state_dict(), facts, shards)
    keep = machine.recipe.train.keep
    if run is not None:
        run.save(checkpoint, keep=keep)
    else:
        save_checkpoint(_folder(machine.recipe) / CHECKPOINTS, checkpoint, keep=keep)


def _look(taken: Taken | None, step: int, run: Run | None, with_histograms: bool) -> dict[str, float]:
    """The figures of the embeddings' health, on the process that writes them; collective."""
    if taken is None:
        return {}
    seen = glimpse(taken.embeddings, taken.ids, taken.targets)
    if run is None:
        return {}
    if with_histograms:
        for name, values in similarities(seen).items():
            run.histogram(f"similarity/{name}", values, step)
    return figures(seen)


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
    check_lengths(found, machine.objective.shards())
    machine.encoder.load_state_dict(dict(found.parts["encoder"]))
    machine.objective.load_state_dict(dict(found.parts["objective"]))
    if machine.twin is not None:
        machine.twin.load_state_dict(dict(found.parts["twin"]))
    machine.optimiser.load_state_dict(found.optimiser)


def _folder(recipe: Recipe) -> Path:
    return Path(recipe.output or "runs/pretrain").expanduser()


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
    local, chunk = recipe.train.batch_size // processes, recipe.train.chunk
    each = f" ({local} on each)" if processes > 1 else ""
    each += f" in chunks of {chunk}" if chunk is not None and chunk < local else ""
    budget = f"{recipe.train.minutes:g} minutes" if recipe.train.minutes else f"{recipe.train.epochs:g} epochs"
    budget += f", {order.steps_per_epoch:,} steps an epoch"
    precision = accelerator.mixed_precision.replace("no", "fp32")
    teller.say(f"images     {len(train):,} of {recipe.data.name}, {train.channels} × {train.size} × {train.size}")
    teller.say(f"views      {recipe.views.num_views} per image, {recipe.views.size} px")
    teller.say(
        f"encoder    {recipe.encoder.name}: {machine.encoder.num_features:,} features, {parameters:,} parameters"
    )
    teller.say(f"objective  {recipe.objective.name}")
    sizes = {"views": recipe.views.num_views, "batch": recipe.train.batch_size, "dim": machine.encoder.dim}
    ids = len(train) if machine.names is None else int(machine.names.max()) + 1
    cost = in_words(scale(recipe.objective, images=ids, processes=processes, **sizes))
    teller.say(f"negatives  {'at most ' if recipe.ids == 'labels' else ''}{cost}")
    teller.say(
        f"training   {budget}, batch {recipe.train.batch_size}{each}, {recipe.optim.name}, {precision} on "
        f"{processes} × {accelerator.device.type} ({torch.get_num_threads()} threads)"
    )
    teller.say(f"run        {Path(recipe.output or '').resolve()}")
    for caution in cautions(machine):
        teller.warn(caution)
    if isinstance(order, ClassOrder) and order.left_out:
        teller.warn(
            f"{order.left_out:,} images have no class, or one of fewer than train.images_per_class={order.per_class} "
            "images, and are left out of training"
        )
