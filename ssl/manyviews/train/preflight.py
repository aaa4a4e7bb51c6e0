"""Checks recipe, images, memory and disk before a run, by two steps and a checkpoint."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from manyviews.data import Loader
from manyviews.data.decoding.files import Files
from manyviews.encoder.timm_format import export
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import Checkpoint, Saver, newest_checkpoint, room_needed
from manyviews.run.folder import CHECKPOINTS, prepare, read_metrics
from manyviews.system import distributed
from manyviews.system.console import Console, duration
from manyviews.system.deterministic import deterministic
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.folder_lock import no_empty_folders_left
from manyviews.system.hardware import decoders, gigabytes, memory, shortage
from manyviews.system.launch import Stop, start
from manyviews.system.plural import plural
from manyviews.train.chunk_size import with_known_chunk
from manyviews.train.components import less_memory
from manyviews.train.describe import describe
from manyviews.train.pace import measure
from manyviews.train.pretrain import train, train_step, warm_up
from manyviews.train.recorder import state_of
from manyviews.train.session import Session
from manyviews.train.setup import Setup, finished, folder_of, make_setup, open_run
from manyviews.views import standard_view

STEPS = 2
MOST_TIMED, LONGEST_TIMED = 20, 5.0
"""Bounds of the timing after those steps, in steps and seconds."""
MOST_MEMORY = 0.95
"""Share of memory beyond which a machine would swap or kill the run."""


def check(recipe: Recipe) -> None:
    """Rehearses a run in a temporary folder and prints a table; collective.

    Raises:
        ValueError: with a line for each problem.
    """
    with deterministic(recipe.train.deterministic, "train.deterministic"):
        _check(recipe)


def _check(recipe: Recipe) -> None:
    accelerator = start(recipe.train.batch_size, recipe.train.precision, recipe.train.threads)
    console, folder = Console(quiet=not accelerator.is_main_process), folder_of(recipe)
    recipe = with_known_chunk(recipe, folder) if recipe.resume else recipe
    with no_empty_folders_left(folder):
        prepare(folder, resume=recipe.resume)
        if finished(recipe, folder, console, record=False):
            return
        setup = make_setup(recipe, accelerator, folder, console, train_step)
        describe(setup, folder, console)
        with _folder_beside(folder) as temporary:
            rows, problems = _rehearse(setup, temporary)
    table = Table("verified", "", title="rehearsed; nothing of it stays", title_justify="left")
    for row in rows.items():
        table.add_row(*row)
    console.rich.print(table)
    if everywhere := dict.fromkeys(chain.from_iterable(distributed.all_gather_object(problems))):
        raise ValueError("\n".join(everywhere))


def _rehearse(setup: Setup, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Takes two steps in a temporary folder; returns the rows of the table, and the problems."""
    split, order, components, resumed = setup.split, setup.order, setup.components, setup.checkpoint
    settings, first = components.recipe.train, distributed.rank() == 0
    first_step = resumed.step if resumed else 0
    warm_up(components, split.train, order)
    budget = {"epochs": (first_step + STEPS) / order.steps_per_epoch, "minutes": None, "log_every": 1}
    short = settings.model_copy(update=budget | {"monitor": min(settings.monitor, 1)})
    short_run = components._replace(recipe=components.recipe.model_copy(update={"train": short, "output": str(folder)}))
    quiet = Console(quiet=True)
    run = open_run(setup._replace(components=short_run), folder, quiet) if first else None
    session = Session(run, Saver(folder / CHECKPOINTS, keep=1, warn=quiet.warn), quiet, Stop())
    try:
        with shortage(less_memory(components)):
            step = train(short_run, split.train, order, resumed, session)
    finally:
        if run is not None:
            run.close()
    if first:
        view = standard_view(components.views.settings, split.train.channels)
        export(components.encoder.backbone, folder / "backbone", view.pretrained_cfg)
    checkpoint = state_of(short_run, split.train, step, {})
    rows, problems = {"recipe": f"{components.recipe.objective.name} with {components.recipe.encoder.name}"}, []

    unreadable = f", {len(split.unreadable):,} unreadable and left out" if split.unreadable else ", all readable"
    held_out = f" and {len(split.test):,} held out" if split.test is not None else ""
    rows["images"] = f"{len(split.train):,} to learn from{held_out}{unreadable}"

    skipped = [line["skipped"] for line in read_metrics(folder) if "skipped" in line][-1:] if first else [0]
    if skipped != [0]:
        problems.append(f"of {STEPS} steps, some were skipped, for the loss or its gradient was not finite")
    rows["steps"] = f"{STEPS}, from step {first_step:,} on"

    problems += differences(checkpoint, folder / CHECKPOINTS)
    rows["checkpoint"] = "written, read back, the same to the last bit" if not problems else "not as it should be"

    kept = settings.keep + settings.keep_best
    needed, free = room_needed(checkpoint, keep=kept), shutil.disk_usage(folder).free
    rows["disk"] = f"{gigabytes(needed)} for {kept + 1} checkpoints, of {gigabytes(free)} that are free"
    if needed > free:
        problems.append(
            f"{gigabytes(needed)} are needed for {kept + 1} checkpoints, and {gigabytes(free)} are free in "
            f"{folder.parent}; make room, lower train.keep, or name another output"
        )

    used, available = memory()
    several = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size())) if not torch.cuda.is_available() else 1
    each = f" for each of {several} processes" if several > 1 else ""
    rows["memory"] = f"{gigabytes(used)}{each}, of {gigabytes(available)}"
    if used * several > MOST_MEMORY * available:
        problems.append(f"{rows['memory']}: too little; set train.chunk to fewer images, or data.memory to less")

    if isinstance(split.train, Files) and not split.train.whole:
        workers, pace = decoders(settings.workers), measure(components, split.train, order, step)
        rows |= pace.rows(workers)
        seconds = order.batch_size / distributed.world_size() / pace.reached(workers)
    else:
        seconds = _seconds_of_a_step(setup, step)
    if settings.minutes:
        expected = f"{duration(60 * settings.minutes)}, about {60 * settings.minutes / seconds:,.0f} steps"
    else:
        left = max(1, round(settings.epochs * order.steps_per_epoch)) - first_step
        expected = f"about {duration(left * seconds)} for {plural(left, 'step')}"
    rows["time"] = f"{expected} ({1e3 * seconds:,.0f} ms each, {order.batch_size / seconds:,.0f} images/s)"
    return rows, problems


