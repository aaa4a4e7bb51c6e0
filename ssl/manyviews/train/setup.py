"""What stands before the first step: images, batches, the parts, and the checkpoint that is gone on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from manyviews.config import dump_yaml, load
from manyviews.data import ClassOrder, Folder, Order, Split, leave_out
from manyviews.data.decoding.files import listed
from manyviews.data.images import Inventory
from manyviews.data.listing.inventory import changes, copy_warnings, read_inventory, write_inventory
from manyviews.data.sampler import Composition
from manyviews.features.limits import check_steps
from manyviews.objectives.cost import Sizes
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import Checkpoint, newest_checkpoint, restore_optimiser, sync
from manyviews.run.folder import CHECKPOINTS, CONFIG, DONE, INVENTORY, UNREADABLE, VIEWS, Run, read_unreadable
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.files import shown
from manyviews.system.folder_lock import folder_lock
from manyviews.system.launch import in_a_line
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, remove, write_atomic
from manyviews.train import resume
from manyviews.train.components import Components, batches, build, cautions, check_classes, negatives_of


class Setup(NamedTuple):
    """All that a run needs to take its next step."""

    split: Split
    order: Order
    components: Components
    found: Checkpoint | None
    """What it goes on from, in the machine already."""
    extended: str | None = None
    """What to say of a schedule that is not the one it was begun with."""
    contrasts: Composition | None = None
    """What the batches hold where classes are the ids."""


def read_images(recipe: Recipe, folder: Path, console: Console) -> Split:
    """The images of a recipe, without the classes that are left out; those of a run that goes on under their old ids.

    Some of these may be lost, as far as the run has seen it or `data.max_bad` allows: their ids stay.

    Raises:
        ValueError: for what is wrong with the images; naming files that were added to those of the run, or replaced.
    """
    options: dict[str, Any] = {"workers": recipe.train.workers, "report": console.report}
    with console.bar():
        split = recipe.data.build(**options)
        if recipe.resume and isinstance(recipe.data, Folder) and split.inventory is not None:
            began = _began_with(folder, split, split.inventory, console)
            split = recipe.data.build(**options, began=began) if began else split
    return split._replace(train=leave_out(split.train, recipe.unseen))


def _began_with(folder: Path, split: Split, now: Inventory, console: Console) -> dict[str, str] | None:
    """The files that a run began with, if some of them are lost since; None if none is, or it is not known."""
    found, _ = newest_checkpoint(folder / CHECKPOINTS, only=())
    with raise_on_all_ranks():
        file, seen = folder / INVENTORY, {name for name, _ in read_unreadable(folder)}
        if found is None or not file.is_file() or found.metadata.get("images") == split.train.fingerprint:
            return None
        before = read_inventory(file)
        changed = changes(before, now)
        refused = changed._replace(removed=[], replaced=[name for name in changed.replaced if shown(name) not in seen])
        if any(refused):
            raise ValueError(f"the images are not those that the run was begun with: {refused}; {resume.OTHER_IMAGES}")
    if not any(changed):
        return None
    console.warn(f"of the images that the run was begun with, {changed}: they are passed over, and all keep their ids")
    return before


def make_setup(recipe: Recipe, accelerator: Accelerator, folder: Path, console: Console) -> Setup:
    """Reads the images, builds the parts and, with `resume`, restores the newest checkpoint in the folder; collective.

    Raises:
        ValueError: for what is wrong with the recipe, the images or the checkpoint; nothing is written.
    """
    split = read_images(recipe, folder, console)
    views = recipe.views.resolve(size=split.train.size, channels=split.train.channels)
    recipe = recipe.model_copy(update={"views": views})
    found = resume.resumable(recipe, folder, split.train, accelerator.num_processes, console) if recipe.resume else None
    begun_on = found.metadata["processes"] if found else None
    order = batches(recipe, split.train, accelerator.num_processes, begun_on)
    check_steps(recipe.train, order.steps_per_epoch)
    contrasts = check_classes(recipe, split.train, order)
    extended = resume.check_schedule(found, recipe, order.steps_per_epoch) if found else None
    components = build(recipe, accelerator, split.train)
    if split.test is not None:
        components = components._replace(held_out=split.test.fingerprint)
    if found is not None:
        if found.metadata.get("held_out", components.held_out) != components.held_out:
            console.warn("the held-out images are not those that the run was begun with: scores are not comparable")
        restore(components, found)
    return Setup(split, order, components, found, extended, contrasts)


def describe(setup: Setup, folder: Path, console: Console) -> None:
    """Says what will run, so that a mistake is seen before hours have gone by."""
    split, order, components, contrasts = setup.split, setup.order, setup.components, setup.contrasts
    recipe, accelerator, train = components.recipe, components.accelerator, split.train
    processes, parameters = distributed.world_size(), sum(p.numel() for p in components.encoder.parameters())
    local, chunk = recipe.train.batch_size // processes, recipe.train.chunk
    each = f" ({local} on each)" if processes > 1 else ""
    each += f" in chunks of {chunk}" if chunk is not None and chunk < local else ""
    budget = plural(recipe.train.minutes, "minute") if recipe.train.minutes else plural(recipe.train.epochs, "epoch")
    budget += f", {plural(order.steps_per_epoch, 'step')} an epoch"
    precision = accelerator.mixed_precision.replace("no", "fp32")
    console.say(f"images     {len(train):,} of {recipe.data.name}, {train.channels} × {train.size} × {train.size}")
    if split.layout:
        console.say(f"layout     {split.layout}")
    if recipe.unseen and train.labels is not None:
        learned = set(train.labels.tolist())
        left_out = [name for number, name in enumerate(train.classes) if number not in learned]
        console.say(f"unseen     {shown(', '.join(left_out))}: left out of training")
    console.say(f"views      {recipe.views.num_views} per image, {recipe.views.size} px")
    console.say(
        f"encoder    {recipe.encoder.name}: {components.encoder.num_features:,} features, {parameters:,} parameters"
    )
    silent = "" if recipe.objective.bounds_information else "; it bounds no information, so the metrics hold none"
    console.say(f"objective  {recipe.objective.name}{silent}")
    ids = len(train) if components.names is None else int(components.names.max()) + 1
    sizes = Sizes(ids, recipe.views.num_views, recipe.train.batch_size, components.encoder.dim, processes)
    cost = recipe.objective.cost(sizes)
    cost = cost._replace(negatives=negatives_of(recipe, split.train, contrasts, cost.negatives))
    console.say(f"negatives  {cost}{' on average' if contrasts is not None else ''}")
    console.say(
        f"training   {budget}, batch {recipe.train.batch_size}{each}, {recipe.optim.name}, {precision} on "
        f"{processes} × {accelerator.device.type} ({plural(torch.get_num_threads(), 'thread')})"
    )
    if setup.extended:
        console.say(setup.extended)
    console.say(f"run        {folder.resolve()}")
    for caution in (*cautions(components), *(copy_warnings(split) if distributed.rank() == 0 else ())):
        console.warn(caution)
    if contrasts is not None and contrasts.without_negatives:
        console.warn(
            f"in {contrasts.without_negatives:,} of {plural(contrasts.batches, 'batch', 'batches')} all images are of "
            "one class, and have no negatives; train.images_per_class=… fills each batch with several classes"
        )
    if isinstance(order, ClassOrder) and order.left_out:
        console.warn(
            f"{order.left_out:,} images have no class, or one of fewer than train.images_per_class={order.per_class} "
            "images, and are left out of training"
        )


def restore(components: Components, found: Checkpoint) -> None:
    """Gives the components the state of a checkpoint.

    Raises:
        ValueError: if it is of other parts.
    """
    resume.check_lengths(found, components.objective.shards())
    try:
        components.encoder.load_state_dict(dict(found.parts["encoder"]))
        components.objective.load_state_dict(dict(found.parts["objective"]))
        if components.twin is not None:
            components.twin.load_state_dict(dict(found.parts["twin"]))
        restore_optimiser(components.optimiser, found.optimiser)
        if components.accelerator.scaler is not None:
            components.accelerator.scaler.load_state_dict(found.metadata["scaler"])
    except (KeyError, RuntimeError) as problem:
        raise ValueError(
            f"the checkpoint of step {found.step:,} is of other parts than the recipe's: {problem}"
        ) from None


def folder_of(recipe: Recipe) -> Path:
    """The run folder."""
    return Path(recipe.output or "runs/pretrain").expanduser()


def finished(recipe: Recipe, folder: Path, console: Console, *, record: bool = True) -> bool:
    """Whether a run is finished and nothing is left to do, which is said then; collective.

    Args:
        recipe: what it is asked to go on with.
        folder: the run folder.
        console: says it.
        record: whether settings that are free to change, such as the path of the same images, are written down.

    Raises:
        ValueError: if it was finished with other settings or other images, naming the difference; with a new schedule
            only where it is not to be extended.
    """
    done = (folder / DONE).exists() and (folder / CONFIG).exists()
    if not distributed.from_first_rank(float(done)):
        return False
    before, now = load(Recipe, folder / CONFIG).model_dump(mode="json"), recipe.model_dump(mode="json")
    # What the views leave open follows from the images.
    now["views"] = {key: before["views"].get(key) if value is None else value for key, value in now["views"].items()}
    resume.check_settings(before, now, resume.FREE | resume.SCHEDULE | resume.moved(before, now))
    changed = resume.differences(before, now, resume.OF_A_START)
    if resume.SCHEDULE & changed.keys():
        if not recipe.extend:
            resume.check_settings(before, now, resume.FREE | resume.LOCATIONS, resume.EXTEND)
        return False
    # Of a finished run only the metadata are looked at.
    found, _ = newest_checkpoint(folder / CHECKPOINTS, only=())
    if found is not None:
        try:
            split = read_images(recipe, folder, console)
        except (ValueError, OSError) as problem:
            if resume.LOCATIONS & changed.keys():
                raise
            console.warn(f"the images cannot be compared with those of the run: {problem}")
        else:
            resume.check_images(found, split.train)
    if changed and record:
        with folder_lock(folder, lambda: None, console.warn):
            note(recipe.model_copy(update={"views": load(Recipe, folder / CONFIG).views}), folder, found, console)
    console.say(f"{folder} is finished: nothing is left to do")
    return True


def note(recipe: Recipe, folder: Path, found: Checkpoint | None, console: Console) -> None:
    """Writes down with which settings a run goes on, on the first process, and says what has changed."""
    if distributed.rank() == 0 and (changed := resume.record_settings(folder, recipe, found.step if found else 0)):
        console.say(f"changed    {changed}; {folder / CONFIG} says so")


def open_run(
    setup: Setup, folder: Path, console: Console, header: str = "", lock_again: Callable[[], None] = lambda: None
) -> Run:
    """Opens the folder: writes its configuration, the list of what could not be read, and the picture of the views."""
    split, components, found = setup.split, setup.components, setup.found
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
