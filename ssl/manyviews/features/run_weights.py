"""The weights in a run's folder: of the exported backbone, or of the newest checkpoint."""

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
"""Begins the backbone's names in the state of an encoder."""


class RunWeights(NamedTuple):
    """A backbone's weights, and what belongs to them."""

    model: str
    """What `create_backbone` makes it by, without a network."""
    channels: int
    weights: Mapping[str, Tensor]
    origin: dict[str, Any]
    """Where the weights come from, as JSON values that change when they do."""
    step: int | None = None
    """Of the checkpoint; None where they were exported."""
    encoder: Mapping[str, Tensor] | None = None
    """The whole encoder of that checkpoint: the run may have put another one in its place meanwhile."""


def read_run_weights(folder: Path, model: str) -> RunWeights:
    """Reads the exported backbone, or that of the newest checkpoint if the run has not finished; collective.

    Raises:
        ValueError: if there is neither, or a file is damaged.
    """
    exported = folder / "backbone" / WEIGHTS
    if exported.is_file():
        channels = read_folder(folder / "backbone").described.input_size[0]
        origin = {"file": exported.relative_to(folder).as_posix(), "sha256": sha256(exported)}
        model = f"{LOCAL}{folder / 'backbone'}" if model.startswith(SOURCES) else model
        return RunWeights(model, channels, read_tensors(exported), origin)
    found, _ = newest_checkpoint(folder / "checkpoints", only=("encoder",))
    if found is None:
        raise ValueError(f"{folder} has neither a backbone nor a checkpoint yet; let it run until it has saved one")
    encoder, known = found.parts["encoder"], found.metadata.get("channels")
    if type(known) is not int or known not in (1, 3):
        raise ValueError(f"{shown(folder)}: its checkpoint is damaged, for it is of {shown(known)} channels")
    weights = {key.removeprefix(PREFIX): value for key, value in encoder.items() if key.startswith(PREFIX)}
    # Of what was read: its file may have gone by now, or be another's.
    return RunWeights(model, known, weights, _origin(found.step, encoder), found.step, encoder)


def newest_encoder(
    folder: Path, layer: str, weights: Mapping[str, Tensor], file: str
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The encoder of the newest checkpoint, and where it comes from; collective.

    Raises:
        ValueError: if there is none, or it is of another backbone than these weights from `file`.
    """
    found, _ = newest_checkpoint(folder / "checkpoints", only=("encoder",))
    if found is None:
        raise ValueError(
            f"{folder} has no checkpoint, in which alone the {layer} is kept; use the backbone, or keep "
            "RUN/checkpoints beside RUN/backbone"
        )
    state = found.parts["encoder"]
    if any(not torch.equal(value, state[f"{PREFIX}{key}"]) for key, value in weights.items()):
        raise ValueError(
            f"{folder}: the newest checkpoint, of step {found.step:,}, is of other weights than "
            f"{file}, so that its {layer} does not belong to them; go on with the run to its end"
        )
    return state, _origin(found.step, state)


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 over names, types, shapes and values of weights, in hexadecimal."""
    found = hashlib.sha256()
    for name, value in weights.items():
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _origin(step: int, encoder: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"file": f"checkpoints/step-{step:09d}/encoder.safetensors", "sha256": digest_of(encoder)}
