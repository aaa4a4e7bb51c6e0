"""Decoding of photographs to two random crops each, beside torchvision's, HF datasets' and torchcodec's loaders."""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

from benchmarks import harness
from manyviews.data import Loader, Order
from manyviews.data.sources.folder import Folder
from manyviews.views import ViewsSettings

SIZES = {500: (500, 375, 64), 4000: (4000, 3000, 8)}
"""Width, height, and images of a batch, of which twice as many files are written."""
VIEW, NOISE = 224, 4.0
AHEAD = 4
"""Batches that are not timed, which a worker may have decoded before."""
OURS, THEIRS = "manyviews, Pillow", "torchvision v2, PIL"
NOTES = (
    "JPEGs of quality 90, two views of 224 pixels, crops of 0.08 to 1 of the area, bilinear; bytes are in the cache of",
    "the system. All hand over uint8 crops; none flips or changes colours.",
    "1 worker: images/s that arrive from one worker process: median (smallest-largest); the cases take turns.",
    "per core: images/s of processor time in one process with one thread, without transport.",
    "manyviews, torchcodec: data.decoder=torchcodec, which decodes what is not decoded small; the pixels are the same.",
    "torchvision v2, PIL: Image.open, convert, and RandomResizedCrop and PILToTensor twice, in a DataLoader.",
    "torchvision v2, tensors: ToImage first, then RandomResizedCrop of uint8 tensors.",
    "datasets: imagefolder with with_transform of torchvision's two crops, in a DataLoader.",
    "torchcodec: decode_jpeg to uint8 tensors, RandomResizedCrop of them, in a DataLoader.",
)


class Crops(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Two crops of each file, as tutorials write it: without end, files in turn."""

    def __init__(self, files: list[Path], decode: Callable[[Path], Any], transform: Callable[[Any], torch.Tensor]):
        self.files, self.decode, self.transform = files, decode, transform

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.decode(self.files[index % len(self.files)])
        return self.transform(image), self.transform(image)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes, photographs of one's own, and how long is measured."""
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=tuple(SIZES),
        choices=tuple(SIZES),
        metavar="PX",
        help="500, 4000 (both)",
    )
    parser.add_argument("--photographs", type=Path, help="a folder of photographs (scikit-learn's two)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each timed run (5)")


def run(options: argparse.Namespace) -> harness.Report:
    """Measures every size."""
    torch.set_num_threads(1)
    rows: list[dict[str, harness.Value]] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            width, height, batch = SIZES[size]
            files = Path(folder) / "files"
            files.mkdir()
            write(files, options.photographs, width, height, 2 * batch)
            rows += _measure(files, f"{width} × {height}", batch, options.seconds, options.repetitions)
    return harness.Report(
        title="Decoding and cropping, images per second",
        rows=rows,
        notes=NOTES,
        packages=("pillow", "torchvision", "datasets", "torchcodec"),
    )


def write(folder: Path, photographs: Path | None, width: int, height: int, count: int) -> None:
    """Writes photographs of one size; those that are enlarged get noise, as a camera's would have."""
    if photographs is None:
        sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    else:
        files = sorted(file for file in photographs.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        sources = [Image.open(file).convert("RGB") for file in files[:count]]
    noise = np.random.default_rng(0)
    for number, source in zip(range(count), itertools.cycle(sources), strict=False):
        image = ImageOps.fit(source, (width, height), Image.Resampling.BICUBIC)
        if number % (2 * len(sources)) >= len(sources):
            image = ImageOps.mirror(image)
        if width > source.width:
            grain = noise.normal(0, NOISE, (height, width, 1)).astype(np.float32)
            image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:02}.jpg", quality=90)


