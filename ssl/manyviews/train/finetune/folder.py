"""The folder of a fine-tuning: how it is begun, described, gone on with, and removed where nothing came of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from accelerate import Accelerator
from pydantic import AfterValidator, Field
from torch import nn

from manyviews.config import dump_yaml, load
from manyviews.evaluators.logistic import cut_short
from manyviews.run.checkpoints import Checkpoint, newest_checkpoint
from manyviews.run.folder import CHECKPOINTS, CLASSIFIER, CONFIG, METRICS, Run, read_metrics
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, remove, write_atomic
from manyviews.train.finetune.classifier import Probe
from manyviews.train.finetune.settings import FinetuneSettings
from manyviews.train.finetune.task import Task
from manyviews.train.not_finite import REPORT
from manyviews.train.resume import Counted, Measured, Seconds, check_metadata, check_processes, check_settings


def _with_strength(probe: list[float | None]) -> list[float | None]:
    if probe[0] is None:
        raise ValueError("its strength is missing")
    return probe


FREE = {
    "output",
    "resume",
    "elastic",
    "data.path",
    "data.test",
    "data.labels",
    "data.max_bad",
    "workers",
    "threads",
    "log_every",
    "save_minutes",
    "keep",
}
"""Settings that may change when a run goes on; where the images are may, for they are compared."""
Probed = Annotated[list[Measured | None], Field(min_length=2, max_length=2), AfterValidator(_with_strength)]
"""The strength of the linear probe, and its accuracy where images were held out."""
METADATA = {
    "step": Counted,
    "seconds": Seconds,
    "tested": Counted,
    "best_step": Counted,
    "losses": list[float],
    "best_accuracy": Measured | None,
    "skipped": Counted | None,
}
"""What fine-tuning goes on by, of the metadata of its checkpoint."""


def folder_of(given: str, settings: FinetuneSettings) -> Path:
    """The folder that is written."""
    ending = "scratch" if settings.scratch else "finetuned"
    return Path(settings.output or f"runs/{Path(given).resolve().name}-{ending}").expanduser()


def check_unchanged(folder: Path, settings: FinetuneSettings) -> None:
    """Refuses to go on in a folder that was begun with other settings.

    Raises:
        ValueError: naming each that was and is.
    """
    if (folder / CONFIG).exists():
        before = load(FinetuneSettings, folder / CONFIG)
        check_settings(before.model_dump(mode="json"), settings.model_dump(mode="json"), FREE)


def resumable(folder: Path, task: Task, console: Console) -> Checkpoint | None:
    """The newest checkpoint of a run with the same settings, images and weights; None: there is none yet."""
    found, damaged = newest_checkpoint(folder / CHECKPOINTS)
    for line in damaged:
        console.warn(line)
    check_unchanged(folder, task.settings)
    if found is None:
        return None
    check_metadata(found, METADATA | ({"probe": Probed} if task.probes else {}))
    if ("probe" in found.parts) != task.probes:
        raise ValueError(
            f"the checkpoint of step {found.step:,} is not one that fine-tuning writes; start another with output=…"
        )
    check_processes(found, distributed.world_size(), elastic=task.settings.elastic, console=console)
    changed = [key for key, value in task.origin.items() if found.metadata.get(key) != value]
    if changed:
        raise ValueError(
            f"other {' and '.join(changed)} than the run was begun with; start another with output=…, or go on with "
            "the same model, images and number of processes"
        )
    return found


def probe_of(found: Checkpoint) -> Probe | None:
    """The linear probe that a checkpoint holds; None: it was not fitted."""
    if "probe" not in found.parts:
        return None
    strength, held_out = found.metadata["probe"]
    return Probe(found.parts["probe"]["weights"], found.parts["probe"]["biases"], strength, held_out)


def open_run(
    folder: Path, task: Task, header: str, found: Checkpoint | None, console: Console, lock_again: Callable[[], None]
) -> Run:
    """The folder with its configuration, to be written to from the checkpoint's step on."""
    # It tells a run from a classifier, also while there is none yet.
    make_folder(folder / CLASSIFIER, folder)
    if not (folder / CONFIG).exists():
        write_atomic(folder / CONFIG, [(header + dump_yaml(task.settings)).encode()])
    run = Run(folder, step=found.step if found else 0, warn=console.warn, lock_again=lock_again)
    if found is None:
        run.text("config", dump_yaml(task.settings))
    return run


def remove_unbegun(folder: Path) -> None:
    """Removes what was written by a start that has come to no step, so that the same command can be run again.

    The folder itself goes with its lock.
    """
    if (folder / REPORT).exists() or any((folder / CHECKPOINTS).glob("*")):
        return
    if any(line["step"] for line in read_metrics(folder)):
        return
    for name in (CONFIG, METRICS, CLASSIFIER, CHECKPOINTS, "tensorboard"):
        remove(folder / name)


def describe(
    task: Task, model: nn.Module, probe: Probe | None, accelerator: Accelerator, folder: Path, console: Console
) -> None:
    """Says what will run, so that a mistake is seen before time has gone by."""
    settings, trained, held = task.settings, len(task.images), len(task.held_out)
    moving = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    budget = plural(settings.minutes, "minute") if settings.minutes else plural(settings.epochs, "epoch")
    floor = "" if settings.minutes else f", at least {plural(settings.min_steps, 'step')}"
    random = settings.scratch or task.opened.origin.get("pretrained") is False
    weights = "random weights" if random else "pretrained weights"
    console.say(
        f"images     {trained:,} to train on, {held:,} held out, {plural(len(task.images.classes), 'class', 'classes')}"
    )
    console.say(f"model      {task.opened.name}, {weights}, {settings.mode}: {moving:,} parameters move")
    console.say(
        f"training   {budget}{floor}, batch {task.batch_size}, {accelerator.num_processes} × {accelerator.device}"
    )
    console.say(f"run        {folder.resolve()}")
    if task.split.unreadable:
        console.warn(f"{plural(len(task.split.unreadable), 'file')} left out: could not be read")
    if probe is not None and probe.held_out is not None:
        console.say(
            f"probe      {100 * probe.held_out:.1f} % of the held-out images right, by logistic regression on the "
            f"features before fine-tuning (regularisation {probe.regularisation:g})"
        )
    if probe is not None and (remark := cut_short(len(task.images.classes))):
        console.warn(remark)
    if settings.held_out and not held:
        console.warn(
            "there are too few labels of each class to hold any out: the last checkpoint is kept, and nothing but "
            "labelled test images can tell whether it is better than the linear probe"
        )
    absent = len(task.images.classes) - len(task.labels.unique())
    if absent:
        console.warn(f"{absent:,} of {len(task.images.classes):,} classes have no image to train on: none is learned")
