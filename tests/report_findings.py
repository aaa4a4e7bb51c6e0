"""Findings as measuring leaves them, made in a moment: images of plain brightness, features that know it."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from manyviews import recipe
from manyviews.config import dump_yaml, load
from manyviews.data import InMemory
from manyviews.evaluators.compare import compare
from manyviews.evaluators.fractions import mean_of_draws
from manyviews.evaluators.results.measurement import Evaluation, Measurement, Task
from manyviews.recipe import Recipe
from manyviews.report import Findings

TASKS: tuple[Task, ...] = ("knn", "linear", "retrieval", "clustering", "verification")


def images(count: int, classes: tuple[str, ...], *, channels: int = 1, size: int = 12, seed: int = 0) -> InMemory:
    """Noise around the brightness of the class; image i is of class i modulo the number of classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % max(len(classes), 1)
    noise = torch.randint(0, 40, (count, channels, size, size), generator=generator)
    pixels = (noise + (200 * labels / max(len(classes), 1))[:, None, None, None]).to(torch.uint8)
    names = [f"{seed}/picture {number:04d}.png" for number in range(count)]
    return InMemory(pixels, names, labels if classes else None, classes, "0" * 64)


def features(images: InMemory, *, noise: float, dim: int = 6, seed: int = 0) -> Tensor:
    """A direction for each class, and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = images.labels if images.labels is not None else torch.arange(len(images)) % 3
    centres = torch.randn(int(labels.max()) + 1, dim, generator=torch.Generator().manual_seed(9))
    return centres[labels] + noise * torch.randn(len(images), dim, generator=generator)


def run_folder(folder: Path, *, lines: int = 40, curves: bool = False) -> Path:
    """A run's folder as far as a report reads it; with curves its metrics are all that a run writes."""
    folder.mkdir(parents=True)
    made = load(Recipe, recipe.find("quickstart"), ["train.epochs=2"])
    header = "# manyviews pretrain quickstart train.epochs=2\n# commit 0123abc; manyviews 0.1.0 torch 2.10\n"
    (folder / "config.yaml").write_text(header + dump_yaml(made))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, lines + 1):
            line = {"step": step, "loss": 5 / step, "epoch": 2 * step / lines, "seconds": step / 2}
            more = {"information": 1 - 1 / step, "ceiling": 5.0, "rate": 1e-3, "embedding_std": 0.9}
            more |= {"effective_rank": 30.0, "images_per_second": 500.0, "negatives": 254}
            file.write(json.dumps(line | (more if curves else {})) + "\n")
    picture = torch.randint(0, 255, (3, 40, 90), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / "views.png")
    (folder / "unreadable.txt").write_text("broken.jpg\ttruncated\n")
    return folder


def _kinds(train: InMemory, test: InMemory) -> dict[str, tuple[Tensor | None, Tensor]]:
    return {
        "learned": (features(train, noise=0.6), features(test, noise=0.6, seed=1)),
        "raw pixels": (features(train, noise=2.0), features(test, noise=2.0, seed=1)),
    }


@cache
def _evaluation(train: int, test: int, classes: int) -> Evaluation:
    names = tuple(map(str, range(classes)))
    first, second = images(train, names), images(test, names, seed=1)
    assert first.labels is not None
    assert second.labels is not None
    return compare(_kinds(first, second), first.labels, second.labels, tasks=TASKS)


def _without_test_labels(train: int, test: int) -> list[Measurement]:
    """Few labels, geometry without the alignment of pixels, and a bank's rows."""
    measurements = [mean_of_draws(kind, "10 %", 9, (0.5, 0.75), (0.1, 0.1)) for kind in ("learned", "raw pixels")]
    geometry = {"learned": (4.25, -1.5, 0.25), "raw pixels": (5.0, -1.0)}
    for kind, numbers in geometry.items():
        named = zip(("effective rank", "uniformity", "alignment"), numbers, strict=False)
        measurements += [Measurement("geometry", kind, name, number, n=test, dim=6) for name, number in named]
    stale = {"mean": 0.875, "5 %": 0.25, "95 %": 0.975}
    return measurements + [
        Measurement("staleness", "memory bank", name, value, n=train) for name, value in stale.items()
    ]


def findings(
    folder: Path,
    classes: tuple[str, ...] = ("boot", "coat", "dress"),
    *,
    train: int = 90,
    test: int = 60,
    channels: int = 1,
    size: int = 12,
    curves: bool = False,
) -> Findings:
    """Everything there can be, of a run in this folder."""
    first, second = (
        images(number, classes, channels=channels, size=size, seed=seed) for seed, number in enumerate((train, test))
    )
    kinds = _kinds(first, second)
    measurements = _evaluation(train, test, len(classes)).measurements
    ids = torch.arange(test)
    points = {
        "pca": (ids, kinds["learned"][1][:, :2]),
        "tsne": (ids[: test // 2], kinds["learned"][1][: test // 2, 2:4]),
    }
    return Findings(
        run_folder(folder, curves=curves),
        first,
        second,
        kinds,
        replace(
            _evaluation(train, test, len(classes)), measurements=(*measurements, *_without_test_labels(train, test))
        ),
        points,
        ("the images are of other data than the run's",),
    )
