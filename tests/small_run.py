"""A run folder as pretraining leaves it, made in a moment: its weights are random, and not those of its first step."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from manyviews import recipe
from manyviews.config import dump_yaml, load
from manyviews.encoder.encoder import Encoder
from manyviews.encoder.timm_format import export
from manyviews.run.checkpoints import Checkpoint, Saver, folder_name
from manyviews.run.folder import CONFIG
from manyviews.views import standard_view


def save_checkpoint(place: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Writes a checkpoint, waits for it, and returns its folder."""
    saver = Saver(place, keep=keep, warn=lambda text: None)
    saver.begin(checkpoint)
    saver.finish()
    return place / folder_name(checkpoint.step)


def small_run(folder: Path, *args: str, channels: int = 1, size: int = 28) -> Encoder:
    """Writes config.yaml, a checkpoint and the exported backbone; returns the encoder."""
    made = load(recipe.Recipe, recipe.find("quickstart"), [f"views.size={size}", *args])
    torch.manual_seed(1)
    encoder = made.encoder.build(channels=channels, size=size).eval()
    for norm in encoder.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.5, 0.5)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(dump_yaml(made))
    optimiser = {"state": {}, "param_groups": []}
    parts = {"encoder": encoder.state_dict()}
    save_checkpoint(folder / "checkpoints", Checkpoint(7, parts, optimiser, {"channels": channels}))
    export(encoder.backbone, folder / "backbone", standard_view(made.views, channels).pretrained_cfg)
    return encoder


def photographs(folder: Path, count: int = 20, *, step: int = 12) -> Path:
    """Three classes that differ little, so that some images are mistaken."""
    for number, name in enumerate(("dark", "grey", "light")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            draw = np.random.default_rng((number, index))
            pixels = draw.normal(100 + step * number, 60, (28, 28)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder
