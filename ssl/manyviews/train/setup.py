"""Sets up a run: images, batch sampler, components, checkpoint, run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from manyviews.config import dump_yaml, load
from manyviews.data import Folder, Order, RelationTable, Split, leave_out, with_sets
from manyviews.data.decoding.files import listed
from manyviews.data.images import Inventory
from manyviews.data.listing.inventory import changes, read_inventory, write_inventory
from manyviews.data.sampler import Composition
from manyviews.encoder.backbone import description_of
from manyviews.encoder.encoder import EncoderSettings
from manyviews.encoder.timm_format import local_name
from manyviews.features.limits import check_steps
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
from manyviews.train.components import Components, batches, build, check_classes
from manyviews.train.relations import check_relations, relations_of
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
    relations: RelationTable | None = None
    """Relations that batches are made of."""


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
        split = with_sets(split, recipe.data)
    train = leave_out(split.train, recipe.unseen)
    left_out = sorted({*split.train.names} - {*train.names}) if recipe.unseen else ()
    return split._replace(train=train, left_out=left_out)


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
    relations = relations_of(recipe, split, console)
    if checkpoint is not None:
        check_relations(checkpoint, relations)
    begun_on = checkpoint.metadata["processes"] if checkpoint else None
    order = batches(recipe, split.train, processes, begun_on, relations)
    check_steps(recipe.train, order.steps_per_epoch)
    contrasts = check_classes(recipe, split.train, order)
    extended = resume.check_schedule(checkpoint, recipe, order.steps_per_epoch) if checkpoint else None
    found = with_found_chunk(recipe, accelerator, split.train, order, step, relations)
    if found is not recipe:
        console.say(f"chunk      {found.train.part or 'the whole batch'}: the most images that fit (train.chunk=auto)")
    components = build(found, accelerator, split.train, relations)
    if split.test is not None:
        components = components._replace(held_out=split.test.fingerprint)
    if checkpoint is not None:
        if checkpoint.metadata.get("held_out", components.held_out) != components.held_out:
            console.warn("the held-out images are not those that the run was started with: scores are not comparable")
        restore(components, checkpoint)
    return Setup(split, order, components, checkpoint, extended, contrasts, relations)


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
