"""Pictures of what an objective samples, at times of the run, in its folder and TensorBoard."""

from manyviews.evaluators.confusion import as_pixels
from manyviews.evaluators.sampling import MOST, SamplingFigures, sampling_figures
from manyviews.evaluators.sampling_plots import sampling_figure
from manyviews.recipe import Recipe
from manyviews.run.folder import SAMPLING
from manyviews.system import distributed
from manyviews.system.launch import in_a_line, lost_process
from manyviews.train.session import Session
from manyviews.train.step import StepResult

DPI = 100


class SamplingPictures:
    """Writes the figures of a step's batch as often as kNN is monitored, and of the last step; `add` is collective.

    Objectives that sample no pairs or triplets have none, nor do given relations. One that fails is a warning.
    """

    def __init__(self, recipe: Recipe, session: Session, progress: float) -> None:
        self._recipe, self._session = recipe, session
        self._sampling = recipe.objective.traits.sampling if recipe.data.relations is None else None
        self._times = max(recipe.train.monitor, 1)
        self._written = int(progress * self._times)

    def due(self, progress: float) -> bool:
        """Whether the figures of this step are due."""
        return self._sampling is not None and int(progress * self._times) > self._written

    def add(self, step: int, progress: float, result: StepResult) -> None:
        """Writes the figures of a batch, after `step` steps."""
        self._written = int(progress * self._times)
        views = result.embeddings[: self._recipe.keys]
        kept = slice(0, max(MOST // (len(views) * distributed.world_size()), 1))
        counts = distributed.counts(len(result.ids))
        lengths = distributed.counts(len(result.ids[kept]))
        rows = distributed.gather_without_gradient(views[:, kept].transpose(0, 1).contiguous(), lengths)
        ids = distributed.gather_without_gradient(result.ids[kept], lengths)
        if self._session.run is None or self._sampling is None:
            return
        try:
            figures = sampling_figures(
                rows.transpose(0, 1).float().cpu(),
                ids.cpu(),
                self._sampling,
                normalized=self._recipe.objective.traits.distance == "cosine",
                seed=self._recipe.seed,
                step=step - 1,
            )
            self._write(figures.model_copy(update={"step": step, "whole": counts == lengths}))
        except Exception as problem:
            if lost_process(problem):
                raise
            self._session.console.warn(
                f"step {step:,}: there is no picture of the sampling, training continues: {in_a_line(problem)}"
            )

    def _write(self, figures: SamplingFigures) -> None:
        run = self._session.run
        assert run is not None
        run.picture(SAMPLING, as_pixels(sampling_figure(figures), DPI), figures.step)
        run.keep(f"{SAMPLING}.json", figures.model_dump_json())
