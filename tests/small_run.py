"""A run folder as pretraining leaves it, made in a moment: its weights are random, and not those of its first step."""

from pathlib import Path

import torch

from contrastive import recipe
from contrastive.checkpoints import Checkpoint, save_checkpoint
from contrastive.config import dump_yaml, load
from contrastive.encoder import Encoder
from contrastive.run import CONFIG
from contrastive.timm_folder import export
from contrastive.views import MEAN, STD


def small_run(folder: Path, *words: str, channels: int = 1, size: int = 28) -> Encoder:
    """Writes config.yaml, a checkpoint and the exported backbone; returns the encoder."""
    made = load(recipe.Recipe, recipe.find("quickstart"), [f"views.size={size}", *words])
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
    export(encoder.backbone, folder / "backbone", channels=channels, size=size, mean=MEAN, std=STD)
    return encoder
