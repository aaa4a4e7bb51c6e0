"""The run folder of pretraining: whether it is finished, what a change of settings leaves in it, how it is opened."""

from collections.abc import Callable
from pathlib import Path

import torch

from manyviews.config import dump_yaml, load
from manyviews.data import listed, write_inventory
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import Checkpoint, newest_checkpoint, sync
from manyviews.run.folder import CHECKPOINTS, CONFIG, DONE, INVENTORY, UNREADABLE, VIEWS, Run, read_unreadable
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.files import shown
from manyviews.system.folder_lock import folder_lock
from manyviews.system.launch import in_a_line
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, remove, write_atomic
from manyviews.train.resume import (
    EXTEND,
    FREE,
    LOCATIONS,
    OF_A_START,
    SCHEDULE,
    check_images,
    check_settings,
    differences,
    moved,
    record_settings,
)
from manyviews.train.setup import Setup, read_images


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
    check_settings(before, now, FREE | SCHEDULE | moved(before, now))
    changed = differences(before, now, OF_A_START)
    if SCHEDULE & changed.keys():
        if not recipe.extend:
            check_settings(before, now, FREE | LOCATIONS, EXTEND)
        return False
    # Of a finished run only the metadata are looked at.
    found, _ = newest_checkpoint(folder / CHECKPOINTS, only=())
    if found is not None:
        try:
            split = read_images(recipe, folder, console)
        except (ValueError, OSError) as problem:
            if LOCATIONS & changed.keys():
                raise
            console.warn(f"the images cannot be compared with those of the run: {problem}")
        else:
            check_images(found, split.train)
    if changed and record:
        with folder_lock(folder, lambda: None, console.warn):
            note(recipe.model_copy(update={"views": load(Recipe, folder / CONFIG).views}), folder, found, console)
    console.say(f"{folder} is finished: nothing is left to do")
    return True


def note(recipe: Recipe, folder: Path, found: Checkpoint | None, console: Console) -> None:
    """Writes down with which settings a run goes on, on the first process, and says what has changed."""
    if distributed.rank() == 0 and (changed := record_settings(folder, recipe, found.step if found else 0)):
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
