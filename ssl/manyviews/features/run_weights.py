"""Reads the weights in a run folder: of the exported backbone, or of the newest checkpoint."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyviews.encoder.timm_format import LOCAL, SOURCES, WEIGHTS, read_folder
from manyviews.run.checkpoints import newest_checkpoint
from manyviews.system.arrays import read_tensors
from manyviews.system.files import sha256, shown

PREFIX = "backbone."
"""Prefix of the backbone's keys in the state dict of an encoder."""


class RunWeights(NamedTuple):
    """A backbone's weights and metadata."""

    model: str
    channels: int
    weights: Mapping[str, Tensor]
    origin: dict[str, Any]
    step: int | None = None
    encoder: Mapping[str, Tensor] | None = None


def read_run_weights(folder: Path, model: str) -> RunWeights:
    """Reads the exported backbone or else the newest checkpoint's; collective."""
    exported = folder / "backbone" / WEIGHTS
    if exported.is_file():
        channels = read_folder(folder / "backbone").described.input_size[0]
        origin = {"file": exported.relative_to(folder).as_posix(), "sha256": sha256(exported)}
        model = f"{LOCAL}{folder / 'backbone'}" if model.startswith(SOURCES) else model
        return RunWeights(model, channels, read_tensors(exported), origin)
    checkpoint, _ = newest_checkpoint(folder / "checkpoints", only=("encoder",))
    if checkpoint is None:
        raise ValueError(f"{folder} has neither a backbone nor a checkpoint yet; let it run until it has saved one")
    encoder, stored = checkpoint.parts["encoder"], checkpoint.metadata.get("channels")
    if type(stored) is not int or stored not in (1, 3):
        raise ValueError(f"{shown(folder)}: its checkpoint is damaged, for it has {shown(stored)} channels")
    weights = {key.removeprefix(PREFIX): value for key, value in encoder.items() if key.startswith(PREFIX)}
    # The digest is of the tensors in memory: the file may have been replaced since.
    return RunWeights(model, stored, weights, _origin(checkpoint.step, encoder), checkpoint.step, encoder)


def newest_encoder(
    folder: Path, layer: str, weights: Mapping[str, Tensor], file: str
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The encoder of the newest checkpoint, and its provenance; collective.

    Raises ValueError if there is none, or its backbone is not `weights`, which were read from `file`.
    """
    checkpoint, _ = newest_checkpoint(folder / "checkpoints", only=("encoder",))
    if checkpoint is None:
        raise ValueError(
            f"{folder} has no checkpoint, the only file with the {layer}; use the backbone, or keep "
            "RUN/checkpoints beside RUN/backbone"
        )
    state = checkpoint.parts["encoder"]
    if any(not torch.equal(value, state[f"{PREFIX}{key}"]) for key, value in weights.items()):
        raise ValueError(
            f"{folder}: the newest checkpoint, of step {checkpoint.step:,}, has other weights than {file}: its "
            f"{layer} is not theirs; resume the run and let it finish"
        )
    return state, _origin(checkpoint.step, state)


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _origin(step: int, encoder: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"file": f"checkpoints/step-{step:09d}/encoder.safetensors", "sha256": digest_of(encoder)}
