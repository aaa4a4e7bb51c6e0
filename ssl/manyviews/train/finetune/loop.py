"""The fine-tuning loop: labelled images → views → mixing → logits → gradient."""

from collections.abc import Iterator
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
from manyviews.data.pictures import pictures
from manyviews.encoder.encoder import follow
from manyviews.encoder.sync_batch_norm import synchronise_batch_norms
from manyviews.features.backbone import open_model
from manyviews.objectives import Loss
from manyviews.optim import cosine, set_rate
from manyviews.run.checkpoints import Checkpoint, Saver
from manyviews.run.folder import CHECKPOINTS, DONE, check_content, prepare
from manyviews.system import distributed, keyed_random
from manyviews.system.console import Console
from manyviews.system.deterministic import deterministic
from manyviews.system.folder_lock import folder_lock
from manyviews.system.hardware import shortage
from manyviews.system.launch import start
from manyviews.train.budget import Budget, MetricAverager
from manyviews.train.finetune.classifier import Probe, create_optimiser, train_mode
from manyviews.train.finetune.folder import (
    FinetuneState,
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
from manyviews.train.finetune.task import Task, first_model, fitted_probe, model_input, task_of
from manyviews.train.kept_buffers import KeptBuffers
from manyviews.train.not_finite import Guard, SkippedSteps
from manyviews.train.session import OnMetrics, Session, end, open_session, wrap
from manyviews.views import MEAN, STD

CURE = "a lower rate or precision=fp32"
LESS_MEMORY = "lower batch_size or views.size, or train less of the model (mode=last_blocks)"


def finetune(source: str, settings: FinetuneSettings, *, header: str = "", on_metrics: OnMetrics | None = None) -> Path:
    """Trains a classifier from a run folder or a timm model; returns the folder that it writes.

    Saves on Ctrl-C, SIGTERM or SIGUSR1, then raises SystemExit.

    Raises:
        ValueError: if model, settings, labels or folder are invalid, before anything is written; after too many
            non-finite losses in a row.
    """
    with deterministic(settings.deterministic, "deterministic"), shortage(LESS_MEMORY):
        return _finetune(source, settings, header, on_metrics)


def _finetune(source: str, settings: FinetuneSettings, header: str, on_metrics: OnMetrics | None) -> Path:
    accelerator = start(None, settings.precision, settings.threads)
    console = Console(quiet=not accelerator.is_main_process)
    folder = folder_of(source, settings)
    prepare(folder, resume=settings.resume)
    if (folder / DONE).exists():
        check_unchanged(folder, settings)
        console.say(f"{folder} is finished: nothing is left to do")
        return folder
    with folder_lock(folder, partial(check_content, folder, resume=settings.resume), console.warn) as lock_again:
        opened = open_model(source, pretrained=settings.pretrained, size=settings.views.size)
        task = task_of(settings, opened, accelerator.num_processes, console)
        checkpoint = resumable(folder, task, console) if settings.resume else None
        probe = probe_of(checkpoint) if checkpoint else fitted_probe(task, accelerator.device, console)
        model = first_model(task, accelerator.device, probe)
        saver = Saver(folder / CHECKPOINTS, keep=settings.keep, keep_best=False, warn=console.warn)
        opening = partial(open_run, folder, task, header, checkpoint, console, lock_again)
        with open_session(opening, saver, console, on_metrics) as session:
            describe(task, model, probe, accelerator, folder, console)
            try:
                best, outcome = train(model, task, probe, accelerator, checkpoint, session)
            except Exception:
                if session.run is not None:
                    session.run.close()
                    remove_unbegun(folder)
                raise
        try:
            if session.stop.signal is None:
                measure(best, task, probe, outcome, session.run, console, header)
        finally:
            if session.run is not None:
                session.run.close()
        distributed.barrier()
        end(session, outcome["step"])
    return folder


def train(
    model: nn.Module,
    task: Task,
    probe: Probe | None,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
    session: Session,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains to the end of the budget or a signal; returns the best model and its record.

    A model that starts as the linear probe is measured first, and kept unless a later one is better.
    """
    settings, device, saver = task.settings, accelerator.device, session.saver
    if accelerator.num_processes > 1 and device.type == "cuda":
        model = synchronise_batch_norms(model)
    # In the pipeline's own normalisation, which `model_input` changes.
    crops = settings.views.model_copy(update={"mean": MEAN, "std": STD})
    views = crops.build(size=task.opened.size, channels=task.images.channels, seed=settings.seed).to(device)
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
    # A share of a short run is a step or two, too few for adamw's moments (Ma and Yarats 2021).
    slowest = max(settings.warmup_steps if settings.mode == "linear_then_full" else 0, 0.5)
    # What is measured and kept; its decay grows from 0, to forget the initial weights in a short run. Copied before
    # Accelerate gives the model the precision of training.
    average = Average(model, decay=settings.ema, use_warmup=True)
    forward, optimiser = wrap(accelerator, model, optimiser)
    state = FinetuneState(task, model, average.module, optimiser, probe, accelerator.scaler)
    if checkpoint is not None:
        state.restore(checkpoint)

    step, metadata = (checkpoint.step, checkpoint.metadata) if checkpoint else (0, {})
    order = Order(len(task.images), task.batch_size, settings.seed)
    steps = max(round(settings.epochs * order.steps_per_epoch), settings.min_steps, 1)
    budget = Budget(steps=steps, minutes=settings.minutes, spent=metadata.get("seconds", 0.0))
    losses = MetricAverager({"loss": metadata.get("losses", [])})
    total = int(metadata.get("skipped") or 0)
    skips = SkippedSteps(saver.folder.parent, task.images.names, session.console.warn, cure=CURE, total=total)

    def save() -> None:
        known = {"seconds": budget.seconds(), "losses": losses.steps().get("loss", []), "skipped": skips.total}
        session.save(state.checkpoint(step, known))

    def check() -> None:
        accuracy = state.measure(step)
        if accuracy is not None:
            session.log(step, {"held_out": accuracy})

    rank, size = distributed.rank(), distributed.world_size()
    loader = Loader(
        task.images, order, views, rank=rank, size=size, workers=settings.workers, start=step, device=device
    )
    labels, checked = task.labels.to(device), int(budget.progress(step) * settings.checks)
    if not step and settings.mode == "linear_then_full":
        check()
    train_mode(model)
    if checkpoint is not None and size > 1:
        # DDP orders its buckets anew after the first pass, as when the run started; sums of three ranks depend on it.
        kept, ids = KeptBuffers(model), order.batch(0)[1][distributed.share(task.batch_size)]
        given = pictures(task.images, ids, views).to(device)
        inputs = model_input(task.opened, views(given, ids.to(device), 0)[0][0])
        with draws_of(settings.seed, 0):
            accelerator.backward(forward(inputs).float().square().mean())
        optimiser.zero_grad()
        kept.restore()
    with session.console.bar():
        for images, ids, epoch in loader:
            # At least one step.
            if (step and budget.progress(step) >= 1) or session.stop.agreed():
                break
            set_rate(optimiser, min(cosine(budget.progress(step + 0.5), settings.warmup), (step + 0.5) / slowest))
            guard = Guard(accelerator, optimiser, {"model": model}, model)
            inputs = model_input(task.opened, views(images, ids, epoch)[0][0])
            with draws_of(settings.seed, step):
                inputs, targets = mix(inputs, labels[ids])
                logits = forward(inputs)
                loss: Tensor = loss_of(logits, targets)
            accelerator.backward(loss)
            skipped = None
            if guard.gradient_norm(loss) is None:
                inputs = views(images, ids, epoch)[0][0]
                finite = inputs.isfinite().flatten(1).all(1), logits.isfinite().all(1)
                skipped = guard.skip(step, epoch, ids, *finite, {"loss": loss.detach()})
            else:
                optimiser.step()
                optimiser.zero_grad()
                average.update(model, step + 1)
                losses.add(Loss(loss.detach(), {}))
            step += 1
            skips.count(skipped)
            done = budget.progress(step)
            if len(losses) and (step % settings.log_every == 0 or done >= 1):
                line = losses.take().means() | {
                    "rate": optimiser.param_groups[-1]["lr"],
                    "epoch": step / order.steps_per_epoch,
                }
                session.log(step, line | {"skipped": skips.total})
                session.console.update("fine-tuning", done, f"step {step:,}  loss {line['loss']:.3f}")
            if int(done * settings.checks) > checked:
                checked = int(done * settings.checks)
                check()
            saver.poll()
            if not saver.under_way and budget.save_is_due(settings.save_minutes):
                with budget.saving():
                    save()
    if session.stop.signal is None and state.tested < step:
        check()
    save()
    saver.finish()
    # Not the model itself, which has the precision of training.
    average.module.load_state_dict(state.best)
    outcome: dict[str, Any] = {"step": step, "seconds": budget.seconds(), "best_step": state.best_step}
    outcome |= {"best_accuracy": state.best_accuracy, "epoch": step / order.steps_per_epoch}
    return average.module, outcome | {"best_epoch": state.best_step / order.steps_per_epoch}


class Average(ModelEmaV3):
    """timm's moving average of a model's state; updates shared tensors once a step."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Updates the average."""
        follow(self.module, model, decay)


@contextmanager
def draws_of(seed: int, step: int) -> Iterator[None]:
    """Seeds the global generators of timm's mixing and dropout by the step, for an exact resume."""
    before = np.random.get_state()
    # Mixing must be the same on all ranks; dropout must not.
    np.random.seed(keyed_random.hashed(seed, step) % 2**32)
    torch.manual_seed(keyed_random.hashed(seed, step, distributed.rank()) >> 1)
    try:
        yield
    finally:
        np.random.set_state(before)
