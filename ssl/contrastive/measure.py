"""What is done with a run when it has ended: its features are compared with baselines, and extracted."""

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from safetensors.torch import load_file
from torch import Tensor, nn

from contrastive.checkpoints import newest_checkpoint
from contrastive.config import Settings, load
from contrastive.data import Data, Images, Split, of_classes, shorthand
from contrastive.distances import LinearMetric
from contrastive.evaluate import features
from contrastive.evaluate.compare import check, compare, takes_training
from contrastive.evaluate.metric import Cosine, Metric
from contrastive.evaluate.protocol import Gallery, ProtocolSettings, Task
from contrastive.evaluate.scores import Evaluation
from contrastive.progress import Teller
from contrastive.recipe import Recipe
from contrastive.run import CONFIG
from contrastive.views import MEAN, STD, plain

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


class MeasureSettings(Settings):
    """What evaluation and extraction have in common."""

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {"data": shorthand}

    data: Data | None = None
    """The images; null: the run's own."""
    batch_size: int = Field(256, ge=1)
    """Images encoded at once."""
    workers: int = Field(2, ge=0)
    """Threads that decode images."""


class EvaluateSettings(MeasureSettings):
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


class ExtractSettings(MeasureSettings):
    """What features are extracted from, and where they go."""

    output: str
    """The folder that is written; it must not exist yet."""
    split: Literal["all", "train", "test"] = "all"
    """Which of the images; all: the training images, then the held-out ones."""


class Opened(NamedTuple):
    """A run, read back."""

    recipe: Recipe
    source: Path
    """The file that the weights come from."""
    weights: Mapping[str, Tensor]
    """The backbone's."""
    channels: int
    """What the backbone sees: 1 for grey, 3 for colour."""


def open_run(folder: Path) -> Opened:
    """Reads a run's recipe and its backbone, or the newest checkpoint's if the run has not finished.

    Raises:
        ValueError: if this is no run folder, or one without any weights yet.
    """
    if not (folder / CONFIG).is_file():
        near = sorted(str(path.parent) for path in folder.parent.glob(f"*/{CONFIG}")) if folder.parent.is_dir() else []
        hint = f"; there are {', '.join(near)}" if near else ""
        raise ValueError(f"{folder} is no run folder: it holds no {CONFIG}{hint}")
    recipe, exported = load(Recipe, folder / CONFIG), folder / "backbone" / "model.safetensors"
    if exported.is_file():
        description = json.loads((folder / "backbone" / "config.json").read_text())["pretrained_cfg"]
        return Opened(recipe, exported, load_file(exported), description["input_size"][0])
    found, _ = newest_checkpoint(folder / "checkpoints", only=("encoder",))
    if found is None:
        raise ValueError(f"{folder} has neither a backbone nor a checkpoint yet; let it run until it has saved one")
    encoder, prefix = found.parts["encoder"], "backbone."
    weights = {key.removeprefix(prefix): value for key, value in encoder.items() if key.startswith(prefix)}
    source = folder / "checkpoints" / f"step-{found.step:09d}" / "encoder.safetensors"
    return Opened(recipe, source, weights, found.facts["channels"])


