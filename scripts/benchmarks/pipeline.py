"""The whole training loop beside the encoder's own forward and backward pass, and beside lightly's SimCLR loop."""

import argparse
import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from manyviews.config import load
from manyviews.data import InMemory, Order, Sample
from manyviews.recipe import QUICKSTART, Recipe, folder
from manyviews.run.checkpoints import Checkpoint, Saver
from manyviews.run.folder import Run
from manyviews.system.console import Console
from manyviews.system.launch import Stop, bf16_pays, start
from manyviews.train.components import Components, build
from manyviews.train.pretrain import train
from manyviews.train.session import Session
from manyviews.views import MEAN, STD


class Case(NamedTuple):
    """What is trained at one size; the steps of one timed repetition take a few seconds."""

    encoder: str
    channels: int
    batch_size: int
    steps: int
    recipe: Path | None
    words: tuple[str, ...] = ()


CASES = {
    28: Case("light_resnet", 1, 256, 30, folder() / f"{QUICKSTART}.yaml"),
    96: Case("resnet18", 3, 64, 4, None),
}
NOTES = (
    "images/s: median (smallest-largest); the cases take turns. Two views per image.",
    "encoder alone: its forward and backward pass on views that lie in memory; no views, loss or optimiser.",
    "manyviews: the loop of scripts/pretrain.py itself: reading, views, encoder, loss, optimiser and metrics.",
    "lightly: its SimCLRTransform (with its advice for small images below 64 px) on decoded images, a DataLoader with",
    "2 workers that stay alive, NTXentLoss, the same encoder, optimiser and batch, in the faster of fp32 and bf16.",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes to measure."""
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=tuple(CASES), choices=tuple(CASES), metavar="PX", help="28, 96 (both)"
    )


def run(options: argparse.Namespace) -> harness.Report:
    """Measures every size."""
    rows = [row for size in options.sizes for row in _measure(size, CASES[size], options.repetitions)]
    return harness.Report(
        title="Pretraining, images per second", rows=rows, notes=NOTES, packages=("lightly", "torchvision", "kornia")
    )


def _measure(size: int, case: Case, repetitions: int) -> list[dict[str, harness.Value]]:
    words = [f"encoder.name={case.encoder}", f"train.batch_size={case.batch_size}", "train.epochs=1", "train.monitor=0"]
    recipe = load(Recipe, case.recipe, words)
    accelerator = start(case.batch_size, recipe.train.precision)
    images = _images(size, case.channels, case.batch_size * case.steps)
    components = build(recipe, accelerator, images)
    with tempfile.TemporaryDirectory() as scratch:
        log = Run(Path(scratch))
        works: dict[str, Callable[[], object]] = {
            "encoder alone": partial(_passes, components, images, case.steps),
            "manyviews": partial(_loop, components, images, log),
        }
        missing = ""
        try:
            works["lightly"] = _fastest(lightly(recipe, components.encoder, images, size))
        except harness.RivalMissingError as problem:
            missing = str(problem)
        times = harness.seconds(works, repetitions)
        log.close()
    alone, ours = times["encoder alone"].median, times["manyviews"].median
    rows: list[dict[str, harness.Value]] = []
    for name, spread in times.items():
        row: dict[str, harness.Value] = {
            "loop": name,
            "pixels": size,
            "encoder": case.encoder,
            "batch": case.batch_size,
        }
        row["images/s"] = _rate(spread, len(images))
        row["of the encoder alone"] = alone / spread.median
        row["ours over it"] = spread.median / ours
        rows.append(row)
    if missing:
        rows.append({"loop": "lightly", "pixels": size, "encoder": missing})
    return rows


class Unsaved(Saver):
    """Writes no checkpoints: those come once in minutes, not once in steps."""

    def begin(self, checkpoint: Checkpoint, *, before: Callable[[], object] | None = None) -> None:
        """Writes nothing."""


def _loop(components: Components, images: InMemory, log: Run) -> None:
    order = Order(len(images), components.recipe.train.batch_size, components.recipe.seed)
    with Stop() as stop:
        train(components, images, order, None, Session(log, Unsaved(log.folder), Console(quiet=True), stop))


def _passes(components: Components, images: InMemory, steps: int) -> None:
    ids = torch.arange(components.recipe.train.batch_size)
    device = components.accelerator.device
    views = components.views(images.read(ids).to(device), ids.to(device), 0)
    components.forward.train()
    for _ in range(steps):
        embeddings = components.forward(*views).embeddings
        embeddings.backward(torch.ones_like(embeddings))
        components.optimiser.zero_grad(set_to_none=True)


def lightly(recipe: Recipe, encoder: nn.Module, images: InMemory, size: int) -> Mapping[str, Callable[[], object]]:
    """Lightly's loop as its documentation writes it, in fp32 and, where the device is made for it, in bf16."""
    transform = harness.rival("lightly.transforms", "SimCLRTransform")(
        input_size=size,
        cj_strength=1.0 if size >= 64 else 0.5,
        gaussian_blur=0.5 if size >= 64 else 0.0,
        normalize={"mean": [MEAN] * images.channels, "std": [STD] * images.channels},
    )
    criterion = harness.rival("lightly.loss", "NTXentLoss")(temperature=0.15)
    device = next(encoder.parameters()).device
    loader = DataLoader(
        Pictures(images, transform),
        batch_size=recipe.train.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    encoder = copy.deepcopy(encoder).train()
    optimiser = recipe.optim.build(encoder, batch_size=recipe.train.batch_size)

    def loop(precision: torch.dtype | None) -> None:
        for views in loader:
            first, second = (view.to(device, non_blocking=True) for view in views)
            with torch.autocast(device.type, precision, enabled=precision is not None):
                z0, z1 = (encoder(view[None]).embeddings[0] for view in (first, second))
            loss = criterion(z0.float(), z1.float())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    works: dict[str, Callable[[], object]] = {"fp32": partial(loop, None)}
    if bf16_pays(device.type == "cpu"):
        works["bf16"] = partial(loop, torch.bfloat16)
    return works


class Pictures(Dataset[Any]):
    """Decoded PIL images, as lightly's transform wants them; a rival that decoded files would only be slower."""

    def __init__(self, images: InMemory, transform: Callable[[Image.Image], Any]) -> None:
        self.pictures = [Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()) for pixels in images.pixels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.pictures[index])


def _images(size: int, channels: int, num: int) -> InMemory:
    """The bundled images at another size, over and over."""
    sample = Sample().build(workers=0, report=None).train
    ids = torch.tensor(list(itertools.islice(itertools.cycle(range(len(sample))), num)))
    pixels = sample.read(ids)
    if size != sample.size:
        pixels = F.interpolate(pixels.float(), (size, size), mode="bilinear").round().byte()
    names = [str(index) for index in range(num)]
    return InMemory(pixels.expand(-1, channels, -1, -1).contiguous(), names, None, (), "benchmark")


def _fastest(works: Mapping[str, Callable[[], object]]) -> Callable[[], object]:
    times = harness.seconds(works, 1)
    return works[min(times, key=lambda name: times[name].median)]


def _rate(seconds: harness.Spread, num: int) -> harness.Spread:
    return harness.Spread(num / seconds.median, num / seconds.largest, num / seconds.smallest, seconds.repetitions)
