"""What a checkpoint holds, how much room it takes, and how processes agree on what went wrong with one."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyviews.system.files import shown

OVERHEAD = 1 << 16
"""Bytes of a file's header, of the manifest and of the disk's blocks, for each part: more than they are."""


class Checkpoint(NamedTuple):
    """Everything that a run needs to go on as if it had never stopped, as one process holds it.

    `parts` are state dictionaries by the name of their owner (encoder, objective, …); `optimiser` is an optimiser's
    state dictionary; `metadata` holds JSON values (seconds spent, fingerprint of the data, …), among them `score` where
    the step was measured: the highest one is the best. `shards` names the tensors of which each process holds
    `distributed.share(length)` of the first axis, with their length over all processes: "objective.rows", or
    "optimiser.3.momentum_buffer" for what the optimiser keeps of parameter 3.
    """

    step: int
    parts: Mapping[str, Mapping[str, Tensor]]
    optimiser: Mapping[str, Any]
    metadata: Mapping[str, Any]
    shards: Mapping[str, int] = {}


def optimiser_shards(optimiser: Any, sharded: Sequence[tuple[nn.Parameter, int]]) -> dict[str, int]:
    """The names of what an optimiser keeps row by row of sharded parameters, for `Checkpoint.shards`.

    Args:
        optimiser: a torch optimiser, or Accelerate's wrapper of one.
        sharded: the parameters of which each process holds a part, with their length over all processes.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    lengths = {id(parameter): length for parameter, length in sharded}
    found: dict[str, int] = {}
    for index, state in optimiser.state_dict()["state"].items():
        parameter = parameters[index]
        if id(parameter) not in lengths:
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[f"optimiser.{index}.{key}"] = lengths[id(parameter)]
    return found


def restore_optimiser(optimiser: Any, kept: Mapping[str, Any]) -> None:
    """Gives an optimiser the state that a checkpoint has of it, each tensor laid out as its parameter is.

    Fused optimisers walk through the memory of both at once: a parameter in channels last, with averages that are not,
    would get those of other weights.

    Args:
        optimiser: a torch optimiser, or Accelerate's wrapper of one.
        kept: `Checkpoint.optimiser`.

    Raises:
        ValueError: if it is of other groups or other parameters.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    # Its own, for rates and decays follow from the recipe, and a checkpoint may be a stranger's.
    groups = optimiser.state_dict()["param_groups"]
    if [group.get("params") for group in kept["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("the optimiser has other groups of parameters than the checkpoint")
    states: dict[int, dict[str, Any]] = {}
    for index, state in kept["state"].items():
        if not 0 <= index < len(parameters):
            raise ValueError(
                f"the optimiser has {len(parameters):,} parameters, and the checkpoint one of number {index:,}"
            )
        states[index], parameter = dict(state), parameters[index]
        for key, value in state.items():
            if not isinstance(value, Tensor | int | float):
                raise ValueError(f"the optimiser's {shown(key)} of parameter {index} is no number in the checkpoint")
            if isinstance(value, Tensor) and value.ndim:
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"the optimiser's {key} of parameter {index} has the shape {tuple(value.shape)} in the "
                        f"checkpoint, and the parameter {tuple(parameter.shape)}"
                    )
                states[index][key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    optimiser.load_state_dict({"state": states, "param_groups": groups})


def tensors_of(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by part and name, those of the optimiser as "3.exp_avg" in the part "optimiser"."""
    states = checkpoint.optimiser["state"].items()
    kept = {f"{index}.{key}": value for index, state in states for key, value in state.items()}
    found = {part: dict(state) for part, state in checkpoint.parts.items()}
    found["optimiser"] = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
    return found


def room_needed(checkpoint: Checkpoint, *, keep: int) -> int:
    """Bytes on the disk, of all processes together, for the checkpoints that stay and the one that is being written.

    Args:
        checkpoint: one as the run writes it; taken after a step, for before it an optimiser keeps nothing yet.
        keep: how many stay.
    """
    total = 0
    for part, state in tensors_of(checkpoint).items():
        total += OVERHEAD
        for key, value in state.items():
            length = checkpoint.shards.get(f"{part}.{key}")
            total += value.nbytes if length is None else length * value[:1].nbytes if len(value) else 0
    return (keep + 1) * total


def sync(path: Path) -> None:
    """Returns once a file, or a folder's list of files, is on the disk."""
    with suppress(PermissionError):  # Windows opens no folder
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
