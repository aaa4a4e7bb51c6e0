"""What stages 2, 4 and 5 train with: images in memory, components of a recipe, and the loop of pretraining itself."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from manyviews import recipe as recipes
from manyviews.config import load
from manyviews.data import Images, InMemory
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import Checkpoint, Saver
from manyviews.run.folder import Run
from manyviews.system.console import Console
from manyviews.system.launch import Stop, start
from manyviews.system.writing import make_folder
from manyviews.train.components import Components, batches, build
from manyviews.train.pretrain import train
from manyviews.train.session import OnMetrics, Session


class Unsaved(Saver):
    """Writes no checkpoints: those come once in minutes, not once in steps."""

    def begin(self, checkpoint: Checkpoint, *, before: Callable[[], object] | None = None) -> None:
        """Writes nothing."""


def images_in_memory(count: int, size: int, channels: int = 3) -> InMemory:
    """Random images of ten classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    names = [f"{number:07d}" for number in range(count)]
    classes = tuple("0123456789")
    return InMemory(pixels, names, torch.arange(count) % len(classes), classes, f"random {count} {size} {channels}")


def prepared(name: str | None, args: Sequence[str], images: Images) -> Components:
    """The components of a recipe by name, or of the defaults, with settings, for these images."""
    recipe = load(Recipe, None if name is None else recipes.find(name), list(args))
    # The threads stay as they are: more than there are free cores would wait for each other by spinning.
    accelerator = start(recipe.train.batch_size, recipe.train.precision, torch.get_num_threads())
    return build(recipe, accelerator, images)


def steps_of(count: int, batch: int, images: Images) -> list[str]:
    """The arguments of a run of so many steps, without measuring on the way."""
    return [
        f"train.batch_size={batch}",
        f"train.epochs={count / (len(images) // batch)}",
        "train.monitor=0",
        "train.preview=0",
    ]


def run_loop(components: Components, images: Images, folder: Path, on_metrics: OnMetrics | None = None) -> None:
    """Trains as scripts/pretrain.py does; `on_metrics` is called with each line of metrics."""
    make_folder(folder, folder)
    log, problems = Run(folder), list[Exception]()

    def call(values: Mapping[str, float]) -> None:
        # The session would only warn.
        try:
            if on_metrics is not None:
                on_metrics(values)
        except Exception as problem:
            problems.append(problem)
            raise

    order = batches(components.recipe, images, 1)
    try:
        with Stop() as stop:
            session = Session(log, Unsaved(folder), Console(quiet=True), stop, call)
            train(components, images, order, None, session)
    finally:
        log.close()
    if problems:
        raise problems[0]
