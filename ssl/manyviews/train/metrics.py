"""Lines of metrics: the means of the losses since the last one, the pace, and the health of the embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from manyviews.data import Images, Order
from manyviews.objectives import Loss
from manyviews.run.health import Watch, figures, glimpse, similarities
from manyviews.system import distributed
from manyviews.system.console import duration
from manyviews.system.launch import in_a_line
from manyviews.train.budget import Budget
from manyviews.train.components import Components
from manyviews.train.not_finite import Skipped, Skips
from manyviews.train.session import Session
from manyviews.train.step import StepResult

LINES_PER_HISTOGRAM = 10


class MetricAverager:
    """The losses since the last line of metrics.

    Once a stopped run goes on, its next line is the mean over the steps of both sessions, to the last bit.
    """

    def __init__(self, before: Mapping[str, Sequence[float]] | None = None) -> None:
        """Begins with the losses `before` a resume, which `steps` has returned."""
        self._before = {name: list(values) for name, values in (before or {}).items()}
        self._losses: list[Loss] = []

    def __len__(self) -> int:
        """The steps that the next line is about."""
        return len(self._before.get("loss", ())) + len(self._losses)

    def add(self, loss: Loss) -> None:
        """Adds a step that was taken."""
        self._losses.append(loss)

    def take(self) -> dict[str, float]:
        """The means over the steps and over the processes; then it starts anew; collective."""
        means = {name: sum(values) / len(values) for name, values in self.steps().items()}
        self._before, self._losses = {}, []
        return means

    def steps(self) -> dict[str, list[float]]:
        """Of each step the loss and its terms, each the mean over the processes; collective."""
        if self._losses:
            names = ["loss", *self._losses[0].terms]
            own = [[loss.total, *(loss.terms[name] for name in names[1:])] for loss in self._losses]
            # All at once: each travels and is waited for otherwise.
            rows = distributed.mean(torch.stack([torch.stack([value.float() for value in row]) for row in own]))
            for name, values in zip(names, rows.T.tolist(), strict=True):
                self._before.setdefault(name, []).extend(values)
            self._losses = []
        return {name: list(values) for name, values in self._before.items()}


def pace(order: Order, before: tuple[int, float], now: tuple[int, float]) -> dict[str, float]:
    """How fast the images went by between two lines of metrics, each known by its step and its seconds of training."""
    (step, seconds), images = now, order.images(now[0]) - order.images(before[0])
    speed = images / max(seconds - before[1], 1e-9)
    return {"images_per_second": speed, "epoch": step / order.steps_per_epoch, "seconds": seconds}


class MetricsLog:
    """The metrics of pretraining, a line every `train.log_every` steps."""

    def __init__(
        self,
        components: Components,
        images: Images,
        order: Order,
        budget: Budget,
        session: Session,
        step: int,
        metadata: Mapping[str, Any],
    ) -> None:
        """From a step on; `metadata` is that of the checkpoint that is resumed, empty in a new run."""
        recipe = components.recipe
        self._every, self._optimiser = recipe.train.log_every, components.optimiser
        self._order, self._budget, self._session = order, budget, session
        self._averager = MetricAverager(metadata.get("losses"))
        self._skips = Skips(
            session.saver.place.parent,
            images.names,
            session.console.warn,
            cure="a lower optim.rate or train.precision=fp32",
            total=int(metadata.get("skipped") or 0),
        )
        self._watch = Watch(min(recipe.train.batch_size, components.encoder.dim))
        self._last = step, budget.seconds()
        """The step of the last line, and the seconds until then."""

    def add(self, step: int, progress: float, result: StepResult | Skipped) -> None:
        """Adds a step, and writes a line where one is due; collective.

        Args:
            step: the steps so far, this one included.
            progress: how much of the budget is spent.
            result: what came of the step.

        Raises:
            ValueError: after too many skipped steps in a row.
        """
        self._skips.count(result if isinstance(result, Skipped) else None)
        if isinstance(result, StepResult):
            self._averager.add(result.loss)
        if len(self._averager) and (step == 1 or step % self._every == 0 or progress >= 1):
            self._write(step, progress, result)

    def metadata(self) -> dict[str, Any]:
        """What a resume needs to know, as JSON values; collective."""
        return {"seconds": self._budget.seconds(), "skipped": self._skips.total, "losses": self._averager.steps()}

    def _write(self, step: int, progress: float, result: StepResult | Skipped) -> None:
        before, self._last = self._last, (step, self._budget.seconds())
        values = self._averager.take() | pace(self._order, before, self._last)
        values |= {"rate": self._optimiser.param_groups[0]["lr"], "skipped": self._skips.total}
        if isinstance(result, StepResult):
            values |= self._health(step, result)
        self._session.log(step, values)
        console = self._session.console
        for warning in self._watch.warnings(progress, values["epoch"], values):
            console.warn(warning)
        left = duration(self._budget.seconds() * (1 - progress) / progress) if progress else "?"
        speed = f"{values['images_per_second']:,.0f} images/s"
        console.update("pretraining", progress, f"step {step:,}  loss {values['loss']:.3f}  {speed}  {left} left")

    def _health(self, step: int, result: StepResult) -> dict[str, float]:
        """The figures of the embeddings' health, on the process that writes them, as far as they can be had."""
        sample, run = glimpse(result.embeddings, result.ids, result.targets), self._session.run
        if run is None:
            return {}
        try:
            if step == 1 or step % (LINES_PER_HISTOGRAM * self._every) == 0:
                for name, values in similarities(sample).items():
                    run.histogram(f"similarity/{name}", values, step)
            return figures(sample)
        except Exception as problem:
            said = f"the embeddings could not be looked at, training goes on: {in_a_line(problem)}"
            self._session.console.warn(f"step {step:,}: {said}")
            return {}
