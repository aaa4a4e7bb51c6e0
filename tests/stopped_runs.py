"""Runs that a signal stops, and the bits that they leave."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyviews.run.checkpoints import Checkpoint, newest_checkpoint
from manyviews.system.launch import Stop


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Every session ends, as by a signal, after so many steps."""

    def agreed(self: Stop) -> bool:
        self.asked = getattr(self, "asked", -1) + 1
        self.signal = 15 if self.asked >= steps else None
        return self.signal is not None

    monkeypatch.setattr(Stop, "agreed", agreed)


def newest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run, of which none is damaged."""
    result, damaged = newest_checkpoint(run / "checkpoints")
    assert result is not None
    assert not damaged
    return result


def tensors(result: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint, with what the optimiser keeps."""
    named = {f"{part}.{key}": value for part, state in result.parts.items() for key, value in state.items()}
    for index, state in result.optimiser["state"].items():
        named |= {f"optimiser.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return named


def content(run: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint of a run."""
    return tensors(newest(run))


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """The names under which the bits are not the same."""
    assert one.keys() == two.keys()
    bits = [{key: value.contiguous().flatten().view(torch.uint8) for key, value in side.items()} for side in (one, two)]
    return [key for key in one if not torch.equal(bits[0][key], bits[1][key])]
