"""A batch beyond memory in chunks, beside the same batch in one piece: peak memory, seconds, and the gradient."""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from manyviews.config import load
from manyviews.data import Sample
from manyviews.data.images import Pictures
from manyviews.data.pictures import pictures
from manyviews.recipe import Recipe
from manyviews.system.launch import start
from manyviews.train.components import Components, build
from manyviews.train.pretrain import gradient

BATCH, CHUNK = 8_192, 256
MEBIBYTE = 2**20
NORMED = ("encoder.name=light_resnet",)
SMOOTH = ("encoder.name=test_vit", "views.size=32", "encoder.projector.batch_norm=false")
NOTES = (
    "One step: views, encoder, in-batch loss and gradient, of the bundled images, two views each, in float32, without",
    "the optimiser. seconds: median (smallest-largest); the cases take turns. per image: the time of an image, over",
    "that in a batch of one chunk. memory: peak resident memory over that of the process with encoder and images in",
    "it, each in a fresh process.",
    "relative difference: the largest of the gradient's numbers, over the largest of the whole batch's gradient.",
    "test_vit has no batch norm. The batch norms of light_resnet normalise each chunk by itself: another gradient.",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes to measure."""
    parser.add_argument("--batch", type=int, default=BATCH, metavar="N", help=f"images of the large batch ({BATCH:,})")
    parser.add_argument("--chunk", type=int, default=CHUNK, metavar="N", help=f"images of a chunk ({CHUNK})")
    parser.add_argument(
        "--encoders", nargs="+", default=("light_resnet", "test_vit"), choices=("light_resnet", "test_vit")
    )


def run(options: argparse.Namespace) -> harness.Report:
    """Measures each encoder; the large batch in one piece only where it fits in memory."""
    rows = [row for encoder in options.encoders for row in _measure(encoder, options)]
    return harness.Report(
        title=f"A batch of {options.batch:,} images in chunks of {options.chunk:,}", rows=rows, notes=NOTES
    )


def _measure(encoder: str, options: argparse.Namespace) -> list[dict[str, harness.Value]]:
    batch, chunk = options.batch, options.chunk
    cases = {
        f"{chunk:,} in one piece": (chunk, None, False),
        f"{batch:,} in chunks": (batch, chunk, False),
        f"{batch:,} in chunks, views kept": (batch, chunk, True),
        f"{batch:,} in one piece": (batch, None, False),
    }
    memory: dict[str, float | None] = {}
    for name, (size, part, keep) in cases.items():
        small = memory.get(f"{chunk:,} in one piece") or 0.0
        needed, there = small * size / chunk, harness.available_mebibytes()
        if part is None and size > chunk and needed > 0.8 * there:
            memory[name] = None
            continue
        memory[name] = harness.peak_mebibytes(prepare, encoder, size, part, keep)
    works = {name: prepare(encoder, *case) for name, case in cases.items() if memory[name] is not None}
    times = harness.seconds(works, options.repetitions)
    whole = f"{batch:,} in one piece"
    expected = works[whole]() if whole in works else None
    rows: list[dict[str, harness.Value]] = []
    for name, (size, _, _) in cases.items():
        row: dict[str, harness.Value] = {"batch": name, "encoder": encoder}
        if name in works:
            row["memory (MiB)"] = memory[name]
            row["seconds"] = times[name]
            per_image = times[f"{chunk:,} in one piece"].median / chunk
            row["per image"] = times[name].median / size / per_image
            if whole in works:
                row["over one piece"] = times[name].median / times[whole].median if size == batch else None
            if expected is not None and size == batch and name != whole:
                row["relative difference"] = difference(works[name](), expected)
        else:
            needed = (memory[f"{chunk:,} in one piece"] or 0.0) * size / chunk / 1024
            there = harness.available_mebibytes() / 1024
            row["seconds"] = f"needs about {needed:,.0f} GiB, {there:,.0f} GiB are free"
        rows.append(row)
    return rows


def prepare(encoder: str, batch: int, chunk: int | None, keep_views: bool) -> Callable[[], list[Tensor]]:
    """A step up to its gradient, which the work returns."""
    words = [
        *(NORMED if encoder == "light_resnet" else SMOOTH),
        f"train.batch_size={batch}",
        f"train.chunk={'null' if chunk is None else chunk}",
        f"train.keep_views={str(keep_views).lower()}",
        "train.precision=fp32",
    ]
    recipe = load(Recipe, None, words)
    images = Sample().build(workers=0, report=None).train
    views = recipe.views.resolve(size=images.size, channels=images.channels)
    accelerator = start(batch, recipe.train.precision, torch.get_num_threads())
    components = build(recipe.model_copy(update={"views": views}), accelerator, images)
    components.forward.train()
    ids = torch.arange(batch) % len(images)
    given = pictures(images, ids, components.views).to(accelerator.device)
    return partial(_gradient, components, given, ids.to(accelerator.device))


def _gradient(components: Components, images: Pictures, ids: Tensor) -> list[Tensor]:
    components.optimiser.zero_grad(set_to_none=True)
    gradient(components, images, ids, 0, 0)
    return [parameter.grad for parameter in components.encoder.parameters() if parameter.grad is not None]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest number of the expected one."""
    largest = max(float(one.abs().max()) for one in expected)
    return max(float((one - two).abs().max()) for one, two in zip(found, expected, strict=True)) / largest
