"""The loop of fine-tuning, to be read and to be copied: labelled images → views → mixing → logits → gradient."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from manyviews.data import Loader, Order
from manyviews.encoder.encoder import follow
from manyviews.features.backbone import open_model
from manyviews.optim import cosine, set_rate
from manyviews.run.checkpoints import Checkpoint, Saver, check_finite, restore_optimiser
from manyviews.run.folder import CHECKPOINTS, DONE, Run, check_content, prepare
from manyviews.system import distributed, keyed_random
from manyviews.system.console import Console
from manyviews.system.folder_lock import folder_lock
from manyviews.system.launch import Stop, start
from manyviews.train.components import synchronised
from manyviews.train.finetune.classifier import Probe, create_optimiser, train_mode
from manyviews.train.finetune.folder import (
    check_unchanged,
    describe,
    folder_of,
    open_run,
    probe_of,
    remove_unbegun,
    resumable,
)
from manyviews.train.finetune.result import measure
from manyviews.train.finetune.settings import FinetuneSettings
from manyviews.train.finetune.task import Task, first_model, fitted_probe, model_input, outputs, task_of


def finetune(given: str, settings: FinetuneSettings, *, header: str = "") -> Path:
    """Trains a classifier from a run or a timm model; writes its folder and returns it.

    On Ctrl-C, SIGTERM or SIGUSR1 it saves, then raises SystemExit.

    Raises:
        ValueError: for what is wrong with the model, the settings, the labels or the folder, before anything is
            written; and for a loss that is not finite.
    """
    accelerator = start(None, settings.precision, settings.threads)
    console = Console(quiet=not accelerator.is_main_process)
    folder = folder_of(given, settings)
    prepare(folder, resume=settings.resume)
    if (folder / DONE).exists():
        check_unchanged(folder, settings)
        console.say(f"{folder} is finished: nothing is left to do")
        return folder
    with folder_lock(folder, partial(check_content, folder, resume=settings.resume), console.warn) as lock_again:
        return _run(given, settings, accelerator, folder, console, header, lock_again)


def _run(
    given: str,
    settings: FinetuneSettings,
    accelerator: Accelerator,
    folder: Path,
    console: Console,
    header: str,
    lock_again: Callable[[], None],
) -> Path:
    """Fine-tuning in a folder that no other program writes to."""
    opened = open_model(given, pretrained=settings.pretrained, size=settings.views.size)
    task = task_of(settings, opened, accelerator.num_processes, console)
    found = resumable(folder, task, console) if settings.resume else None
    probe = probe_of(found) if found else fitted_probe(task, accelerator.device, console)
    model = first_model(task, accelerator.device, probe)
    # No process may look at the folder after the first one has begun to write to it.
    distributed.barrier()
    run = open_run(folder, task, header, found, console, lock_again) if accelerator.is_main_process else None
    describe(task, model, probe, accelerator, folder, console)
    saver = Saver(folder / CHECKPOINTS, keep=settings.keep, keep_best=False)
    try:
        with Stop() as stop:
            best, metadata = train(model, task, probe, accelerator, saver, run, console, found, stop)
        if stop.signal is None:
            measure(best, task, probe, metadata, run, console, header)
    except Exception:
        saver.abandon()
        if run is not None:
            run.close()
            remove_unbegun(folder)
        raise
    finally:
        if run is not None:
            run.close()
    distributed.barrier()
    accelerator.end_training()
    if stop.signal is not None:
        console.say(f"stopped at step {metadata['step']:,}, saved; the same words with resume=true go on from there")
        raise SystemExit(128 + stop.signal)
    return folder


def train(
    model: nn.Module,
    task: Task,
    probe: Probe | None,
    accelerator: Accelerator,
    saver: Saver,
    run: Run | None,
    console: Console,
    found: Checkpoint | None,
    stop: Stop,
) -> tuple[nn.Module, dict[str, Any]]:
    """Steps to the end of the budget or to a signal; returns the model with the best weights so far, and its metadata.

    Where it begins as the linear probe, that is measured too, and stays the best until another is better.
    """
    settings, opened, device = task.settings, task.opened, accelerator.device
    if accelerator.num_processes > 1 and device.type == "cuda":
        model = synchronised(model)
    views = settings.views.build(size=opened.size, channels=task.images.channels, seed=settings.seed).to(device)
    mix = Mixup(
        settings.mixing,
        settings.cutmix,
        prob=float(settings.mixing + settings.cutmix > 0),
        label_smoothing=settings.label_smoothing,
        num_classes=len(task.images.classes),
    )
    loss_of = SoftTargetCrossEntropy()
    optimiser: Any = create_optimiser(
        model, rate=settings.rate, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay
    )
    # A share of a short run would be a step or two, too few for adamw's averages to settle (Ma and Yarats 2021).
    slowest = max(settings.warmup_steps if settings.mode == "linear_then_full" else 0, 0.5)
    # What is measured and kept; its decay grows from 0, so that a short run is not averaged with where it began.
    average = Average(model, decay=settings.ema, use_warmup=True)
    best = copied(average.module)
    with warnings.catch_warnings():
        # torch 2.14 has another name for it, which Accelerate does not pass on yet.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        forward, optimiser = accelerator.prepare(model, optimiser)

    metadata: dict[str, Any] = {"step": 0, "seconds": 0.0, "tested": 0, "best_step": 0, "best_accuracy": None}
    losses: list[float] = []
    """Of the steps since the last line of metrics, up to the newest checkpoint."""
    fresh: list[Tensor] = []
    """Of the steps since then, still on the device."""
    if found is not None:
        model.load_state_dict(dict(found.parts["model"]))
        average.module.load_state_dict(dict(found.parts["average"]))
        restore_optimiser(optimiser, found.optimiser)
        best = {key: value.to(device) for key, value in found.parts["best"].items()}
        metadata |= {key: found.metadata.get(key) for key in metadata}
        losses += found.metadata["losses"]
    step, began = metadata["step"], time.monotonic() - metadata["seconds"]
    order = Order(len(task.images), task.batch_size, settings.seed)
    steps = max(round(settings.epochs * order.steps_per_epoch), settings.min_steps, 1)

    def seconds() -> float:
        return distributed.from_first_rank(time.monotonic() - began)

    def progress(step: int | float) -> float:
        return min(1.0, seconds() / (60 * settings.minutes) if settings.minutes else step / steps)

    def open_losses() -> list[float]:
        """The losses of the steps since the last line, each the mean over the processes; collective."""
        losses.extend(distributed.mean(torch.stack(fresh).float()).tolist() if fresh else [])
        fresh.clear()
        return losses

    def save() -> None:
        parts = {"model": model.state_dict(), "average": average.module.state_dict(), "best": best}
        known = metadata | {"step": step, "seconds": seconds(), "losses": list(open_losses())} | task.origin
        if probe is not None:
            parts["probe"] = {"weights": probe.weights, "biases": probe.biases}
            known |= {"probe": [probe.regularisation, probe.held_out]}
        check_finite(
            {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}, step, saver.place
        )
        before = run.sync if run is not None else None
        saver.begin(Checkpoint(step, parts, optimiser.state_dict(), known), before=before)

    def check() -> None:
        nonlocal best
        accuracy, before = _accuracy(average.module, task), metadata["best_accuracy"]
        # Of equals the later one, which averages over more, but the probe only gives way to one that is better; with
        # none held out, it is the last one.
        if accuracy is None or before is None or accuracy > before or (accuracy == before and metadata["best_step"]):
            best = copied(average.module)
            metadata.update(best_step=step, best_accuracy=accuracy)
        metadata["tested"] = step
        if run is not None and accuracy is not None:
            run.log(step, {"held_out": accuracy})

    loader = Loader(
        task.images,
        order,
        rank=distributed.rank(),
        size=distributed.world_size(),
        workers=settings.workers,
        start=step,
    )
    labels = task.labels.to(device)
    checked, saved = int(progress(step) * settings.checks), seconds()
    if not step and settings.mode == "linear_then_full":
        check()
    train_mode(model)
    with console.bar():
        for images, ids, epoch in loader:
            # At least one step is taken, however small the budget.
            if (step and progress(step) >= 1) or stop.agreed():
                break
            set_rate(optimiser, min(cosine(progress(step + 0.5), settings.warmup), (step + 0.5) / slowest))
            ids = ids.to(device, non_blocking=True)
            inputs = model_input(opened, views(images.to(device, non_blocking=True), ids, epoch)[0])
            with draws_of(settings.seed, step):
                inputs, targets = mix(inputs, labels[ids])
                loss: Tensor = loss_of(forward(inputs), targets)
            accelerator.backward(loss)
            optimiser.step()
            optimiser.zero_grad()
            step += 1
            average.update(model, step)
            fresh.append(loss.detach())
            done = progress(step)
            if step % settings.log_every == 0 or done >= 1:
                mean = sum(open_losses()) / len(losses)
                losses.clear()
                if not math.isfinite(mean):
                    raise ValueError(
                        f"the loss is {mean} at step {step:,}; use a lower rate than rate={settings.rate:g}"
                    )
                if run is not None:
                    rate = optimiser.param_groups[-1]["lr"]
                    run.log(step, {"loss": mean, "rate": rate, "epoch": step / order.steps_per_epoch})
                console.update("fine-tuning", done, f"step {step:,}  loss {mean:.3f}")
            if int(done * settings.checks) > checked:
                checked = int(done * settings.checks)
                check()
            for news in saver.poll():
                console.warn(news)
            if not saver.under_way and seconds() - saved > 60 * settings.save_minutes:
                save()
                saved = seconds()
    if stop.signal is None and metadata["tested"] < step:
        check()
    save()
    for news in saver.finish():
        console.warn(news)
    # Not the model itself, which Accelerate has given the precision of the training.
    average.module.load_state_dict(best)
    epochs = {"epoch": step / order.steps_per_epoch, "best_epoch": metadata["best_step"] / order.steps_per_epoch}
    del metadata["tested"]
    return average.module, metadata | {"step": step, "seconds": seconds()} | epochs


class Average(ModelEmaV3):
    """timm's moving average of a model's state, in which a tensor that several layers share moves once a step."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """One step towards the model."""
        follow(self.module, model, decay)


@contextmanager
def draws_of(seed: int, step: int) -> Iterator[None]:
    """Keys what draws from global generators, timm's mixing and dropout, so that a resumed step draws alike."""
    before = np.random.get_state()
    # Mixing must be the same on all processes; dropout must not.
    np.random.seed(keyed_random.hashed(seed, step) % 2**32)
    torch.manual_seed(keyed_random.hashed(seed, step, distributed.rank()) >> 1)
    try:
        yield
    finally:
        np.random.set_state(before)


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as it is now."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def _accuracy(model: nn.Module, task: Task) -> float | None:
    """The accuracy on the images that are held out."""
    if not len(task.held_out):
        return None
    logits = outputs(model, task, task.split.train, task.held_out)
    return (logits.argmax(1) == task.held_out_labels).double().mean().item()
