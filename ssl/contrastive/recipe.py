"""The whole typed tree: every component's settings, composed; and the recipes that `configs/` holds."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from contrastive.config import Settings
from contrastive.data import Data, Sample, shorthand
from contrastive.encoder import EncoderSettings
from contrastive.objectives import InBatch, Objective
from contrastive.optim import OptimSettings
from contrastive.views import ViewsSettings

QUICKSTART = "quickstart"


class TrainSettings(Settings):
    """How long, how much at once, and how often something is written."""

    epochs: float = Field(100, gt=0)
    """Passes over the images; a part of one is allowed."""
    minutes: float | None = Field(None, gt=0)
    """Wall-clock minutes of training, in place of epochs; the schedule then follows the clock."""
    batch_size: int = Field(256, ge=2)
    """Images per step over all processes together."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the encoder; auto: bf16 where the device is built for it. Objectives are always fp32."""
    channels_last: bool = True
    """Memory layout of the encoder: channels last is the faster one for convolutions on most devices."""
    compile: bool = False
    """Compile the encoder with torch.compile: a slow first step, then faster ones."""
    workers: int = Field(2, ge=0)
    """Processes or threads that decode images, for each process."""
    threads: int | None = Field(None, ge=1)
    """Threads of each process on the CPU; null: the cores divided among the processes."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of metrics."""
    monitor: int = Field(4, ge=0)
    """How many times in the run kNN is measured on held-out labels, where there are labels; 0: never."""
    save_minutes: float = Field(5, gt=0)
    """Minutes between two checkpoints."""
    keep: int = Field(2, ge=1)
    """Checkpoints that stay; the older ones go after a new one is safe."""
    preview: int = Field(8, ge=0)
    """Images in the picture of originals and their views that is made before the first step; 0: none."""


class Recipe(Settings):
    """One run, from images to backbone."""

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {"data": shorthand}

    output: str | None = None
    """The run folder; by default runs/ and the recipe's name."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Weights, order, views and noise all follow from it."""
    data: Data = Sample()
    """The images; data=/some/folder is short for data.name=folder data.path=/some/folder."""
    views: ViewsSettings = ViewsSettings()
    encoder: EncoderSettings = EncoderSettings()
    objective: Objective = InBatch()
    """What is learned from."""
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()


def folder() -> Path:
    """Where the recipes lie: beside the package in a wheel, at the root in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"


def names() -> list[str]:
    """The names of the recipes, in order."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def find(recipe: str) -> Path:
    """The file of a recipe, given by its name in `configs/` or by its path.

    Raises:
        ValueError: naming the recipes that exist and the nearest one.
    """
    named = folder() / f"{recipe}.yaml"
    if named.is_file():
        return named
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    near = difflib.get_close_matches(recipe, names(), 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{recipe!r} is neither a recipe ({', '.join(names())}) nor a file that exists{hint}")
