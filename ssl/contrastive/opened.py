"""A backbone that has learned something, read back with what it takes to encode images by it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from contrastive.checkpoints import newest_checkpoint
from contrastive.config import load
from contrastive.recipe import Recipe
from contrastive.run import CONFIG
from contrastive.views import MEAN, STD, plain


@dataclass(frozen=True)
class Opened:
    """A run, read back."""

    folder: Path
    recipe: Recipe
    source: Path
    """The file that the weights come from."""
    weights: Mapping[str, Tensor]
    """The backbone's."""
    channels: int
    """What the backbone sees: 1 for grey, 3 for colour."""

    @property
    def size(self) -> int:
        """Side of the square that the backbone sees, in pixels."""
        assert self.recipe.views.size is not None, "a run's configuration is resolved"
        return self.recipe.views.size

    @property
    def origin(self) -> dict[str, Any]:
        """Where the weights come from, as JSON values that change when they do."""
        return {"file": self.source.relative_to(self.folder).as_posix(), "sha256": digest(self.source)}

    @property
    def transform(self) -> dict[str, Any]:
        """What is done to an image before it is encoded, as JSON values."""
        return {"channels": self.channels, "size": self.size, "mean": MEAN, "std": STD}

    def prepare(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels _ _"]:
        """The backbone's input, on the images' device."""
        return plain(images, self.size)

    def backbone(self) -> nn.Module:
        """The backbone with its learned weights."""
        backbone = self.untrained()
        backbone.load_state_dict(dict(self.weights))
        return backbone

    def untrained(self) -> nn.Module:
        """The backbone as it was before its first step."""
        torch.manual_seed(self.recipe.seed)
        return self.recipe.encoder.build(channels=self.channels, size=self.size).backbone


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
        return Opened(folder, recipe, exported, load_file(exported), description["input_size"][0])
    found, _ = newest_checkpoint(folder / "checkpoints", only=("encoder",))
    if found is None:
        raise ValueError(f"{folder} has neither a backbone nor a checkpoint yet; let it run until it has saved one")
    encoder, prefix = found.parts["encoder"], "backbone."
    weights = {key.removeprefix(prefix): value for key, value in encoder.items() if key.startswith(prefix)}
    source = folder / "checkpoints" / f"step-{found.step:09d}" / "encoder.safetensors"
    return Opened(folder, recipe, source, weights, found.facts["channels"])


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
