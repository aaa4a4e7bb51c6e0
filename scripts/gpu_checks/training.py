"""Stage 5: images per second from the encoder alone to the whole run, from memory and JPEG, with the busy share."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_checks.loops import images_in_memory, prepared, run_loop, steps_of
from gpu_checks.measure import GIBIBYTE, Row, Setup, at_least, attempted, on_device
from gpu_checks.pictures import write_pictures
from manyviews.data import Batch, Folder, Images, Loader
from manyviews.train.components import Components, batches

FROM_MEMORY, FROM_JPEG = 0.95, 0.90
"""Shares of the rate of the encoder alone that the whole run should reach."""


class Case(NamedTuple):
    """An encoder with the size of its images and the batch; each step is of two views."""

    encoder: str
    size: int
    batch: int
    each: int
    """Steps between two looks at the clock: some tenths of a second."""
    files: bool = False
    args: tuple[str, ...] = ()


CASES = (
    Case("resnet50", 224, 256, 2, files=True),
    Case("vit_small_patch16_224", 224, 256, 3, files=True),
    Case("resnet18_small", 32, 1024, 10),
    Case("resnet18_small", 32, 1024, 10, args=("train.compile=true",)),
)
SMALL = (Case("light_resnet", 12, 4, 1, files=True),)
LOOKS = 5
"""Spans that are measured."""


def rows(setup: Setup) -> Iterator[Row]:
    """Measures each case; one that fails, for memory say, leaves the others."""
    for case in setup.pick(CASES, SMALL):
        shutil.rmtree(setup.folder / "run", ignore_errors=True)
        yield from attempted(_name(case), partial(_measure, setup, case))


def _name(case: Case) -> str:
    return f"{case.encoder} at {case.size}{', compiled' if case.args else ''}"


def _measure(setup: Setup, case: Case) -> Iterator[Row]:
    name = _name(case)
    images: Images = images_in_memory(setup.pick(max(8 * case.batch, 2048), 4 * case.batch), case.size)
    components = prepared(None, _args(case, images, LOOKS + 4), images)
    components.forward.train()
    if setup.cuda:
        torch.cuda.reset_peak_memory_stats()
    batch = next(iter(_loader(components, images)))
    pictures, ids = batch.images, batch.ids
    views = components.views(pictures, ids, 0)
    alone = _rate(setup, case, partial(_pass, components, views))
    yield Row(f"{name}: encoder alone", alone, "images/s", note=f"two views of {case.batch} images, bf16 on a GPU")
    if setup.cuda:
        yield Row(f"{name}: encoder alone, memory", torch.cuda.max_memory_allocated() / GIBIBYTE, "GiB")
    del views

    def viewed() -> None:
        _pass(components, components.views(pictures, ids, 0))

    yield _share(f"{name}: with views", _rate(setup, case, viewed), alone)
    loads = iter(_loader(components, images))
    yield _share(f"{name}: with loader", _rate(setup, case, partial(_step, components, loads)), alone)
    rate, busy = _whole(setup, case, components, images, LOOKS + 4, 1)
    yield _share(f"{name}: whole run from memory", rate, alone, FROM_MEMORY, busy)
    if not case.files:
        return
    folder = write_pictures(setup.folder.parent / "pictures", setup.pick(4096, 64))
    images = Folder(path=str(folder), size=case.size, memory=0, holdout=0).build(workers=os.cpu_count() or 1).train
    workers = setup.pick(os.cpu_count() or 1, 1)
    # All workers bring their first batches at once: only after the second ones is the rate that of decoding.
    looks = max(LOOKS + 4, 4 * workers // case.each)
    args = [*_args(case, images, looks), f"train.workers={workers}"]
    components = prepared(None, args, images)
    rate, busy = _whole(setup, case, components, images, looks, looks // 2)
    yield _share(f"{name}: whole run from JPEG", rate, alone, FROM_JPEG, f"{busy}, {workers} workers".strip(", "))


def _args(case: Case, images: Images, looks: int) -> list[str]:
    """The settings of a run with so many lines of metrics, the first of them after the first step."""
    steps = steps_of(case.each * (looks - (case.each > 1)), case.batch, images)
    return [*steps, f"train.log_every={case.each}", f"encoder.name={case.encoder}", *case.args]


def _share(what: str, rate: float, alone: float, goal: float | None = None, note: str = "") -> Row:
    text = f"{rate:,.0f} images/s" + (f", {note}" if note else "")
    if goal is None:
        return Row(what, rate / alone, "of the encoder alone", note=text)
    return at_least(what, rate / alone, goal, "of the encoder alone", text)


def _loader(components: Components, images: Images) -> Loader:
    return Loader(images, batches(components.recipe, images, 1), device=components.accelerator.device)


def _pass(components: Components, views: tuple[torch.Tensor, ...]) -> None:
    embeddings = components.forward(*views).embeddings
    embeddings.backward(torch.ones_like(embeddings))
    components.optimiser.zero_grad(set_to_none=True)


def _step(components: Components, loads: Iterator[Batch]) -> None:
    images, ids, epoch = next(loads)
    views = components.views(images, ids, epoch)
    _pass(components, views)


def _rate(setup: Setup, case: Case, work: Callable[[], object]) -> float:
    """Images per second of some steps, in spans of a few steps after a warm-up."""

    def span() -> None:
        for _ in range(case.each):
            work()

    return case.each * case.batch / setup.seconds(span, repetitions=LOOKS)


def _whole(
    setup: Setup, case: Case, components: Components, images: Images, looks: int, warm: int
) -> tuple[float, str]:
    """Images per second of the loop of pretraining, and the share of time that the GPU is busy, between metrics.

    There are so many looks at the clock, of which the first `warm` do not count; the last span but one is profiled.
    """
    times: list[float] = []
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if setup.cuda else None
    begun, shares = 0.0, list[float]()

    def look(_: Mapping[str, float]) -> None:
        nonlocal begun
        setup.wait()
        times.append(time.perf_counter())
        if profiler is not None and len(times) == looks - 2:
            profiler.start()
            begun = time.perf_counter()
        if profiler is not None and len(times) == looks - 1:
            profiler.stop()
            shares.append(on_device(profiler)[1] / (times[-1] - begun))

    folder: Path = setup.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    run_loop(components, images, folder, look)
    seconds = times[looks - 3] - times[warm]
    note = f"GPU busy {shares[0]:.0%}" if shares else ""
    return (looks - 3 - warm) * case.each * case.batch / seconds, note
