"""What came of fine-tuning: the one look at the test images, the classifier in timm's format, pictures and a record."""

import json
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from contrastive.data import Images
from contrastive.evaluate.confusion import confusion, confusion_picture, mistakes_picture, worst
from contrastive.evaluate.intervals import wilson
from contrastive.evaluate.stored import write_whole
from contrastive.finetune.task import Task, outputs
from contrastive.progress import Teller
from contrastive.run import CLASSIFIER, Run
from contrastive.timm_folder import export

RESULT = "result.json"
MISTAKES = 24
"""Most that are shown."""


def measure(
    model: nn.Module, task: Task, facts: dict[str, Any], run: Run | None, teller: Teller, header: str = ""
) -> None:
    """Measures the classifier on the test images and writes what is to stay; collective, the first process writes."""
    test = task.split.test
    ids = None if test is None or test.labels is None else (test.labels >= 0).nonzero().flatten()
    logits = outputs(model, task, test, ids) if test is not None and ids is not None and len(ids) else None
    if run is None:
        return
    settings, opened, classes = task.settings, task.opened, task.images.classes
    export(
        model,
        run.folder / CLASSIFIER,
        channels=opened.channels,
        size=opened.size,
        mean=opened.mean,
        std=opened.std,
        interpolation=opened.interpolation,
        classes=classes,
    )
    trained, held_out = len(task.images), len(task.held_out)
    record: dict[str, Any] = {"command": header.partition("\n")[0].removeprefix("# "), "model": opened.name}
    record |= {key: getattr(settings, key) for key in ("scratch", "mode", "fraction", "seed")}
    record |= {"images": {"labelled": trained + held_out, "trained": trained, "held_out": held_out}, **facts}
    record |= {"weights": dict(opened.origin), "classes": list(classes)}
    said = ["there are no labelled test images: nothing was measured on them"]
    if test is not None and ids is not None and logits is not None:
        record, said = _measured(record, logits, test, ids, classes, run)
    if facts["best_accuracy"] is not None:
        epoch, accuracy = facts["best_epoch"], 100 * facts["best_accuracy"]
        said.append(f"the best epoch, {epoch:.3g}, was chosen by {held_out:,} held-out images: {accuracy:.1f} % right")
    write_whole(run.folder / RESULT, [json.dumps(record, indent=1), "\n"])
    run.finish(run.folder / CLASSIFIER)
    for line in said:
        teller.say(line)
    teller.say(f"finished: the classifier is in {run.folder / CLASSIFIER}, beside {RESULT} and the pictures")


def _measured(
    record: dict[str, Any],
    logits: Float[Tensor, "tested classes"],
    test: Images,
    ids: Int[Tensor, " tested"],
    classes: tuple[str, ...],
    run: Run,
) -> tuple[dict[str, Any], list[str]]:
    """The record with the figures of the test images, the same in words; draws the pictures."""
    assert test.labels is not None
    labels, predictions = test.labels[ids], logits.argmax(1)
    right, total = int((predictions == labels).sum()), len(ids)
    low, high = wilson(right, total)
    matrix = confusion(labels, predictions, len(classes))
    places, sure = worst(logits, labels, MISTAKES)
    captions = [
        (classes[labels[place]], f"→ {classes[predictions[place]]}, {100 * probability:.0f} %")
        for place, probability in zip(places.tolist(), sure.tolist(), strict=True)
    ]
    run.picture("confusion", confusion_picture(matrix, classes), record["step"])
    run.picture("mistakes", mistakes_picture(test.read(ids[places]), captions), record["step"])
    record["images"]["test"] = total
    record |= {"accuracy": right / total, "interval": [low, high], "confusion": matrix.tolist()}
    said = f"test       {100 * right / total:.1f} % of {total:,} images right"
    return record, [f"{said} (95 %: {100 * low:.1f} to {100 * high:.1f})"]
