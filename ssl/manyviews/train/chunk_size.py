"""`train.chunk=auto`: the largest part of a batch that fits into a GPU's memory, found by trying."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from manyviews.config import load
from manyviews.data import Images, Order, RelationTable
from manyviews.data.images import Pictures
from manyviews.data.pictures import pictures
from manyviews.optim import set_rate
from manyviews.recipe import Recipe
from manyviews.run.folder import CONFIG
from manyviews.system import distributed, hardware
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.train.components import Components, build, smallest_part

Step = Callable[[Components, Pictures, Tensor, int, int], object]
"""A training step, on images and ids of an epoch, with the number of steps before."""
RESERVE = 0.03
"""Share of the memory that stays free for fragments, measurements and pictures."""


def with_known_chunk(recipe: Recipe, folder: Path) -> Recipe:
    """With train.chunk=auto, a recipe with the chunk that its run was started with, if it was started."""
    if recipe.train.chunk != "auto" or not (folder / CONFIG).is_file():
        return recipe
    return _with_chunk(recipe, load(Recipe, folder / CONFIG).train.part)


def with_found_chunk(
    recipe: Recipe,
    accelerator: Accelerator,
    images: Images,
    order: Order,
    step: Step,
    relations: RelationTable | None = None,
) -> Recipe:
    """With train.chunk=auto, a recipe with the largest chunk that fits on every rank; collective.

    `step` is tried on other components, built for it and dropped: nothing has to be restored.

    Raises:
        ValueError: on a CPU, or if not even the smallest chunk fits.
    """
    if recipe.train.chunk != "auto":
        return recipe
    if accelerator.device.type != "cuda":
        raise ValueError(
            "train.chunk=auto tries what fits into the memory of a GPU; a CPU would swap: name a number of images, or "
            "leave it out"
        )
    scaler = accelerator.scaler
    scale = {} if scaler is None else scaler.state_dict()
    size, own = len(order.batch(0)[1]), distributed.share(len(order.batch(0)[1]))
    parts = 0
    # A rank that runs out of memory leaves a step in which the others would wait for it.
    with raise_on_all_ranks(), distributed.alone():
        build_here = partial(build, recipe, accelerator, images, relations, alone=True)
        parts = _fewest_parts(build_here, images, order, own, step)
    # Accelerate keeps what it has wrapped.
    accelerator.free_memory()
    torch.cuda.empty_cache()
    if scaler is not None:
        scaler.load_state_dict(scale)
    most, local = max(distributed.counts(parts)), -(-size // distributed.world_size())
    return _with_chunk(recipe, None if most == 1 else -(-local // most))


def fewest_parts(local: int, smallest: int, fits: Callable[[int], bool]) -> int:
    """The fewest equal parts of a batch of `local` images that fit: doubling, then bisection.

    Raises:
        ValueError: if parts of `smallest` images do not fit.
    """
    failed, parts, most = 0, 1, max(local // smallest, 1)
    while not fits(parts):
        if parts == most:
            raise ValueError(
                f"train.chunk=auto: not even {-(-local // parts)} images at a time fit into the GPU's "
                f"{hardware.gigabytes(hardware.device())}; lower views.size or train.batch_size, or take a smaller "
                "encoder"
            )
        failed, parts = parts, min(2 * parts, most)
    while parts - failed > 1:
        middle = (failed + parts) // 2
        failed, parts = (failed, middle) if fits(middle) else (middle, parts)
    return parts


def _fewest_parts(build_here: Callable[[], Components], images: Images, order: Order, own: slice, step: Step) -> int:
    """As `fewest_parts`, by steps of this rank on its share of the first batch."""
    components, (epoch, batch) = build_here(), order.batch(0)
    device, ids = components.accelerator.device, batch[own]
    read, numbers = pictures(images, ids, components.views, epoch).to(device), ids.to(device)
    components.forward.train()
    # Averages are allocated, and the weights stay.
    set_rate(components.optimiser, 0.0)
    weights = sum(parameter.nbytes for parameter in components.encoder.parameters())
    buckets = weights if components.accelerator.num_processes > 1 else 0
    _reserve = torch.empty(buckets + int(RESERVE * hardware.device()), dtype=torch.uint8, device=device)

    def fits(parts: int) -> bool:
        tried = components._replace(recipe=_with_chunk(components.recipe, -(-len(ids) // parts)))
        fitting = _runs(lambda: step(tried, read, numbers, epoch, 0))
        _clear(components)
        return fitting

    return fewest_parts(len(ids), smallest_part(components.encoder), fits)


def _runs(step: Callable[[], object]) -> bool:
    try:
        step()
    except (RuntimeError, MemoryError) as problem:
        if not hardware.ran_out(problem):
            raise
        return False
    return True


def _clear(components: Components) -> None:
    components.optimiser.zero_grad(set_to_none=True)
    for parameter in components.objective.parameters():
        parameter.grad = None
    gc.collect()
    torch.cuda.empty_cache()


def _with_chunk(recipe: Recipe, chunk: int | None) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"chunk": chunk})})
