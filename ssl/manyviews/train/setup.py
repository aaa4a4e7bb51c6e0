"""Sets up a run: images, batch sampler, components, checkpoint, run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from manyviews.config import dump_yaml, load
from manyviews.data import ClassOrder, Folder, Images, Order, Split, leave_out
from manyviews.data.decoding.files import Files, listed
from manyviews.data.images import Inventory
from manyviews.data.listing.inventory import changes, copy_warnings, read_inventory, write_inventory
from manyviews.data.sampler import Composition
from manyviews.encoder.backbone import description_of
from manyviews.encoder.encoder import EncoderSettings
from manyviews.encoder.timm_format import local_name
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
from manyviews.train.chunk_size import Step, with_found_chunk
from manyviews.train.components import Components, batches, build, cautions, check_classes, negatives_of
from manyviews.views.preview import preview


class Setup(NamedTuple):
    """Everything a run needs for its next step."""

    split: Split
    order: Order
    components: Components
    checkpoint: Checkpoint | None
    """The checkpoint to resume from, loaded already."""
    extended: str | None = None
    """A message about an extended schedule."""
    contrasts: Composition | None = None
    """Positives and negatives of the batches, with ids=labels."""


def read_images(recipe: Recipe, folder: Path, console: Console) -> Split:
    """Reads the images of a recipe, without the `unseen` classes; a resumed run keeps its ids.

    Images of a resumed run may be lost, if the run has noted that or `data.max_bad` allows it.

    Raises:
        ValueError: if the images are invalid; names the files that were added or replaced since the start.
    """
    options: dict[str, Any] = {"workers": recipe.train.workers, "report": console.report}
    with console.bar():
        split = recipe.data.build(**options)
        if recipe.resume and isinstance(recipe.data, Folder) and split.inventory is not None:
            began = _began_with(folder, split, split.inventory, console)
            split = recipe.data.build(**options, began=began) if began else split
    return split._replace(train=leave_out(split.train, recipe.unseen))


def _began_with(folder: Path, split: Split, now: Inventory, console: Console) -> dict[str, str] | None:
    """The files at the start of a run, if some are lost since; else None."""
    checkpoint, _ = newest_checkpoint(folder / CHECKPOINTS, only=())
    with raise_on_all_ranks():
        file, seen = folder / INVENTORY, {name for name, _ in read_unreadable(folder)}
        if checkpoint is None or not file.is_file() or checkpoint.metadata.get("images") == split.train.fingerprint:
            return None
        before = read_inventory(file)
        changed = changes(before, now)
        refused = changed._replace(removed=[], replaced=[name for name in changed.replaced if shown(name) not in seen])
        if any(refused):
            raise ValueError(
                f"the images are not those that the run was started with: {refused}; {resume.OTHER_IMAGES}"
            )
    if not any(changed):
        return None
    console.warn(
        f"of the images that the run was started with, {changed}: they are passed over, and all keep their ids"
    )
    return before


def make_setup(recipe: Recipe, accelerator: Accelerator, folder: Path, console: Console, step: Step) -> Setup:
    """Reads the images, builds the components and loads the newest checkpoint; collective.

    `step` is what train.chunk=auto tries.

    Raises:
        ValueError: if recipe, images or checkpoint are invalid; nothing is written.
    """
    split = read_images(recipe, folder, console)
    channels = split.train.channels
    recipe = resume.with_known_views(recipe, folder) if recipe.resume else recipe
    views = recipe.views.resolve(size=split.train.size, channels=channels, **_of_weights(recipe.encoder, channels))
    recipe = recipe.model_copy(update={"views": views})
    processes = accelerator.num_processes
    checkpoint = resume.resumable(recipe, folder, split.train, processes, console) if recipe.resume else None
    order = batches(recipe, split.train, processes, checkpoint.metadata["processes"] if checkpoint else None)
    check_steps(recipe.train, order.steps_per_epoch)
    contrasts = check_classes(recipe, split.train, order)
    extended = resume.check_schedule(checkpoint, recipe, order.steps_per_epoch) if checkpoint else None
    found = with_found_chunk(recipe, accelerator, split.train, order, step)
    if found is not recipe:
        console.say(f"chunk      {found.train.part or 'the whole batch'}: the most images that fit (train.chunk=auto)")
    components = build(found, accelerator, split.train)
    if split.test is not None:
        components = components._replace(held_out=split.test.fingerprint)
    if checkpoint is not None:
        if checkpoint.metadata.get("held_out", components.held_out) != components.held_out:
            console.warn("the held-out images are not those that the run was started with: scores are not comparable")
        restore(components, checkpoint)
    return Setup(split, order, components, checkpoint, extended, contrasts)


def _of_weights(encoder: EncoderSettings, channels: int) -> dict[str, Any]:
    """The mean and standard deviation that pretrained weights were trained with; none for random weights."""
    if not encoder.pretrained:
        return {}
    described = description_of(local_name(encoder.name, pretrained=True))

    def of_channels(values: tuple[float, ...]) -> float | tuple[float, ...]:
        if len(set(values)) == 1:
            return values[0]
        # timm adds up the weights of colours for grey images.
        return values if len(values) == channels else sum(values) / len(values)

    return {"mean": of_channels(described.mean), "std": of_channels(described.std)}


def describe(setup: Setup, folder: Path, console: Console) -> None:
    """Prints what will run."""
    split, order, components, contrasts = setup.split, setup.order, setup.components, setup.contrasts
    recipe, accelerator, train = components.recipe, components.accelerator, split.train
    processes, parameters = distributed.world_size(), sum(p.numel() for p in components.encoder.parameters())
    local, chunk = recipe.train.batch_size // processes, recipe.train.part
    each = f" ({local} on each)" if processes > 1 else ""
    each += f" in chunks of {chunk}" if chunk is not None and chunk < local else ""
    budget = plural(recipe.train.minutes, "minute") if recipe.train.minutes else plural(recipe.train.epochs, "epoch")
    budget += f", {plural(order.steps_per_epoch, 'step')} an epoch"
    precision = accelerator.mixed_precision.replace("no", "fp32")
    console.say(f"images     {len(train):,} of {recipe.data.name}, {pixels_of(train)}")
    if split.layout:
        console.say(f"layout     {split.layout}")
    if recipe.unseen and train.labels is not None:
        learned = set(train.labels.tolist())
        left_out = [name for number, name in enumerate(train.classes) if number not in learned]
        console.say(f"unseen     {shown(', '.join(left_out))}: left out of training")
    views = recipe.views
    small = f" and {views.local} local ones, {views.local_size} px" if views.local else ""
    console.say(f"views      {views.num_views} per image, {views.size} px{small}")
    console.say(
        f"encoder    {recipe.encoder.name}: {components.encoder.num_features:,} features, {parameters:,} parameters"
    )
    silent = (
        "" if recipe.objective.traits.bounds_information else "; it bounds no information, so the metrics hold none"
    )
    console.say(f"objective  {recipe.objective.name}{silent}")
    ids = len(train) if components.names is None else int(components.names.max()) + 1
    views, dim = recipe.views.num_views + recipe.views.local, components.encoder.dim
    sizes = Sizes(ids, views, recipe.train.batch_size, dim, processes, recipe.keys)
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


def pixels_of(images: Images) -> str:
    """What is read of images: their pixels in memory, or crops of the files."""
    channels = "grey" if images.channels == 1 else "in colour"
    if isinstance(images, Files) and not images.whole:
        return f"{channels}, cropped from the files as needed, at full resolution"
    if images.aspects is None:
        return f"{images.channels} × {images.size} × {images.size}"
    return f"{channels}, whole and of any shape, squeezed to {images.size} × {images.size} in memory (data.memory=0: cropped from the files)"


def restore(components: Components, checkpoint: Checkpoint) -> None:
    """Loads a checkpoint into the components; raises ValueError if it is of other ones."""
    resume.check_lengths(checkpoint, components.objective.shards())
    try:
        components.encoder.load_state_dict(dict(checkpoint.parts["encoder"]))
        components.objective.load_state_dict(dict(checkpoint.parts["objective"]))
        if components.twin is not None:
            components.twin.load_state_dict(dict(checkpoint.parts["twin"]))
        restore_optimiser(components.optimiser, checkpoint.optimiser)
        if components.accelerator.scaler is not None:
            components.accelerator.scaler.load_state_dict(checkpoint.metadata["scaler"])
    except (KeyError, RuntimeError) as problem:
        raise ValueError(
            f"the checkpoint of step {checkpoint.step:,} is of other parts than the recipe's: {problem}"
        ) from None


def folder_of(recipe: Recipe) -> Path:
    """The run folder."""
    return Path(recipe.output or "runs/pretrain").expanduser()


def finished(recipe: Recipe, folder: Path, console: Console, *, record: bool = True) -> bool:
    """Whether a run is finished, with a message; collective.

    With `record`, changed settings that are free, such as the path of the same images, are written to config.yaml.

    Raises:
        ValueError: if it was finished with other settings or images, or with another schedule without extend=true.
    """
    done = (folder / DONE).exists() and (folder / CONFIG).exists()
    if not distributed.from_first_rank(float(done)):
        return False
    before, now = load(Recipe, folder / CONFIG).model_dump(mode="json"), recipe.model_dump(mode="json")
    # Open settings of the views follow from the images.
    now["views"] = {key: before["views"].get(key) if value is None else value for key, value in now["views"].items()}
    resume.check_settings(before, now, resume.FREE | resume.SCHEDULE | resume.moved(before, now))
    changed = resume.differences(before, now, resume.OF_A_START)
    if resume.SCHEDULE & changed.keys():
        if not recipe.extend:
            resume.check_settings(before, now, resume.FREE | resume.LOCATIONS, resume.EXTEND)
        return False
    # Reads only the metadata.
    checkpoint, _ = newest_checkpoint(folder / CHECKPOINTS, only=())
    if checkpoint is not None:
        try:
            split = read_images(recipe, folder, console)
        except (ValueError, OSError) as problem:
            if resume.LOCATIONS & changed.keys():
                raise
            console.warn(f"the images cannot be compared with those of the run: {problem}")
        else:
            resume.check_images(checkpoint, split.train)
    if changed and record:
        with folder_lock(folder, lambda: None, console.warn):
            views = load(Recipe, folder / CONFIG).views
            resume.record_settings(folder, recipe.model_copy(update={"views": views}), checkpoint, console)
    console.say(f"{folder} is finished: nothing is left to do")
    return True


def open_run(
    setup: Setup, folder: Path, console: Console, header: str = "", lock_again: Callable[[], None] = lambda: None
) -> Run:
    """Opens the run folder; writes configuration, inventory and picture of the views."""
    split, components, checkpoint = setup.split, setup.components, setup.checkpoint
    make_folder(folder, folder)
    if (folder / DONE).exists():
        # A finished run that is extended is not finished from here on, even if it is interrupted.
        remove(folder / DONE)
        sync(folder)
    if (folder / CONFIG).exists():
        resume.record_settings(folder, components.recipe, checkpoint, console)
    else:
        write_atomic(folder / CONFIG, [(header + dump_yaml(components.recipe)).encode()])
    if split.inventory is not None and not (folder / INVENTORY).exists():
        write_inventory(folder / INVENTORY, split.inventory)
    if checkpoint is None:
        remove(folder / UNREADABLE)
    known = {name for name, _ in read_unreadable(folder)}
    if new := [(name, reason) for name, reason in split.unreadable if shown(name) not in known]:
        console.warn(f"{plural(len(new), 'file')} left out, for they could not be read: {folder / UNREADABLE}")
    run = Run(folder, step=checkpoint.step if checkpoint else 0, warn=console.warn, lock_again=lock_again)
    if new:
        run.unreadable(listed(new))
    if checkpoint is not None:
        console.say(f"resumed at step {checkpoint.step:,}")
        return run
    run.text("config", dump_yaml(components.recipe))
    count = min(components.recipe.train.preview, len(split.train))
    if count:
        ids = torch.linspace(0, len(split.train) - 1, count).long()
        device = components.accelerator.device
        try:
            run.picture(VIEWS, preview(components.views, split.train, ids, device))
        except Exception as problem:
            console.warn(f"there is no picture of the views: {in_a_line(problem)}")
    return run
