"""Monitoring: kNN accuracy on held-out labels of the training images, some times in the run."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor

from manyviews.data import Images
from manyviews.evaluators.knn import monitor_knn
from manyviews.features.encoding import Stopped, extract
from manyviews.recipe import Recipe
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import in_a_line, lost_process
from manyviews.train.budget import Budget
from manyviews.train.components import Components
from manyviews.train.session import Session
from manyviews.views import plain

MIN_MONITOR_IMAGES, MAX_MONITOR_IMAGES = 100, 5_000
FEWEST_OF_A_CLASS = 5
"""Images of a class from which a tenth, rounded, is one that can be held out."""


class Monitor:
    """Measures kNN on some of the training images `train.monitor` times in the run."""

    def __init__(
        self,
        components: Components,
        images: Images,
        budget: Budget,
        session: Session,
        step: int,
        metadata: Mapping[str, Any],
    ) -> None:
        """From a step on; `metadata` is that of the checkpoint that is resumed, empty in a new run."""
        self._components, self._images, self._budget, self._session = components, images, budget, session
        self._times = components.recipe.train.monitor
        self._chosen = monitored_ids(images.labels, components.recipe, session.console)
        self._cut_off = bool(metadata.get("cut_off", False))
        self._measured = max(int(budget.progress(step) * self._times) - self._cut_off, 0)
        self._best: tuple[int, float | None] = step, metadata.get("score")

    def measure_if_due(self, step: int, progress: float) -> bool:
        """Measures where it is time; whether the accuracy is the best so far; collective."""
        due = int(progress * self._times)
        if self._chosen is None or due <= self._measured:
            return False
        with self._budget.paused():
            accuracy = self._accuracy(self._chosen)
            best = accuracy is not None and self._session.saver.improves(accuracy, step)
        self._cut_off = accuracy is None
        if accuracy is None:
            return False
        self._measured = due
        if best:
            self._best = step, accuracy
        if not math.isnan(accuracy):
            self._session.log(step, {"knn": accuracy})
            what = "kNN on held-out labels of the training images"
            self._session.console.say(f"{100 * progress:3.0f}%  {what} {100 * accuracy:.1f} %")
        return best

    def metadata(self, step: int) -> dict[str, Any]:
        """What a resume needs to know: whether a signal has cut a measurement off, and a score that is the best."""
        return {"cut_off": self._cut_off, "score": self._best[1] if self._best[0] == step else None}

    def _accuracy(self, chosen: Tensor) -> float | None:
        """The accuracy on held-out labels; None where a signal cut it off; collective.

        NaN where it could not be measured, on all processes, which is a warning: a measurement never ends the training.
        """
        images, recipe, stop = self._images, self._components.recipe, self._session.stop
        assert images.labels is not None
        assert recipe.views.size is not None
        device, backbone = self._components.accelerator.device, self._components.encoder.backbone
        prepare = partial(plain, size=recipe.views.size)
        if distributed.world_size() > 1:
            # Each process has statistics of its own, and those of the first one are saved and exported.
            distribute_bn(backbone, distributed.world_size(), reduce=False)
        try:
            features = extract(backbone, images, prepare=prepare, device=device, ids=chosen, stopped=stop.agreed)
            with raise_on_all_ranks():
                return monitor_knn(features, images.labels[chosen], seed=recipe.seed)
        except Stopped:
            return None
        except Exception as problem:
            if lost_process(problem):
                raise
            self._session.console.warn(f"kNN could not be measured now, training goes on: {in_a_line(problem)}")
            return math.nan


def monitored_ids(labels: Tensor | None, recipe: Recipe, console: Console) -> Tensor | None:
    """The ids of the images that kNN monitoring looks at; None where it cannot, or is not wanted."""
    if labels is None or not recipe.train.monitor:
        return None
    labelled = (labels >= 0).nonzero().flatten()
    if len(labelled) < MIN_MONITOR_IMAGES:
        return None
    generator = torch.Generator().manual_seed(recipe.seed)
    chosen = labelled[torch.randperm(len(labelled), generator=generator)[:MAX_MONITOR_IMAGES]].sort().values
    most = int(labels[chosen].bincount().max())
    if most < FEWEST_OF_A_CLASS:
        console.warn(
            f"kNN monitoring is left out: it holds out a tenth of each class, which takes {FEWEST_OF_A_CLASS} labelled "
            f"images of one, and among {len(chosen):,} no class has more than {most}; training goes on without it"
        )
        return None
    return chosen
