"""Result of a fine-tuning: test accuracy, exported classifier, pictures, result.json."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyviews.data import background_of
from manyviews.data.pictures import pictures
from manyviews.encoder.timm_format import export
from manyviews.evaluators.confusion import confusion, confusion_picture, mistakes_picture, worst
from manyviews.evaluators.results.intervals import wilson
from manyviews.evaluators.splits import balanced_accuracy, uneven
from manyviews.run.folder import CLASSIFIER, Run
from manyviews.system.console import Console
from manyviews.system.files import shown
from manyviews.system.plural import plural
from manyviews.system.writing import write_json
from manyviews.train.finetune.classifier import Probe
from manyviews.train.finetune.task import Task, backbone_of, outputs

RESULT = "result.json"
MISTAKES = 24
"""Images in the picture of mistakes."""
MOST_SQUARED = 500
"""Classes up to which the confusion matrix is written and drawn; beyond, its non-zero entries are listed."""


def measure(
    model: nn.Module,
    task: Task,
    probe: Probe | None,
    outcome: dict[str, Any],
    run: Run | None,
    console: Console,
    header: str = "",
) -> None:
    """Measures classifier and linear probe on the test images; writes results; collective."""
    settings, opened, classes, test = task.settings, task.opened, task.images.classes, task.split.test
    is_probe = settings.mode == "linear_then_full" and not outcome["best_step"]
    labels = test.labels if test is not None and test.labels is not None else torch.empty(0, dtype=torch.int64)
    ids = (labels >= 0).nonzero().flatten()
    logits, probed = None, None
    if test is not None and len(ids):
        logits = outputs(model, task, test, ids)
        if probe is not None:
            device = next(model.parameters()).device
            probed = logits if is_probe else probe.logits(outputs(backbone_of(task, device), task, test, ids))
    if run is None:
        return
    export(
        model,
        run.folder / CLASSIFIER,
        opened.view.pretrained_cfg,
        classes=classes,
        background=background_of(settings.data or (opened.recipe.data if opened.recipe is not None else None)),
    )
    trained, held_out = len(task.images), len(task.held_out)
    record: dict[str, Any] = {"command": header.partition("\n")[0].removeprefix("# "), "model": opened.name}
    record |= {key: getattr(settings, key) for key in ("scratch", "mode", "fraction", "seed")}
    record |= {"images": {"labelled": trained + held_out, "trained": trained, "held_out": held_out}, **outcome}
    record |= {"weights": dict(opened.origin), "classes": list(classes)}
    if probe is not None:
        record["probe"] = {"regularisation": probe.regularisation, "held_out_accuracy": probe.held_out}
    lines = ["there are no labelled test images: nothing was measured on them"]
    if logits is not None:
        record, line = _with_accuracy(record, logits, labels[ids], len(classes))
        lines = [line]
    if probed is not None:
        right = int((probed.argmax(1) == labels[ids]).sum())
        record["probe"]["accuracy"] = right / len(ids)
        lines.append(f"probe      {100 * right / len(ids):.1f} % of them right, on the features before fine-tuning")
    record["remarks"] = remarks(record, is_probe=is_probe, begins_as_probe=settings.mode == "linear_then_full")
    if outcome["best_accuracy"] is not None:
        epoch, accuracy = outcome["best_epoch"], 100 * outcome["best_accuracy"]
        line = f"the best epoch, {epoch:.3g}, was chosen by {held_out:,} held-out images: {accuracy:.1f} % right"
        if probe is not None and probe.held_out is not None:
            line += f"; the probe {100 * probe.held_out:.1f} %"
        lines.append(line)
    write_json(run.folder / RESULT, record)
    if test is not None and logits is not None:
        _draw(logits, task, ids, record["step"], run, console)
    run.finish(run.folder / CLASSIFIER)
    for line in lines:
        console.say(line)
    for line in record["remarks"]:
        console.warn(line)
    console.say(f"finished: the classifier is in {run.folder / CLASSIFIER}, beside {RESULT} and the pictures")


def remarks(record: Mapping[str, Any], *, is_probe: bool, begins_as_probe: bool) -> list[str]:
    """Warnings about a classifier, by its result.json, that is not better than the linear probe.

    `is_probe`: the classifier is the probe itself; `begins_as_probe`: fine-tuning started from it.
    """
    probe, held_out, warnings = record.get("probe"), record["best_accuracy"], []
    if probe is None:
        return []
    if is_probe:
        warnings.append(
            "fine-tuning is nowhere better than the linear probe on the held-out images: the classifier is the probe, "
            "with the weights from before the first step"
        )
    elif held_out is not None and probe["held_out_accuracy"] is not None and held_out <= probe["held_out_accuracy"]:
        advice = "" if begins_as_probe else "; mode=linear_then_full begins from it"
        warnings.append(
            f"the classifier is not better than the linear probe on the held-out images ({100 * held_out:.1f} % and "
            f"{100 * probe['held_out_accuracy']:.1f} %){advice}"
        )
    accuracy, probed = record.get("accuracy"), probe.get("accuracy")
    if accuracy is not None and probed is not None and accuracy < probed:
        warnings.append(
            f"the classifier is worse than the linear probe on the test images ({100 * accuracy:.1f} % and "
            f"{100 * probed:.1f} %)"
        )
    return warnings


def _with_accuracy(
    record: dict[str, Any], logits: Float[Tensor, "tested classes"], labels: Int[Tensor, " tested"], classes: int
) -> tuple[dict[str, Any], str]:
    """Adds the test accuracy to the record; returns it with a line for the console."""
    predictions = logits.argmax(1)
    right, total = int((predictions == labels).sum()), len(labels)
    low, high = wilson(right, total)
    record = {**record, "images": {**record["images"], "test": total}}
    record |= {"accuracy": right / total, "interval": [low, high]}
    balanced = balanced_accuracy(predictions, labels) if uneven(labels) else None
    record["balanced_accuracy"] = balanced
    if classes <= MOST_SQUARED:
        record["confusion"] = confusion(labels, predictions, classes).tolist()
    else:
        pairs, counts = torch.stack([labels, predictions], 1).unique(dim=0, return_counts=True)
        record["confusion_pairs"] = torch.cat([pairs, counts[:, None]], 1).tolist()
    line = f"test       {100 * right / total:.1f} % of {plural(total, 'image')} right"
    line += f" (95 %: {100 * low:.1f} to {100 * high:.1f})"
    return record, line + (f", {100 * balanced:.1f} % as the mean over the classes" if balanced is not None else "")


def _draw(
    logits: Float[Tensor, "tested classes"],
    task: Task,
    ids: Int[Tensor, " tested"],
    step: int,
    run: Run,
    console: Console,
) -> None:
    test, classes, view = task.split.test, task.images.classes, task.opened.view
    assert test is not None
    assert test.labels is not None
    labels, predictions = test.labels[ids], logits.argmax(1)
    try:
        if len(classes) <= MOST_SQUARED:
            picture = confusion_picture(confusion(labels, predictions, len(classes)), classes)
            run.picture("confusion", picture, step)
        rows, scores = worst(logits, labels, MISTAKES)
        mistakes = zip(labels[rows].tolist(), predictions[rows].tolist(), scores.tolist(), strict=True)
        captions = [(classes[true], f"→ {classes[wrong]}, {100 * score:.0f} %") for true, wrong, score in mistakes]
        seen = view.bytes(pictures(test, ids[rows], view)) if len(rows) else test.read(rows)
        run.picture("mistakes", mistakes_picture(seen, captions), step)
    except Exception as problem:
        console.warn(f"a picture could not be drawn ({type(problem).__name__}: {shown(problem)}); {RESULT} is complete")
