"""Run folder and checkpoints of a fine-tuning."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from accelerate import Accelerator
from pydantic import BeforeValidator
from torch import Tensor, nn

from manyviews.config import dump_yaml, load
from manyviews.evaluators.logistic import cut_short
from manyviews.run.checkpoints import Checkpoint, newest_checkpoint, restore_optimiser
from manyviews.run.folder import CHECKPOINTS, CLASSIFIER, CONFIG, METRICS, Run, read_metrics
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, remove, write_atomic
from manyviews.train import resume
from manyviews.train.finetune.classifier import Probe
from manyviews.train.finetune.settings import FinetuneSettings
from manyviews.train.finetune.task import Task, outputs
from manyviews.train.not_finite import REPORT

FREE = {key.removeprefix("train.") for key in resume.FREE | resume.LOCATIONS}
"""Settings that may change when a run is resumed; the images themselves are compared."""
Probed = Annotated[
    tuple[resume.Measured, resume.Measured | None],
    BeforeValidator(lambda pair: tuple(pair) if isinstance(pair, list) else pair),
]
"""Regularisation and held-out accuracy of the linear probe."""
METADATA = {
    "step": resume.Counted,
    "seconds": resume.Seconds,
    "tested": resume.Counted,
    "best_step": resume.Counted,
    "losses": list[float],
    "best_accuracy": resume.Measured | None,
    "skipped": resume.Counted | None,
    "scaler": resume.METADATA["scaler"],
}
"""Checkpoint metadata that resuming needs, with their types."""


def folder_of(source: str, settings: FinetuneSettings) -> Path:
    """The output folder of fine-tuning a run or a timm model."""
    ending = "scratch" if settings.scratch else "finetuned"
    return Path(settings.output or f"runs/{Path(source).resolve().name}-{ending}").expanduser()


def check_unchanged(folder: Path, settings: FinetuneSettings) -> None:
    """Raises ValueError if the folder was started with other settings, naming each."""
    if (folder / CONFIG).exists():
        before = load(FinetuneSettings, folder / CONFIG)
        resume.check_settings(before.model_dump(mode="json"), settings.model_dump(mode="json"), FREE)


def resumable(folder: Path, task: Task, console: Console) -> Checkpoint | None:
    """The newest checkpoint, if any; raises ValueError for other settings or images."""
    checkpoint, damaged = newest_checkpoint(folder / CHECKPOINTS)
    for line in damaged:
        console.warn(line)
    check_unchanged(folder, task.settings)
    if checkpoint is None:
        return None
    resume.check_metadata(checkpoint, METADATA | ({"probe": Probed} if task.probes else {}))
    if ("probe" in checkpoint.parts) != task.probes:
        raise ValueError(
            f"the checkpoint of step {checkpoint.step:,} is not one of fine-tuning; start another with output=…"
        )
    resume.check_processes(checkpoint, distributed.world_size(), elastic=task.settings.elastic, console=console)
    changed = [key for key, value in task.origin.items() if checkpoint.metadata.get(key) != value]
    if changed:
        raise ValueError(
            f"other {' and '.join(changed)} than the run was started with; start another with output=…, or resume with "
            "the same model, images and number of processes"
        )
    return checkpoint


def probe_of(checkpoint: Checkpoint) -> Probe | None:
    """The linear probe in a checkpoint; None if it was not fitted."""
    if "probe" not in checkpoint.parts:
        return None
    strength, held_out = checkpoint.metadata["probe"]
    return Probe(checkpoint.parts["probe"]["weights"], checkpoint.parts["probe"]["biases"], strength, held_out)


def open_run(
    folder: Path, task: Task, header: str, resumed: Checkpoint | None, console: Console, lock_again: Callable[[], None]
) -> Run:
    """Opens the run folder, writing its configuration, at the step of the checkpoint."""
    # This folder marks a fine-tuning from its start.
    make_folder(folder / CLASSIFIER, folder)
    if not (folder / CONFIG).exists():
        write_atomic(folder / CONFIG, [(header + dump_yaml(task.settings)).encode()])
    run = Run(folder, step=resumed.step if resumed else 0, warn=console.warn, lock_again=lock_again)
    if resumed is None:
        run.text("config", dump_yaml(task.settings))
    return run


def remove_unbegun(folder: Path) -> None:
    """Removes the files of a start that failed before its first step."""
    if (folder / REPORT).exists() or any((folder / CHECKPOINTS).glob("*")):
        return
    if any(line["step"] for line in read_metrics(folder)):
        return
    for name in (CONFIG, METRICS, CLASSIFIER, CHECKPOINTS, "tensorboard"):
        remove(folder / name)


def describe(
    task: Task, model: nn.Module, probe: Probe | None, accelerator: Accelerator, folder: Path, console: Console
) -> None:
    """Prints what will run."""
    settings, trained, held = task.settings, len(task.images), len(task.held_out)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    budget = plural(settings.minutes, "minute") if settings.minutes else plural(settings.epochs, "epoch")
    floor = "" if settings.minutes else f", at least {plural(settings.min_steps, 'step')}"
    random = settings.scratch or task.opened.origin.get("pretrained") is False
    weights = "random weights" if random else "pretrained weights"
    console.say(
        f"images     {trained:,} to train on, {held:,} held out, {plural(len(task.images.classes), 'class', 'classes')}"
    )
    console.say(f"model      {task.opened.name}, {weights}, {settings.mode}: {trainable:,} parameters are trained")
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


class FinetuneState:
    """The state of fine-tuning: model, average of its weights, best average, optimiser, scaler of fp16."""

    def __init__(
        self, task: Task, model: nn.Module, average: nn.Module, optimiser: Any, probe: Probe | None, scaler: Any = None
    ) -> None:
        self._task, self._model, self._average, self._optimiser, self._probe = task, model, average, optimiser, probe
        self._scaler = scaler
        self.best = _copy(average)
        self.best_step, self.tested = 0, 0
        """The steps of the best and the last measurement."""
        self.best_accuracy: float | None = None
        """On the held-out images; None without any."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Loads a checkpoint."""
        self._model.load_state_dict(dict(checkpoint.parts["model"]))
        self._average.load_state_dict(dict(checkpoint.parts["average"]))
        restore_optimiser(self._optimiser, checkpoint.optimiser)
        # Checkpoints of older versions have none.
        if self._scaler is not None and checkpoint.metadata.get("scaler") is not None:
            self._scaler.load_state_dict(checkpoint.metadata["scaler"])
        device = next(self._model.parameters()).device
        self.best = {key: value.to(device) for key, value in checkpoint.parts["best"].items()}
        self.best_step, self.best_accuracy = checkpoint.metadata["best_step"], checkpoint.metadata["best_accuracy"]
        self.tested = checkpoint.metadata["tested"]

    def measure(self, step: int) -> float | None:
        """Measures the held-out accuracy and keeps the weights if they are the best; collective."""
        accuracy, before = accuracy_of(self._average, self._task), self.best_accuracy
        # Of equal ones the later, which averages more steps; but the probe is kept unless one is better. Without
        # held-out images, the last one.
        if accuracy is None or before is None or accuracy > before or (accuracy == before and self.best_step):
            self.best, self.best_step, self.best_accuracy = _copy(self._average), step, accuracy
        self.tested = step
        return accuracy

    def checkpoint(self, step: int, known: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint of a step, with the metadata in `known`; copies nothing."""
        parts = {"model": self._model.state_dict(), "average": self._average.state_dict(), "best": self.best}
        metadata = {"step": step, "tested": self.tested, "best_step": self.best_step} | self._task.origin
        metadata |= {"best_accuracy": self.best_accuracy, **known}
        if self._scaler is not None:
            metadata["scaler"] = self._scaler.state_dict()
        if self._probe is not None:
            parts["probe"] = {"weights": self._probe.weights, "biases": self._probe.biases}
            metadata["probe"] = [self._probe.regularisation, self._probe.held_out]
        return Checkpoint(step, parts, self._optimiser.state_dict(), metadata)


def accuracy_of(model: nn.Module, task: Task) -> float | None:
    """Accuracy on the held-out images; None without any; collective."""
    if not len(task.held_out):
        return None
    logits = outputs(model, task, task.split.train, task.held_out)
    return (logits.argmax(1) == task.held_out_labels).double().mean().item()


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}
