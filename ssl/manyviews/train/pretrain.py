"""The loop: images → views → embeddings → objective → gradient → record. It does not know which method it runs."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import distribute_bn
from torch import Tensor

from manyviews.config import dump_yaml
from manyviews.data import Images, Loader, Order, background_of, listed, newly_unreadable, write_inventory
from manyviews.encoder.timm_format import export
from manyviews.evaluators.knn import monitor_knn
from manyviews.features.encoding import Stopped, extract
from manyviews.optim import cosine, set_rate
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import Checkpoint, Saver, check_finite, folder_name, optimiser_shards, sync
from manyviews.run.folder import (
    CHECKPOINTS,
    CONFIG,
    DONE,
    INVENTORY,
    UNREADABLE,
    VIEWS,
    Run,
    check_content,
    prepare,
    read_unreadable,
)
from manyviews.run.health import Watch, figures, glimpse, similarities
from manyviews.system import distributed
from manyviews.system.console import Console, duration
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.files import shown
from manyviews.system.folder_lock import folder_lock
from manyviews.system.launch import Stop, in_a_line, lost_process, start
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, remove, write_atomic
from manyviews.train.budget import Clock, MetricAverager
from manyviews.train.components import Components
from manyviews.train.not_finite import Skipped, tell
from manyviews.train.setup import Setup, describe, finished, folder_of, make_setup, note
from manyviews.train.step import StepResult, compile_encoder, train_step
from manyviews.views import MEAN, STD, plain

MIN_MONITOR_IMAGES, MAX_MONITOR_IMAGES = 100, 5_000
FEWEST_OF_A_CLASS = 5
"""Images of a class from which a tenth, rounded, is one that can be held out."""
LINES_PER_HISTOGRAM = 10


def pretrain(recipe: Recipe, *, header: str = "") -> Path:
    """Runs a recipe and returns its run folder; on Ctrl-C, SIGTERM or SIGUSR1 it saves, then raises SystemExit.

    Raises:
        ValueError: for what is wrong with the recipe, the images or the launch, before anything is written.
    """
    accelerator = start(recipe.train.batch_size, recipe.train.precision, recipe.train.threads)
    console = Console(quiet=not accelerator.is_main_process)
    folder = folder_of(recipe)
    prepare(folder, resume=recipe.resume)
    if not finished(recipe, folder, console):
        with folder_lock(folder, partial(check_content, folder, resume=recipe.resume), console.warn) as lock_again:
            _run(recipe, accelerator, folder, console, header, lock_again)
    return folder


def _run(
    recipe: Recipe,
    accelerator: Accelerator,
    folder: Path,
    console: Console,
    header: str,
    lock_again: Callable[[], None],
) -> None:
    """A run from what is read before the first step to `done`, in a folder that no other program writes to."""
    ready = make_setup(recipe, accelerator, folder, console)
    split, order, components, found = ready[:4]
    compile_encoder(components, split.train, order, found.step if found else 0)
    # No process may look at the folder after the first one has begun to write to it.
    distributed.barrier()
    run = None
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            run = open_run(ready, folder, console, header, lock_again)
    describe(ready, console)
    saver = Saver(folder / CHECKPOINTS, keep=recipe.train.keep, keep_best=recipe.train.keep_best)

    try:
        with Stop() as stop:
            step = train(components, split.train, order, run, saver, console, found, stop)
    except BaseException as problem:
        # What ends the run at once, such as a second Ctrl-C, does not wait for the disk.
        if isinstance(problem, Exception):
            saver.abandon()
        if run is not None:
            run.close()
        raise
    place, size = folder / "backbone", components.views.window.size
    with raise_on_all_ranks():
        if run is not None and stop.signal is None:
            export(
                components.encoder.backbone,
                place,
                channels=split.train.channels,
                size=size,
                mean=MEAN,
                std=STD,
                background=background_of(recipe.data),
            )
            run.finish(place, [folder / CHECKPOINTS / folder_name(step)])
            console.say(f"finished: the backbone is in {place}")
        elif run is not None:
            run.close()
            console.say(f"stopped at step {step:,}, saved; the same words with resume=true go on from there")
    accelerator.end_training()
    if stop.signal is not None:
        raise SystemExit(128 + stop.signal)


def train(
    components: Components,
    images: Images,
    order: Order,
    run: Run | None,
    saver: Saver,
    console: Console,
    found: Checkpoint | None,
    stop: Stop,
) -> int:
    """Steps from where the checkpoint ends to the end of the budget or to a signal; returns the steps taken in all."""
    recipe, device = components.recipe, components.accelerator.device
    settings, step, in_a_row = recipe.train, found.step if found else 0, 0
    metadata = found.metadata if found else {}
    score, begun = metadata.get("score"), step
    clock = Clock(recipe, order, float(metadata.get("seconds", 0.0)))
    record, saved, progress = MetricAverager(clock, step, metadata), clock.seconds(), clock.progress(step)
    measured = max(int(progress * settings.monitor) - record.cut_off, 0)
    watch = Watch(min(settings.batch_size, components.encoder.dim))
    now = recipe.model_dump(mode="json")
    monitored = _monitored(images.labels, recipe, console)
    loader = Loader(
        images, order, rank=distributed.rank(), size=distributed.world_size(), workers=settings.workers, start=step
    )
    components.forward.train()
    with console.bar():
        for batch, ids, epoch in loader:
            due, best = int(progress * settings.monitor), False
            if monitored is not None and due > measured:
                with clock.paused():
                    accuracy = _monitor(components, images, monitored, stop, console)
                    best = accuracy is not None and saver.improves(accuracy, step)
                    score = accuracy if best else score
                record.cut_off = accuracy is None
                measured = measured if accuracy is None else due
                if accuracy is not None and not math.isnan(accuracy):
                    if run is not None:
                        run.log(step, {"knn": accuracy})
                    console.say(
                        f"{100 * progress:3.0f}%  kNN on held-out labels of the training images {100 * accuracy:.1f} %"
                    )
            for news in saver.poll():
                console.warn(news)
            # After the first step: before it, an optimiser keeps nothing yet.
            if step == begun + 1 and (lacking := saver.room_warning(state_of(components, images, step, {}))):
                console.warn(lacking)
            late = not saver.under_way and clock.seconds() - saved > 60 * settings.save_minutes
            # An extended run is saved at once: from here on its checkpoints say what it goes on with.
            extended = step == begun and "recipe" in metadata and _budget(metadata["recipe"]) != _budget(now)
            if late or best or extended:
                with clock.paused():
                    save(saver, components, images, run, step, record.metadata() | {"score": score})
                saved = clock.seconds()
            if progress >= 1 or stop.agreed():
                break
            # The middle of the step: at its beginning a warm-up's first rate is zero, and the step would be wasted.
            set_rate(components.optimiser, cosine(clock.progress(step + 0.5), recipe.optim.warmup))
            taken = train_step(
                components, batch.to(device, non_blocking=True), ids.to(device, non_blocking=True), epoch, step
            )
            step, score = step + 1, None
            progress = clock.progress(step)
            if isinstance(taken, Skipped):
                in_a_row, record.skipped = in_a_row + 1, record.skipped + 1
                place, names = folder_of(recipe), images.names
                tell(taken, in_a_row=in_a_row, in_all=record.skipped, folder=place, names=names, warn=console.warn)
            else:
                in_a_row = 0
                record.add(taken.loss)
            if len(record) and (step == 1 or step % settings.log_every == 0 or progress >= 1):
                values = record.take(step, components.optimiser.param_groups[0]["lr"])
                shown = step % (LINES_PER_HISTOGRAM * settings.log_every) == 0 or step == 1
                values |= _look(taken, step, run, shown, console)
                if run is not None:
                    run.log(step, values)
                for warning in watch.warnings(progress, values["epoch"], values):
                    console.warn(warning)
                left = duration(clock.seconds() * (1 - progress) / progress) if progress else "?"
                pace = f"{values['images_per_second']:,.0f} images/s"
                console.update(
                    "pretraining", progress, f"step {step:,}  loss {values['loss']:.3f}  {pace}  {left} left"
                )
    save(saver, components, images, run, step, record.metadata() | {"score": score})
    for news in saver.finish():
        console.warn(news)
    return step


def save(
    saver: Saver, components: Components, images: Images, run: Run | None, step: int, known: Mapping[str, Any]
) -> None:
    """Begins to write a checkpoint, which is done beside the next steps; refuses weights that are not finite."""
    checkpoint = state_of(components, images, step, known)
    weights = {f"objective.{name}": parameter.detach() for name, parameter in components.objective.named_parameters()}
    for part in checkpoint.parts.keys() - {"objective"}:  # of its buffers, one that is not known yet may be NaN
        weights |= {f"{part}.{key}": value for key, value in checkpoint.parts[part].items()}
    check_finite(weights, step, saver.place)
    found = newly_unreadable(images)
    if found and run is not None:
        run.unreadable(listed(found))
    saver.begin(checkpoint, before=run.sync if run is not None else None)


def state_of(components: Components, images: Images, step: int, known: Mapping[str, Any]) -> Checkpoint:
    """All that a run needs to go on, with the metadata that are known of it; nothing is copied."""
    lengths = components.objective.shards()
    parts = {"encoder": components.encoder.state_dict(), "objective": components.objective.state_dict()}
    if components.twin is not None:
        parts["twin"] = components.twin.state_dict()
    owned = components.objective.named_parameters()
    sharded = [(parameter, lengths[name]) for name, parameter in owned if name in lengths]
    shards = {f"objective.{name}": length for name, length in lengths.items()}
    shards |= optimiser_shards(components.optimiser, sharded)
    metadata = {**known, "images": images.fingerprint, "channels": images.channels, "held_out": components.held_out}
    metadata["recipe"] = components.recipe.model_dump(mode="json")
    if components.accelerator.scaler is not None:
        metadata["scaler"] = components.accelerator.scaler.state_dict()
    return Checkpoint(step, parts, components.optimiser.state_dict(), metadata, shards)


def _look(
    taken: StepResult | Skipped, step: int, run: Run | None, with_histograms: bool, console: Console
) -> dict[str, float]:
    """The figures of the embeddings' health, on the process that writes them, as far as they can be had; collective."""
    if isinstance(taken, Skipped):
        return {}
    seen = glimpse(taken.embeddings, taken.ids, taken.targets)
    if run is None:
        return {}
    try:
        if with_histograms:
            for name, values in similarities(seen).items():
                run.histogram(f"similarity/{name}", values, step)
        return figures(seen)
    except Exception as problem:
        console.warn(f"step {step:,}: the embeddings could not be looked at, training goes on: {in_a_line(problem)}")
        return {}


