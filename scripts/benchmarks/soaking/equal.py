"""Whether two runs have left the same: tensors and metrics bit for bit, and TensorBoard's curves point for point."""

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from manyviews.run.checkpoints import newest_checkpoint
from manyviews.run.folder import read_metrics

CLOCKED = {"images_per_second", "seconds"}
"""What depends on the time of day."""


def differences(one: Path, two: Path) -> list[str]:
    """What is not the same, by name."""
    found = ["metrics.jsonl"] if _lines(one) != _lines(two) else []
    found += ["TensorBoard"] if _points(one) != _points(two) else []
    sides = _tensors(one), _tensors(two)
    found += sorted(sides[0].keys() ^ sides[1].keys())
    for name in sorted(sides[0].keys() & sides[1].keys()):
        bits = [side[name].contiguous().flatten().view(torch.uint8) for side in sides]
        if not torch.equal(*bits):
            found.append(name)
    return found


def _tensors(run: Path) -> dict[str, Tensor]:
    found, _ = newest_checkpoint(run / "checkpoints")
    if found is None:
        return {}
    named = {f"{part}.{key}": value for part, state in found.parts.items() for key, value in state.items()}
    for index, state in found.optimiser["state"].items():
        named |= {f"optimiser.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    backbone = load_file(run / "backbone" / "model.safetensors")
    return named | {f"exported.{key}": value for key, value in backbone.items()}


def _lines(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in read_metrics(run)]


def _points(run: Path) -> list[tuple[str, int, object]]:
    """What TensorBoard shows."""
    # It tells of each restart.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    shown = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    shown.Reload()
    tags = shown.Tags()
    found = [(tag, seen.step, repr(seen.value)) for tag in tags["scalars"] for seen in shown.Scalars(tag)]
    found += [(tag, seen.step, seen.histogram_value) for tag in tags["histograms"] for seen in shown.Histograms(tag)]
    return [point for point in found if point[0] not in CLOCKED]