def _measure(folder: Path, size: str, batch: int, seconds: float, repetitions: int) -> list[dict[str, harness.Value]]:
    files = sorted(folder.iterdir())
    kilobytes = round(sum(file.stat().st_size for file in files) / len(files) / 1e3)
    rows: list[dict[str, harness.Value]] = []
    alone: dict[str, Iterator[object]] = {}
    worker: dict[str, Iterator[object]] = {}
    missing = {}
    for name, make in LOADERS.items():
        try:
            alone[name], worker[name] = make(folder, batch, 0), make(folder, batch, 1)
        except harness.RivalMissingError as problem:
            missing[name] = str(problem)
    own = rates(alone, batch, seconds, repetitions, time.process_time)
    loaded = rates(worker, batch, seconds, repetitions, time.perf_counter)
    for name in LOADERS:
        row: dict[str, harness.Value] = {"loader": name, "pixels": size, "kB": kilobytes}
        if name in missing:
            rows.append(row | {"1 worker": missing[name]})
            continue
        row |= {"1 worker": loaded[name], "of torchvision's": loaded[name].median / loaded[THEIRS].median}
        row |= {"per core": own[name], "of torchvision's per core": own[name].median / own[THEIRS].median}
        rows.append(row)
    return rows


def rates(
    loaders: dict[str, Iterator[object]], batch: int, seconds: float, repetitions: int, clock: Callable[[], float]
) -> dict[str, harness.Spread]:
    """Images per second of each loader; they take turns, and nothing counts that was decoded before the turn."""
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for _, (name, loader) in itertools.product(range(repetitions), loaders.items()):
        for _ in range(AHEAD):
            next(loader)
        began, ends, count = clock(), time.monotonic() + seconds, 0
        while not count or time.monotonic() < ends:
            next(loader)
            count += batch
        found[name].append(count / (clock() - began))
    return {name: harness.Spread.of(values) for name, values in found.items()}


def _ours(
    folder: Path, batch: int, workers: int, decoder: Literal["pillow", "torchcodec"] = "pillow"
) -> Iterator[object]:
    # Not in memory, and none held out.
    images = Folder(path=str(folder), memory=0, holdout=0, decoder=decoder).build().train
    views = ViewsSettings(size=VIEW, crop_scale=(0.08, 1.0)).build(size=VIEW, channels=3, seed=0)
    return iter(Loader(images, Order(len(images), batch, seed=0), views, workers=workers))


def _ours_by_torchcodec(folder: Path, batch: int, workers: int) -> Iterator[object]:
    harness.rival("torchcodec.decoders", "decode_jpeg")
    return _ours(folder, batch, workers, "torchcodec")


def _loader(data: Dataset[Any], batch: int, workers: int) -> Iterator[object]:
    return iter(DataLoader(data, batch, num_workers=workers))


def _pillow(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _cropped(*more: v2.Transform) -> v2.Transform:
    return v2.Compose([v2.RandomResizedCrop(VIEW, antialias=True), *more])


def _torchvision(folder: Path, batch: int, workers: int) -> Iterator[object]:
    return _loader(Crops(sorted(folder.iterdir()), _pillow, _cropped(v2.PILToTensor())), batch, workers)


def _tensors(folder: Path, batch: int, workers: int) -> Iterator[object]:
    decode = v2.Compose([_pillow, v2.ToImage()])
    return _loader(Crops(sorted(folder.iterdir()), decode, _cropped()), batch, workers)


def _datasets(folder: Path, batch: int, workers: int) -> Iterator[object]:
    load = harness.rival("datasets", "load_dataset")
    cache = folder.with_name(f"{folder.name}-cache")
    table = load("imagefolder", data_dir=str(folder), cache_dir=str(cache), split="train").with_transform(_rows)
    endless = RandomSampler(table, replacement=True, num_samples=10**6)
    return iter(DataLoader(table, batch, sampler=endless, num_workers=workers))


def _rows(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    # At the top of a module, for datasets pickles it.
    transform, images = _cropped(v2.PILToTensor()), [image.convert("RGB") for image in rows["image"]]
    return {name: [transform(image) for image in images] for name in ("first", "second")}


def _torchcodec(folder: Path, batch: int, workers: int) -> Iterator[object]:
    decode = harness.rival("torchcodec.decoders", "decode_jpeg")
    return _loader(Crops(sorted(folder.iterdir()), decode, _cropped()), batch, workers)


LOADERS: dict[str, Callable[[Path, int, int], Iterator[object]]] = {
    OURS: _ours,
    "manyviews, torchcodec": _ours_by_torchcodec,
    THEIRS: _torchvision,
    "torchvision v2, tensors": _tensors,
    "datasets": _datasets,
    "torchcodec": _torchcodec,
}
