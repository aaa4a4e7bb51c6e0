"""A run is measured: its features are compared with baselines."""

import difflib
import json
from pathlib import Path
from typing import Annotated, get_args

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from contrastive.data import Images, of_classes
from contrastive.distances import LinearMetric
from contrastive.evaluate import features
from contrastive.evaluate.compare import check, compare, takes_training
from contrastive.evaluate.metric import Cosine, Metric
from contrastive.evaluate.protocol import Gallery, ProtocolSettings, Task
from contrastive.evaluate.scores import Evaluation
from contrastive.extract import EncodeSettings, encode, images_of
from contrastive.opened import open_run
from contrastive.progress import Teller
from contrastive.recipe import Recipe

FOREIGN = "of other data than the run's"


def _listed(value: object) -> object:
    """Several words as a person types them: one, a,b or [a, b]."""
    if isinstance(value, str):
        return [word.strip() for word in value.strip("[]").split(",")]
    return [value] if isinstance(value, int) else value


def _tasks(value: object) -> object:
    words = _listed(value)
    known = list(get_args(Task))
    for word in words if isinstance(words, list | tuple) else ():
        if word not in known:
            near = difflib.get_close_matches(str(word), known, 1, 0.5)
            raise ValueError(f"{word!r} is none of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else ""))
    return words


class EvaluateSettings(EncodeSettings):
    """What a run is measured on, and how."""

    baselines: bool = True
    """Measure random weights and raw pixels too."""
    tasks: Annotated[tuple[Task, ...] | None, BeforeValidator(_tasks)] = Field(None, min_length=1)
    """What is measured, one or several with commas; null: knn, linear, and retrieval if the run has unseen classes."""
    classes: Annotated[tuple[int | str, ...] | None, BeforeValidator(_listed)] = Field(None, min_length=1)
    """Classes, by name or number, whose test images are looked up, clustered and verified among each other; null: those
    that the run left out of training (its unseen), or else all."""
    metric: Metric = Cosine()
    """The distance by which neighbours are found. All but cosine and euclidean are fitted on labelled training images,
    without those of the classes named or unseen, for each kind of features, and kept in RUN/metrics."""
    protocol: ProtocolSettings = ProtocolSettings()


def evaluate(folder: Path, settings: EvaluateSettings) -> Evaluation:
    """Measures a run's features beside random weights and raw pixels; prints a table and writes evaluation.json.

    Raises:
        ValueError: if the run cannot be read, or the images have no labels or no held-out part.
    """
    teller, opened = Teller(), open_run(folder)
    train, test, _ = images_of(opened, settings, teller)
    if train.labels is None or test is None or test.labels is None:
        raise ValueError(
            "measuring takes labels and held-out images, and there are none: give data=/a/folder that has one "
            "sub-folder per class"
        )
    tasks = settings.tasks or (("knn", "linear", "retrieval") if opened.recipe.unseen else ("knn", "linear"))
    gallery = _gallery(train, test, opened.recipe, settings)
    check(tasks, gallery, train.labels, test.labels, settings.protocol, settings.metric)
    encoded = takes_training(tasks, settings.metric)
    backbones = {"learned": opened.backbone()}
    if settings.baselines:
        backbones["random weights"] = opened.untrained()
    kinds: dict[str, tuple[Tensor | None, Tensor]] = {}
    for name, backbone in backbones.items():
        teller.say(f"encoding {len(test) + len(train) * encoded:,} images: {name}")
        kinds[name] = (
            encode(opened, backbone, train, settings) if encoded else None,
            encode(opened, backbone, test, settings),
        )
    if settings.baselines:
        size = opened.size
        kinds["raw pixels"] = features.raw_pixels(train, size) if encoded else None, features.raw_pixels(test, size)

    def keep(kind: str, fitted: LinearMetric) -> None:
        file = folder / "metrics" / settings.metric.name / f"{kind.replace(' ', '_')}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        fitted.save(file)

    with teller.bar():
        evaluation = compare(
            kinds,
            train.labels,
            test.labels,
            settings.protocol,
            tasks=tasks,
            gallery=gallery,
            metric=settings.metric,
            keep=keep,
            report=teller.say,
            progress=teller.report,
        )
    for table in evaluation.tables():
        teller.console.print(table)
    teller.say(evaluation.verdict())
    report = {"weights": opened.origin, "images": [train.fingerprint, test.fingerprint], **evaluation.to_json()}
    report["gallery"]["names"] = [train.classes[number] for number in report["gallery"]["classes"]]
    (folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    return evaluation


def _gallery(train: Images, test: Images, recipe: Recipe, settings: EvaluateSettings) -> Gallery:
    """The test images of the classes asked for, or of those that the run has never seen, or of all."""
    others = torch.arange(len(train))
    own = settings.data is None or settings.data == recipe.data
    asked = settings.classes or (recipe.unseen if own else ())
    if not asked:
        return Gallery(torch.arange(len(test)), "seen in training" if own else FOREIGN, others)
    named = of_classes(train, asked)
    unseen = of_classes(train, recipe.unseen) if own and recipe.unseen else others[:0]
    new = torch.isin(named, unseen)
    origin = "never seen in training" if new.all() else f"{'some of them ' if new.any() else ''}seen in training"
    return Gallery(of_classes(test, asked), origin if own else FOREIGN, others[~torch.isin(others, named)])