def _monitored(labels: Tensor | None, recipe: Recipe, console: Console) -> Tensor | None:
    """The ids of the images that kNN monitoring looks at; None where it cannot, or is not wanted."""
    if labels is None or not recipe.train.monitor:
        return None
    labelled = (labels >= 0).nonzero().flatten()
    if len(labelled) < MIN_MONITOR_IMAGES:
        return None
    generator = torch.Generator().manual_seed(recipe.seed)
    chosen = labelled[torch.randperm(len(labelled), generator=generator)[:MAX_MONITOR_IMAGES]].sort().values
    most = int(labels[chosen].bincount().max())
    if most < FEWEST_OF_A_CLASS:
        console.warn(
            f"kNN monitoring is left out: it holds out a tenth of each class, which takes {FEWEST_OF_A_CLASS} labelled "
            f"images of one, and among {len(chosen):,} no class has more than {most}; training goes on without it"
        )
        return None
    return chosen


def _monitor(components: Components, images: Images, chosen: Tensor, stop: Stop, console: Console) -> float | None:
    """The kNN accuracy on held-out labels of the training images; None where a signal cut it off; collective.

    NaN where it could not be measured, on all processes, which is a warning: a measurement never ends the training.
    """
    assert images.labels is not None
    device, size = components.accelerator.device, components.recipe.views.size
    assert size is not None
    prepare, backbone = partial(plain, size=size), components.encoder.backbone
    if distributed.world_size() > 1:
        # Each process has statistics of its own, and those of the first one are saved and exported.
        distribute_bn(backbone, distributed.world_size(), reduce=False)
    try:
        features = extract(backbone, images, prepare=prepare, device=device, ids=chosen, stopped=stop.agreed)
        with raise_on_all_ranks():
            return monitor_knn(features, images.labels[chosen], seed=components.recipe.seed)
    except Stopped:
        return None
    except Exception as problem:
        if lost_process(problem):
            raise
        console.warn(f"kNN could not be measured now, training goes on: {in_a_line(problem)}")
        return math.nan


