"""Run folder, checkpoints, console and signals of pretraining and fine-tuning."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn

from manyviews.run.checkpoints import Checkpoint, Saver, check_finite
from manyviews.run.folder import Run
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import Stop, in_a_line

OnMetrics = Callable[[Mapping[str, float]], object]
"""Called on rank 0 with each line of metrics and its `step`."""


class Session(NamedTuple):
    """One start of a run, to its end or to a signal."""

    run: Run | None
    """On rank 0."""
    saver: Saver
    console: Console
    stop: Stop
    on_metrics: OnMetrics | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a line of metrics, on rank 0; a callback that fails is a warning."""
        if self.run is None:
            return
        self.run.log(step, values)
        if self.on_metrics is not None:
            try:
                self.on_metrics({"step": step, **values})
            except Exception as problem:
                self.console.warn(f"step {step:,}: on_metrics failed, training continues: {in_a_line(problem)}")

    def save(self, checkpoint: Checkpoint, weights: Mapping[str, Tensor] | None = None) -> None:
        """Starts to write a checkpoint in the background.

        Raises:
            ValueError: if the `weights`, by default all its parts, are not finite.
        """
        parts = checkpoint.parts.items()
        tensors = {f"{part}.{key}": value for part, state in parts for key, value in state.items()}
        check_finite(tensors if weights is None else weights, checkpoint.step, self.saver.folder)
        self.saver.begin(checkpoint, before=self.run.sync if self.run is not None else None)


@contextmanager
def open_session(
    open_run: Callable[[], Run], saver: Saver, console: Console, on_metrics: OnMetrics | None = None
) -> Iterator[Session]:
    """Opens the run folder on rank 0 and handles signals; closes it after an error."""
    # No rank may read the folder once rank 0 has begun to write.
    distributed.barrier()
    with raise_on_all_ranks():
        run = open_run() if distributed.rank() == 0 else None
    try:
        with Stop() as stop:
            yield Session(run, saver, console, stop, on_metrics)
    except BaseException as problem:
        # A second Ctrl-C, which is no Exception, does not wait for the disk.
        if isinstance(problem, Exception):
            saver.abandon()
        if run is not None:
            run.close()
        raise


def end(session: Session, step: int) -> None:
    """Ends the session on all ranks; after a signal raises SystemExit, with a message.

    The process group stays, for another run in the same processes, until they end.
    """
    distributed.leave_at_exit()
    if session.stop.signal is not None:
        session.console.say(f"stopped at step {step:,}, saved; re-run the same command with resume=true to continue")
        raise SystemExit(128 + session.stop.signal)


def wrap(accelerator: Accelerator, model: Any, optimiser: Any, *, alone: bool = False) -> tuple[nn.Module, Any]:
    """Wraps model and optimiser by Accelerate; `alone`, without DDP."""
    with warnings.catch_warnings():
        # torch 2.14 renamed it; Accelerate passes the old name.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        if alone:
            return accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare_optimizer(optimiser)
        wrapped: tuple[nn.Module, Any] = accelerator.prepare(model, optimiser)
        return wrapped
