"""Stage 3: a run that is interrupted and resumed ends with the bits of one that was not, alone and under a launcher."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

import manyviews
from gpu_checks.measure import Row, Setup
from manyviews.config import keys
from manyviews.recipe import Recipe

RECIPES = ("moco", "supervised", "facenet_instances", "margin_distance_weighted", "arcface", "quickstart")
"""The first has a twin and a queue; the others add up gradients by index in different ways."""
STEPS, CUT = 8, 4


def rows(setup: Setup) -> Iterator[Row]:
    """Trains each recipe whole and in two parts; the first one's second part again under a launcher's environment."""
    shutil.rmtree(setup.folder, ignore_errors=True)
    note = "train.deterministic=true" if deterministic() else "without train.deterministic, which this version lacks"
    for number, name in enumerate(setup.pick(RECIPES, RECIPES[:1])):
        whole, parts, launched = (setup.folder / f"{name}-{part}" for part in ("whole", "parts", "launched"))
        try:
            train(name, whole, small=setup.small)
            if not train(name, parts, small=setup.small, cut=True):
                raise RuntimeError(f"{name} was not interrupted")
            if number == 0:
                shutil.copytree(parts, launched)
            train(name, parts, small=setup.small)
        finally:
            # The other stages are measured as runs are by default.
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = False
        yield compared(f"resume of {name}", whole, parts, note)
        if number == 0:
            command = [sys.executable, "-m", "gpu_checks.resume", name, str(launched), str(int(setup.small))]
            subprocess.run(command, env={**os.environ, **launch()}, check=True, stdout=sys.stderr)
            yield compared(f"resume of {name} under a launcher", whole, launched, note)


def train(name: str, folder: Path, *, small: bool, cut: bool = False) -> bool:
    """Trains a recipe, or what is left of it; with `cut` it is interrupted. Returns whether it was."""
    batch, steps, last = (16, 2, 1) if small else (100, STEPS, CUT)
    settings: dict[str, object] = {"batch_size": batch, "epochs": steps * batch / 10_000, "monitor": 0, "preview": 0}
    settings |= {"log_every": 1, "threads": torch.get_num_threads()} | (
        {"deterministic": True} if deterministic() else {}
    )
    views = {"size": 12} if small else {}

    def interrupt(values: Mapping[str, float]) -> None:
        if cut and values["step"] >= last:
            signal.raise_signal(signal.SIGINT)

    try:
        resume = folder.exists()
        manyviews.pretrain(name, output=str(folder), train=settings, views=views, resume=resume, on_metrics=interrupt)
    except KeyboardInterrupt:
        return True
    return False


def deterministic() -> bool:
    """Whether this version has the switch."""
    return any(entry.key == "train.deterministic" for entry in keys(Recipe))


def compared(what: str, whole: Path, parts: Path, note: str) -> Row:
    """Compares the weights of two runs, file by file: the exported backbone and the last checkpoint."""
    files = [file.relative_to(whole) for file in sorted(whole.rglob("*.safetensors"))]
    other = [str(file) for file in files if (whole / file).read_bytes() != (parts / file).read_bytes()]
    same = bool(files) and not other
    return Row(what, "same bits" if same else "other bits", holds=same, check=True, note=", ".join([note, *other]))


def launch() -> Mapping[str, str]:
    """The environment that a launcher gives its only process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    return {name: json.dumps(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), small=sys.argv[3] == "1")