def _budget(recipe: Mapping[str, Any]) -> list[Any]:
    return [recipe["train"].get(key) for key in ("epochs", "minutes")]


def open_run(
    ready: Setup, folder: Path, console: Console, header: str = "", lock_again: Callable[[], None] = lambda: None
) -> Run:
    """The folder with its configuration, the list of what could not be read, and the picture of the views."""
    split, _, components, found = ready[:4]
    make_folder(folder, folder)
    if (folder / DONE).exists():
        # A finished run that is extended: from here on it is not finished, whenever a cut comes.
        remove(folder / DONE)
        sync(folder)
    if (folder / CONFIG).exists():
        note(components.recipe, folder, found, console)
    else:
        write_atomic(folder / CONFIG, [(header + dump_yaml(components.recipe)).encode()])
    if split.inventory is not None and not (folder / INVENTORY).exists():
        write_inventory(folder / INVENTORY, split.inventory)
    if found is None:
        remove(folder / UNREADABLE)
    known = {name for name, _ in read_unreadable(folder)}
    if new := [(name, reason) for name, reason in split.unreadable if shown(name) not in known]:
        console.warn(f"{plural(len(new), 'file')} left out, for they could not be read: {folder / UNREADABLE}")
    run = Run(folder, step=found.step if found else 0, warn=console.warn, lock_again=lock_again)
    if new:
        run.unreadable(listed(new))
    if found is not None:
        console.say(f"resumed at step {found.step:,}")
        return run
    run.text("config", dump_yaml(components.recipe))
    count = min(components.recipe.train.preview, len(split.train))
    if count:
        ids = torch.linspace(0, len(split.train) - 1, count).long()
        device = components.accelerator.device
        try:
            run.picture(VIEWS, components.views.preview(split.train.read(ids).to(device), ids.to(device)))
        except Exception as problem:
            console.warn(f"there is no picture of the views: {in_a_line(problem)}")
    return run
