"""Extraction of features into files beside the backbone's own inference on tensors in memory."""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks import harness
from manyviews.config import load
from manyviews.data import InMemory
from manyviews.data.images import Pictures
from manyviews.encoder.backbone import create_backbone
from manyviews.features import encoding, store
from manyviews.features.encoding import EncodeSettings, Precision
from manyviews.features.extract import ExtractSettings
from manyviews.features.layers import BACKBONE, Layers, OneLayer, widths_of
from manyviews.features.store_rows import Part, fill
from manyviews.system.console import Console
from manyviews.system.launch import bf16_pays, start
from manyviews.views import StandardView


class Case(NamedTuple):
    """What is encoded at one size; one timed repetition takes a few seconds."""

    backbone: str
    channels: int
    images: int
    data: str


CASES = {28: Case("light_resnet", 1, 60_000, "fashion_mnist"), 96: Case("resnet18", 3, 768, "sample")}
BATCH = 256
NOTES = (
    "images/s: median (smallest-largest); the cases take turns, in batches of 256.",
    "backbone alone: its pass in evaluation mode over float tensors that lie in memory; nothing is read or kept.",
    "to files: the loop of scripts/extract.py itself, from uint8 images in memory to synced files on the disk.",
    "in memory: the same images to one tensor, as during pretraining.",
    "bf16 where the device is built for it; the files are float32 in either case.",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes, and where the images of 28 pixels come from."""
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=tuple(CASES), choices=tuple(CASES), metavar="PX", help="28, 96 (both)"
    )
    parser.add_argument("--data", help="images of 28 pixels (fashion_mnist, which is downloaded; or sample)")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images of a repetition (1.0)")
    parser.add_argument("--threads", type=int, help="threads on the CPU (all cores)")
    parser.add_argument("--folder", type=Path, help="where the files are written (a temporary folder)")


def run(options: argparse.Namespace) -> harness.Report:
    """Measures every size, in every precision that pays."""
    accelerator = start(None, "fp32", options.threads)
    precisions: list[Precision] = ["fp32"]
    if bf16_pays(accelerator.device.type == "cpu"):
        precisions.append("bf16")
    rows: list[dict[str, harness.Value]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for size in options.sizes:
            images = _images(size, CASES[size], options.data or CASES[size].data, options.share)
            for precision in precisions:
                rows += _measure(images, size, precision, accelerator.device, Path(scratch), options.repetitions)
    return harness.Report(title="Extraction, images per second", rows=rows, notes=NOTES, packages=("timm",))


def _measure(
    images: InMemory, size: int, precision: Precision, device: torch.device, scratch: Path, repetitions: int
) -> list[dict[str, harness.Value]]:
    case = CASES[size]
    torch.manual_seed(0)
    backbone = create_backbone(case.backbone, channels=case.channels, size=size).eval()
    layers = Layers(backbone, (BACKBONE,)).to(device, memory_format=torch.channels_last)
    view = StandardView(size, case.channels)
    inputs = view(Pictures((images.read(torch.arange(BATCH)).to(device),)))
    shape = [len(images), widths_of(layers, inputs[:1])[BACKBONE]]
    key = {"layers": {BACKBONE: {"file": f"{BACKBONE}.npy", "shape": shape, "dtype": "float32"}}}

    def alone() -> None:
        batches = inputs.split(BATCH)
        cast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
        with torch.inference_mode(), cast:
            for _ in range(len(images) // BATCH):
                backbone(batches[0])

    def to_files() -> None:
        folder = scratch / "features"
        with store.held(folder, key, replace=False):
            fill(
                folder,
                layers,
                [Part("train", images, 0)],
                view=view,
                settings=EncodeSettings(precision=precision, batch_size=BATCH),
                console=Console(quiet=True),
            )
            store.finish(folder, [f"{BACKBONE}.npy"], key, ())
        shutil.rmtree(folder)

    def in_memory() -> None:
        encoding.extract(OneLayer(layers), images, view=view, device=device, batch_size=BATCH, precision=precision)

    works: dict[str, Callable[[], object]] = {"backbone alone": alone, "to files": to_files, "in memory": in_memory}
    times = harness.seconds(works, repetitions)
    rows: list[dict[str, harness.Value]] = []
    for name, spread in times.items():
        rate = len(images) / spread.median, len(images) / spread.largest, len(images) / spread.smallest
        row: dict[str, harness.Value] = {"loop": name, "pixels": size, "backbone": case.backbone}
        row["precision"] = precision
        row["images/s"] = harness.Spread(*rate, spread.repetitions)
        row["of the backbone alone"] = times["backbone alone"].median / spread.median
        rows.append(row)
    return rows


def _images(size: int, case: Case, data: str, share: float) -> InMemory:
    """Whole batches of images of this size, over and over where there are too few."""
    settings = load(ExtractSettings, None, [f"data={data}", "output=none"])
    assert settings.data is not None
    source = settings.data.build(workers=2).train
    count = max(int(case.images * share) // BATCH, 1) * BATCH
    pixels = source.read(torch.tensor(list(itertools.islice(itertools.cycle(range(len(source))), count))))
    if size != source.size:
        pixels = F.interpolate(pixels.float(), (size, size), mode="bilinear").round().byte()
    return InMemory(pixels.expand(-1, case.channels, -1, -1).contiguous(), [""] * count, None, (), "benchmark")
