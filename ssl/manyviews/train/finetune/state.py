"""What a checkpoint of fine-tuning holds: the classifier, the average of its weights, and the best of them so far."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from manyviews.run.checkpoints import Checkpoint, restore_optimiser
from manyviews.train.finetune.classifier import Probe
from manyviews.train.finetune.task import Task, outputs


class FinetuneState:
    """The parts that move during fine-tuning; what is measured and kept is the average of the weights."""

    def __init__(self, task: Task, model: nn.Module, average: nn.Module, optimiser: Any, probe: Probe | None) -> None:
        """Begins with the weights as they are, which are the best so far."""
        self._task, self._model, self._average, self._optimiser, self._probe = task, model, average, optimiser, probe
        self.best = _copied(average)
        self.best_step, self.tested = 0, 0
        """The steps of the best measurement and of the last."""
        self.best_accuracy: float | None = None
        """On the images that are held out; None without any."""

    def restore(self, found: Checkpoint) -> None:
        """Goes on from a checkpoint."""
        self._model.load_state_dict(dict(found.parts["model"]))
        self._average.load_state_dict(dict(found.parts["average"]))
        restore_optimiser(self._optimiser, found.optimiser)
        device = next(self._model.parameters()).device
        self.best = {key: value.to(device) for key, value in found.parts["best"].items()}
        self.best_step, self.best_accuracy = found.metadata["best_step"], found.metadata["best_accuracy"]
        self.tested = found.metadata["tested"]

    def measure(self, step: int) -> float | None:
        """The accuracy on the images that are held out, by which the best weights are kept; collective."""
        accuracy, before = accuracy_of(self._average, self._task), self.best_accuracy
        # Of equals the later one, which averages over more, but the probe only gives way to one that is better; with
        # none held out, it is the last one.
        if accuracy is None or before is None or accuracy > before or (accuracy == before and self.best_step):
            self.best, self.best_step, self.best_accuracy = _copied(self._average), step, accuracy
        self.tested = step
        return accuracy

    def checkpoint(self, step: int, known: Mapping[str, Any]) -> Checkpoint:
        """Everything that a run needs to go on, with the metadata that is `known` of it; nothing is copied."""
        parts = {"model": self._model.state_dict(), "average": self._average.state_dict(), "best": self.best}
        metadata = {"step": step, "tested": self.tested, "best_step": self.best_step} | self._task.origin
        metadata |= {"best_accuracy": self.best_accuracy, **known}
        if self._probe is not None:
            parts["probe"] = {"weights": self._probe.weights, "biases": self._probe.biases}
            metadata["probe"] = [self._probe.regularisation, self._probe.held_out]
        return Checkpoint(step, parts, self._optimiser.state_dict(), metadata)


def accuracy_of(model: nn.Module, task: Task) -> float | None:
    """The accuracy on the images that are held out; None without any; collective."""
    if not len(task.held_out):
        return None
    logits = outputs(model, task, task.split.train, task.held_out)
    return (logits.argmax(1) == task.held_out_labels).double().mean().item()


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}
