"""Records pretraining: metrics, health of the embeddings, kNN monitoring and checkpoints."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from timm.utils import distribute_bn
from torch import Tensor

from manyviews.data import Images, Order, sample_ids
from manyviews.data.decoding.files import listed, newly_unreadable
from manyviews.evaluators.knn import monitor_knn
from manyviews.features.encoding import Stopped, extract
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import Checkpoint, optimiser_shards
from manyviews.run.health import Watch, glimpse
from manyviews.system import distributed
from manyviews.system.background import HostCopy, finished, in_a_thread
from manyviews.system.console import Console, duration
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import in_a_line, lost_process
from manyviews.train.budget import Budget, MetricAverager
from manyviews.train.components import Components
from manyviews.train.metric_line import Line, figures_of
from manyviews.train.not_finite import SkippedStep, SkippedSteps
from manyviews.train.resume import SCHEDULE, differences
from manyviews.train.sampling_pictures import SamplingPictures
from manyviews.train.session import Session
from manyviews.train.step import StepResult
from manyviews.views import standard_view

MIN_MONITOR_IMAGES, MAX_MONITOR_IMAGES = 100, 5_000
FEWEST_OF_A_CLASS = 5
"""Images of a class of which a tenth, rounded, is one."""
LINES_PER_HISTOGRAM = 10
CURE = "a lower optim.rate or train.precision=fp32"


class Recorder:
    """Measures, saves and logs pretraining when due; all methods are collective.

    On a GPU a step is added after the next one, which keeps the GPU busy, and its line of metrics is computed from
    copies, in a thread: it is written after a later step, and before the next line, a measurement or a checkpoint.
    """

    def __init__(
        self,
        components: Components,
        images: Images,
        order: Order,
        budget: Budget,
        session: Session,
        checkpoint: Checkpoint | None,
    ) -> None:
        recipe, metadata = components.recipe, checkpoint.metadata if checkpoint else {}
        self._components, self._images, self._order = components, images, order
        self._settings, self._budget, self._session = recipe.train, budget, session
        self._begun = checkpoint.step if checkpoint else 0
        self._averager = MetricAverager(metadata.get("losses"))
        skipped = int(metadata.get("skipped") or 0)
        self._skips = SkippedSteps(
            session.saver.folder.parent, images.names, session.console.warn, cure=CURE, total=skipped
        )
        self._watch = Watch(min(recipe.train.batch_size, components.encoder.dim))
        self._latest: Callable[[], None] | None = None
        """Adds the latest step, of which the host does not know yet whether a GPU has skipped it."""
        self._line: Line | None = None
        self._last = self._begun, budget.seconds()
        """Step and seconds of the last line of metrics."""
        self._monitored = monitored_ids(images.labels, recipe, session.console)
        self._sampling = SamplingPictures(recipe, session, budget.progress(self._begun))
        self._cut_off = bool(metadata.get("cut_off", False))
        """Whether a signal has interrupted a measurement, which is repeated then."""
        self._measured = max(int(budget.progress(self._begun) * recipe.train.monitor) - self._cut_off, 0)
        self._best: tuple[int, float | None] = self._begun, metadata.get("score")
        """Step and accuracy of the best measurement."""
        changed = differences(metadata["recipe"], recipe.model_dump(mode="json")) if "recipe" in metadata else {}
        self._extended = bool(SCHEDULE & changed.keys())

    def monitor(self, step: int, progress: float) -> bool:
        """Measures kNN on held-out labels when due; returns whether it is the best so far."""
        due = int(progress * self._settings.monitor)
        if self._monitored is None or due <= self._measured:
            return False
        self.write_line()
        with self._budget.paused():
            accuracy = self._accuracy(self._monitored)
            best = accuracy is not None and self._session.saver.improves(accuracy, step)
        self._cut_off = accuracy is None
        if accuracy is None:
            return False
        self._measured, self._best = due, (step, accuracy) if best else self._best
        if not math.isnan(accuracy):
            self._session.log(step, {"knn": accuracy})
            what = "kNN on held-out labels of the training images"
            self._session.console.say(f"{100 * progress:3.0f}%  {what} {100 * accuracy:.1f} %")
        return best

    def save_if_due(self, step: int, *, best: bool) -> None:
        """Saves every `train.save_minutes` and after the best measurement; polls the saver."""
        saver = self._session.saver
        saver.poll()
        # After the first step: before it an optimiser has no state.
        if step == self._begun + 1:
            lacking = saver.room_warning(state_of(self._components, self._images, step, {}))
            if lacking:
                self._session.console.warn(lacking)
        late = not saver.under_way and self._budget.save_is_due(self._settings.save_minutes)
        # An extended run is saved at once, with its new schedule.
        if late or best or (self._extended and step == self._begun):
            with self._budget.saving():
                self.save(step)

    def save(self, step: int) -> None:
        """Starts to write a checkpoint in the background."""
        self.write_line()
        components, run = self._components, self._session.run
        known: dict[str, Any] = {"seconds": self._budget.seconds(), "skipped": self._skips.total}
        known |= {"cut_off": self._cut_off, "losses": self._averager.steps()}
        known["score"] = self._best[1] if self._best[0] == step else None
        checkpoint = state_of(components, self._images, step, known)
        weights = {f"objective.{name}": value.detach() for name, value in components.objective.named_parameters()}
        # A buffer of the objective may be NaN until it is known.
        for part in checkpoint.parts.keys() - {"objective"}:
            weights |= {f"{part}.{key}": value for key, value in checkpoint.parts[part].items()}
        # Collective: not only where there is a run folder to write to.
        unreadable = newly_unreadable(self._images)
        if run is not None and unreadable:
            run.unreadable(listed(unreadable))
        self._session.save(checkpoint, weights)

    def log(self, step: int, progress: float, result: StepResult | SkippedStep) -> None:
        """Adds a step; writes a line of metrics every `train.log_every` steps.

        Raises:
            ValueError: after too many skipped steps in a row.
        """
        self.write_line(wait=False)
        self._add_latest()
        rate = self._components.optimiser.param_groups[0]["lr"]
        due = step == 1 or step % self._settings.log_every == 0 or progress >= 1
        seconds = self._budget.seconds() if due else None
        self._latest = partial(self._add, step, progress, rate, seconds, result)
        if self._components.accelerator.device.type != "cuda":
            self._add_latest()

    def _add_latest(self) -> None:
        """Adds the latest step, if it has not been; waits until a GPU has taken it."""
        if self._latest is not None:
            add, self._latest = self._latest, None
            add()

    def _add(
        self, step: int, progress: float, rate: float, seconds: float | None, result: StepResult | SkippedStep
    ) -> None:
        """Adds a step; begins a line of metrics if it is due, `seconds` after the start of training."""
        skipped = result.skipped() if isinstance(result, StepResult) else result
        self._skips.count(skipped)
        if skipped is None and isinstance(result, StepResult):
            self._averager.add(result.loss)
            if self._sampling.due(progress):
                with self._budget.paused():
                    self._sampling.add(step, progress, result)
        if not len(self._averager) or seconds is None:
            return
        self.write_line()
        before, self._last = self._last, (step, seconds)
        values = pace(self._order, before, self._last) | {"rate": rate, "skipped": self._skips.total}
        sample = seen = None
        if skipped is None and isinstance(result, StepResult):
            views = slice(self._components.recipe.keys)
            targets = None if result.targets is None else result.targets[views]
            sample = glimpse(self._components.encoder.of_images(result.embeddings[views]), result.ids, targets)
        if sample is not None and self._session.run is not None:
            seen = HostCopy(*(part for part in sample if part is not None))
        histograms = step == 1 or step % (LINES_PER_HISTOGRAM * self._settings.log_every) == 0
        # A batch of relations may hold an image several times.
        once = self._components.relations is not None
        work = partial(figures_of, self._averager.take(), seen, histograms=histograms, once=once)
        on_gpu = self._components.accelerator.device.type == "cuda"
        self._line = Line(step, progress, values, in_a_thread(work) if on_gpu else finished(work))
        if not on_gpu:
            self.write_line()

    def write_line(self, *, wait: bool = True) -> None:
        """Writes the pending line of metrics, if any; without `wait` only if its figures are known."""
        if wait:
            self._add_latest()
        line, session = self._line, self._session
        if line is None or not (wait or line.figures.done()):
            return
        self._line, found = None, line.figures.result()
        for name, similar in found.histograms.items():
            if session.run is not None:
                session.run.histogram(f"similarity/{name}", similar, line.step)
        if found.problem is not None:
            session.console.warn(
                f"step {line.step:,}: the embeddings could not be examined, training continues: "
                f"{in_a_line(found.problem)}"
            )
        values = found.losses | line.values | found.health
        session.log(line.step, values)
        for warning in self._watch.warnings(line.progress, values["epoch"], values):
            session.console.warn(warning)
        progress, loss, speed = line.progress, values["loss"], f"{values['images_per_second']:,.0f} images/s"
        left = duration(values["seconds"] * (1 - progress) / progress) if progress else "?"
        session.console.update("pretraining", progress, f"step {line.step:,}  loss {loss:.3f}  {speed}  {left} left")

    @contextmanager
    def last_line(self) -> Iterator[None]:
        """Writes the pending line, if its figures are known, when the body fails."""
        try:
            yield
        except BaseException:
            with suppress(Exception):
                if distributed.world_size() == 1:
                    self._add_latest()
                self.write_line(wait=False)
            raise

    def _accuracy(self, chosen: Tensor) -> float | None:
        """The kNN accuracy on held-out labels; None if interrupted by a signal, NaN if it failed."""
        images, recipe, stop = self._images, self._components.recipe, self._session.stop
        assert images.labels is not None
        device, backbone = self._components.accelerator.device, self._components.encoder.backbone
        view = standard_view(self._components.views.settings, images.channels)
        if distributed.world_size() > 1:
            # Batch statistics differ between ranks; those of rank 0 are saved and exported.
            distribute_bn(backbone, distributed.world_size(), reduce=False)
        try:
            features = extract(backbone, images, view=view, device=device, ids=chosen, stopped=stop.agreed)
            with raise_on_all_ranks():
                return monitor_knn(features, images.labels[chosen], seed=recipe.seed)
        except Stopped:
            return None
        except Exception as problem:
            if lost_process(problem):
                raise
            self._session.console.warn(f"kNN could not be measured now, training continues: {in_a_line(problem)}")
            return math.nan


def state_of(components: Components, images: Images, step: int, known: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of a step, with the metadata in `known`; copies nothing."""
    lengths = components.objective.shards()
    parts = {"encoder": components.encoder.state_dict(), "objective": components.objective.state_dict()}
    if components.twin is not None:
        parts["twin"] = components.twin.state_dict()
    owned = components.objective.named_parameters()
    sharded = [(parameter, lengths[name]) for name, parameter in owned if name in lengths]
    shards = {f"objective.{name}": length for name, length in lengths.items()}
    shards |= optimiser_shards(components.optimiser, sharded)
    metadata = {**known, "images": images.fingerprint, "channels": images.channels, "held_out": components.held_out}
    metadata["relations"] = components.relations
    metadata["recipe"] = components.recipe.model_dump(mode="json")
    if components.accelerator.scaler is not None:
        metadata["scaler"] = components.accelerator.scaler.state_dict()
    return Checkpoint(step, parts, components.optimiser.state_dict(), metadata, shards)


def pace(order: Order, before: tuple[int, float], now: tuple[int, float]) -> dict[str, float]:
    """Speed between two lines of metrics, each given as its step and seconds of training."""
    (step, seconds), images = now, order.images(now[0]) - order.images(before[0])
    speed = images / max(seconds - before[1], 1e-9)
    return {"images_per_second": speed, "epoch": step / order.steps_per_epoch, "seconds": seconds}


def monitored_ids(labels: Tensor | None, recipe: Recipe, console: Console) -> Tensor | None:
    """The ids of the images for kNN monitoring; None if it is off or impossible."""
    if labels is None or not recipe.train.monitor:
        return None
    labelled = (labels >= 0).nonzero().flatten()
    if len(labelled) < MIN_MONITOR_IMAGES:
        return None
    chosen = labelled[sample_ids(len(labelled), MAX_MONITOR_IMAGES, seed=recipe.seed)]
    most = int(labels[chosen].bincount().max())
    if most < FEWEST_OF_A_CLASS:
        console.warn(
            f"kNN monitoring is left out: it holds out a tenth of each class, which takes {FEWEST_OF_A_CLASS} labelled "
            f"images of one, and among {len(chosen):,} no class has more than {most}; training continues without it"
        )
        return None
    return chosen
