"""Stage 8: views per second beside torchvision's and kornia's transforms on the same device."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from gpu_checks.measure import Row, Setup, at_least
from manyviews.data.images import Pictures
from manyviews.views import ViewsSettings

GOAL = 40_000
"""Images per second at 224 pixels, each with two views."""
CASES = ((224, 256), (32, 2048))


def rows(setup: Setup) -> Iterator[Row]:
    """Makes two views of each image of a batch with SimCLR's changes."""
    for size, count in setup.pick(CASES, ((32, 4),)):
        shape = (count, 3, size, size)
        images = torch.randint(256, shape, dtype=torch.uint8, device=setup.device)
        ids = torch.arange(count, device=setup.device)
        views = ViewsSettings().build(size=size, channels=3, seed=0).to(setup.device)
        rate = count / setup.seconds(partial(views, Pictures((images,)), ids, 0))
        title = f"views at {size}"
        if size == 224:
            yield at_least(f"{title}: manyviews", rate, GOAL, "images/s")
        else:
            yield Row(f"{title}: manyviews", rate, "images/s")
        for name, build, note in (
            ("torchvision v2", _torchvision, "one draw for the whole batch"),
            ("kornia", _kornia, "a draw for each image"),
        ):
            try:
                other = build(size).to(setup.device)
            except ModuleNotFoundError as problem:
                yield Row(f"{title}: {name}", None, note=f"{problem.name} is not installed")
                continue
            theirs = count / setup.seconds(_twice(other, images))
            yield Row(f"{title}: {name}", rate / theirs, "× its rate is ours", note=f"{theirs:,.0f} images/s, {note}")


def _twice(transform: nn.Module, images: Tensor) -> Callable[[], object]:
    def work() -> None:
        for _ in range(2):
            transform(images.float() / 255)

    return work


def _torchvision(size: int) -> nn.Module:
    v2: Any = import_module("torchvision.transforms.v2")
    strength = 1.0 if size >= 64 else 0.5
    blur = [v2.RandomApply([v2.GaussianBlur(max(3, (size // 10) | 1))], 0.5)] if size >= 64 else []
    jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    chain: nn.Module = v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter], 0.8),
            v2.RandomGrayscale(0.2),
            *blur,
            v2.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    return chain


def _kornia(size: int) -> nn.Module:
    changes: Any = import_module("kornia.augmentation")
    strength = 1.0 if size >= 64 else 0.5
    kernel = max(3, (size // 10) | 1)
    blur = [changes.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5)] if size >= 64 else []
    chain: nn.Module = nn.Sequential(
        changes.RandomResizedCrop((size, size), scale=(0.08, 1.0)),
        changes.RandomHorizontalFlip(),
        changes.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, p=0.8),
        changes.RandomGrayscale(p=0.2),
        *blur,
        changes.Normalize(torch.full((3,), 0.5), torch.full((3,), 0.25)),
    )
    return chain