def evaluate(folder: Path, settings: EvaluateSettings) -> Evaluation:
    """Measures a run's features beside random weights and raw pixels; prints a table and writes evaluation.json.

    Raises:
        ValueError: if the run cannot be read, or the images have no labels or no held-out part.
    """
    teller, opened = Teller(), open_run(folder)
    train, test, _ = _images(opened, settings, teller)
    if train.labels is None or test is None or test.labels is None:
        raise ValueError(
            "measuring takes labels and held-out images, and there are none: give data=/a/folder that has one "
            "sub-folder per class"
        )
    tasks = settings.tasks or (("knn", "linear", "retrieval") if opened.recipe.unseen else ("knn", "linear"))
    gallery = _gallery(train, test, opened.recipe, settings)
    check(tasks, gallery, train.labels, test.labels, settings.protocol, settings.metric)
    encoded = takes_training(tasks, settings.metric)
    backbones = {"learned": _backbone(opened.recipe, train.channels)}
    backbones["learned"].load_state_dict(dict(opened.weights))
    if settings.baselines:
        backbones["random weights"] = _backbone(opened.recipe, train.channels)
    kinds: dict[str, tuple[Tensor | None, Tensor]] = {}
    for name, backbone in backbones.items():
        teller.say(f"encoding {len(test) + len(train) * encoded:,} images: {name}")
        kinds[name] = (
            _encode(backbone, train, opened.recipe, settings) if encoded else None,
            _encode(backbone, test, opened.recipe, settings),
        )
    if settings.baselines:
        size = _size(opened.recipe)
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
    source = {"weights": opened.source.relative_to(folder).as_posix(), "sha256": _digest(opened.source)}
    report = {**source, "images": [train.fingerprint, test.fingerprint], **evaluation.to_json()}
    report["gallery"]["names"] = [train.classes[number] for number in report["gallery"]["classes"]]
    (folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    return evaluation


def extract(folder: Path, settings: ExtractSettings) -> Path:
    """Writes the features of images by a run's backbone: features.npy, labels.npy where there are any, manifest.json.

    Row i of features.npy, float32, belongs to the i-th entry of the manifest's `images`, which have a split, an id and
    a name.

    Raises:
        ValueError: if the run cannot be read, the output exists, or the split is empty.
    """
    output = Path(settings.output).expanduser()
    if output.exists():
        raise ValueError(f"output={output} exists already; name a folder that does not")
    teller, opened = Teller(), open_run(folder)
    split = _images(opened, settings, teller)
    chosen = {"train": split.train, "test": split.test}
    parts = {name: part for name, part in chosen.items() if part is not None and settings.split in ("all", name)}
    if not parts:
        raise ValueError(f"split={settings.split}: these images have no held-out part; use split=all")
    backbone = _backbone(opened.recipe, split.train.channels)
    backbone.load_state_dict(dict(opened.weights))
    rows = torch.cat([_encode(backbone, part, opened.recipe, settings) for part in parts.values()])
    labels = [part.labels if part.labels is not None else torch.full((len(part),), -1) for part in parts.values()]
    images = [[name, index, part.names[index]] for name, part in parts.items() for index in range(len(part))]
    assert len(rows) == len(images), f"{len(rows)} features for {len(images)} images"
    manifest = {
        "run": str(folder.resolve()),
        "weights": {"file": opened.source.relative_to(folder).as_posix(), "sha256": _digest(opened.source)},
        "input": {"channels": split.train.channels, "size": _size(opened.recipe), "mean": MEAN, "std": STD},
        "fingerprints": {name: part.fingerprint for name, part in parts.items()},
        "classes": list(split.train.classes),
        "unreadable": [list(entry) for entry in split.unreadable],
        "columns": ["split", "id", "name"],
        "images": images,
    }
    output.mkdir(parents=True)
    np.save(output / "features.npy", rows.numpy())
    if any(part.labels is not None for part in parts.values()):
        np.save(output / "labels.npy", torch.cat(labels).numpy())
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    teller.say(f"{len(rows):,} × {rows.shape[1]} features: {output / 'features.npy'}")
    return output


def _images(opened: Opened, settings: MeasureSettings, teller: Teller) -> Split:
    with teller.bar():
        split = (settings.data or opened.recipe.data).build(workers=settings.workers, report=teller.report)
    if split.train.channels != opened.channels:
        raise ValueError(
            f"the images have {split.train.channels} channels, but the run has learned from {opened.channels}: "
            f"for a folder, data.channels={opened.channels} reads them so"
        )
    return split


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


def _backbone(recipe: Recipe, channels: int) -> nn.Module:
    """The recipe's backbone as it was before its first step."""
    torch.manual_seed(recipe.seed)
    return recipe.encoder.build(channels=channels, size=_size(recipe)).backbone


def _size(recipe: Recipe) -> int:
    assert recipe.views.size is not None, "a run's configuration is resolved"
    return recipe.views.size


def _encode(backbone: nn.Module, images: Images, recipe: Recipe, settings: MeasureSettings) -> Tensor:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    backbone = backbone.to(device)
    if recipe.train.channels_last:
        backbone = backbone.to(memory_format=torch.channels_last)
    prepare = partial(plain, size=_size(recipe))
    size, workers = settings.batch_size, settings.workers
    return features.extract(backbone, images, prepare=prepare, device=device, batch_size=size, workers=workers)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