def differences(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Compares the newest checkpoint with the original; returns the differences; collective."""
    read, damaged = newest_checkpoint(folder)
    if read is None:
        return damaged or [f"no checkpoint is in {folder}, though one was written"]
    pairs = [(part, read.parts.get(part, {}), state) for part, state in checkpoint.parts.items()]
    for index, state in checkpoint.optimiser["state"].items():
        pairs.append((f"optimiser.{index}", read.optimiser["state"].get(index, {}), state))
    differing = [
        f"{part}.{key}"
        for part, other, state in pairs
        for key in state
        # Rank 0 has written what is not sharded, with its own batch statistics.
        if (distributed.rank() == 0 or f"{part}.{key}" in checkpoint.shards) and not _same(other, state, key)
    ]
    return [f"the checkpoint read back is not what was written: {', '.join(differing[:5])}"] if differing else []


def _seconds_of_a_step(setup: Setup, step: int) -> float:
    """Median seconds of further steps, with their images; identical on all ranks."""
    components, device = setup.components, setup.components.accelerator.device
    rank, size, workers = distributed.rank(), distributed.world_size(), components.recipe.train.workers
    loader = Loader(setup.split.train, setup.order, rank=rank, size=size, workers=workers, start=step, device=device)
    times: list[float] = []
    components.forward.train()
    began = last = distributed.from_first_rank(time.monotonic())
    for images, ids, epoch in islice(loader, MOST_TIMED):
        train_step(components, images, ids, epoch, step + len(times))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = distributed.from_first_rank(time.monotonic())
        times.append(now - last)
        last = now
        if now - began > LONGEST_TIMED:
            break
    return statistics.median(times)


@contextmanager
def _folder_beside(folder: Path) -> Iterator[Path]:
    """Creates a temporary folder for all ranks, in the file system of `folder`."""
    path = ""
    with raise_on_all_ranks():
        if distributed.rank() == 0:
            existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
            path = tempfile.mkdtemp(prefix=".check-", dir=existing)
    made = Path(distributed.all_gather_object(path)[0])
    try:
        yield made
        distributed.barrier()
    finally:
        if distributed.rank() == 0:
            shutil.rmtree(made, ignore_errors=True)


def _same(read: Mapping[str, object], state: Mapping[str, object], key: str) -> bool:
    one, two = read.get(key), state[key]
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return one == two
    # As bytes, where NaN equals NaN.
    left, right = (value.detach().cpu().contiguous().flatten().view(torch.uint8) for value in (one, two))
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(left, right)
