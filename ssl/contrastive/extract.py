"""Features of images, computed once by a backbone that has learned something, and kept as a file."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from contrastive.config import Settings
from contrastive.data import Data, Images, Split, shorthand
from contrastive.evaluate import features
from contrastive.opened import Opened, open_run
from contrastive.progress import Teller


class EncodeSettings(Settings):
    """What all have in common that encode images by a run's backbone."""

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {"data": shorthand}

    data: Data | None = None
    """The images; null: the run's own."""
    batch_size: int = Field(256, ge=1)
    """Images encoded at once."""
    workers: int = Field(2, ge=0)
    """Threads that decode images."""


class ExtractSettings(EncodeSettings):
    """What features are extracted from, and where they go."""

    output: str
    """The folder that is written; it must not exist yet."""
    split: Literal["all", "train", "test"] = "all"
    """Which of the images; all: the training images, then the held-out ones."""


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
    split = images_of(opened, settings, teller)
    chosen = {"train": split.train, "test": split.test}
    parts = {name: part for name, part in chosen.items() if part is not None and settings.split in ("all", name)}
    if not parts:
        raise ValueError(f"split={settings.split}: these images have no held-out part; use split=all")
    backbone = opened.backbone()
    rows = torch.cat([encode(opened, backbone, part, settings) for part in parts.values()])
    labels = [part.labels if part.labels is not None else torch.full((len(part),), -1) for part in parts.values()]
    images = [[name, index, part.names[index]] for name, part in parts.items() for index in range(len(part))]
    assert len(rows) == len(images), f"{len(rows)} features for {len(images)} images"
    manifest = {
        "run": str(folder.resolve()),
        "weights": opened.origin,
        "input": opened.transform,
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


def images_of(opened: Opened, settings: EncodeSettings, teller: Teller) -> Split:
    """The images that were asked for, as the backbone can see them.

    Raises:
        ValueError: if they cannot be read, or have other channels than the backbone takes.
    """
    with teller.bar():
        split = (settings.data or opened.recipe.data).build(workers=settings.workers, report=teller.report)
    if split.train.channels != opened.channels:
        raise ValueError(
            f"the images have {split.train.channels} channels, but the run has learned from {opened.channels}: "
            f"for a folder, data.channels={opened.channels} reads them so"
        )
    return split


def encode(opened: Opened, backbone: nn.Module, images: Images, settings: EncodeSettings) -> Tensor:
    """The features of all images by a backbone of the opened run's kind: float32 [images, width], on the CPU."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    backbone = backbone.to(device)
    if opened.recipe.train.channels_last:
        backbone = backbone.to(memory_format=torch.channels_last)
    size, workers = settings.batch_size, settings.workers
    return features.extract(backbone, images, prepare=opened.prepare, device=device, batch_size=size, workers=workers)
