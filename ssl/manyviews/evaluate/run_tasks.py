"""What is measured of a run: features of each kind, and what is found of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from manyviews.data import Images, Split, leave_out, of_classes, sample_ids, select
from manyviews.evaluate.layer import distances_of
from manyviews.evaluate.settings import EvaluateSettings
from manyviews.evaluators import fractions, geometry
from manyviews.evaluators.alone import Failed, alone
from manyviews.evaluators.augmented import augmented_probe
from manyviews.evaluators.compare import compare
from manyviews.evaluators.geometry import Pixels, two_views
from manyviews.evaluators.map import flat_map
from manyviews.evaluators.protocol import Gallery, Task
from manyviews.evaluators.results.kinds import EMBEDDED, LEARNED, PIXELS, RANDOM, in_order, label
from manyviews.evaluators.results.measurement import Evaluation, Measurement
from manyviews.evaluators.splits import Prediction, num_classes
from manyviews.features import encoding
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.cached import features_of
from manyviews.features.layers import BACKBONE, EMBEDDING, OneLayer, layers_of
from manyviews.linear_metrics import LinearMetric
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import newest_checkpoint
from manyviews.run.folder import CHECKPOINTS
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, replacing

FEATURES = "features"
FOREIGN = "of other data than the run's"
PAIRED, MAPPED = 2_000, 2_000
"""Images of which two views are made, and images on a map: more would take longer and show no more."""
FEWEST_MAPPED = 3
HEADED = 8192
"""Features that go through the projector at once."""
Kinds = dict[str, tuple[Tensor | None, Tensor]]
"""Features by kind: of the training images, where they are needed, and of those that are shown."""


class Job(NamedTuple):
    """A run that is measured: on what, how, and what hears of it."""

    opened: PretrainedBackbone
    recipe: Recipe
    split: Split
    settings: EvaluateSettings
    console: Console
    failed: Failed
    """Called where a task fails on a kind of features, which then lacks it."""
    output: Path | None
    """Where features and fitted metrics are kept; None where no file can be written."""

    @property
    def shown(self) -> Images:
        """The held-out images; where there are none, those that the run has learned from."""
        return self.split.train if self.split.test is None else self.split.test

    @property
    def labels(self) -> tuple[Tensor, Tensor] | None:
        """The classes of training and held-out images, where there are both."""
        train, test = self.split.train.labels, None if self.split.test is None else self.split.test.labels
        return None if train is None or test is None else (train, test)


def gallery_of(job: Job, *, own: bool) -> Gallery:
    """The test images of the classes asked for, or of those that the run has never seen, or of all.

    `own` tells whether the images are the run's.
    """
    train, test, recipe, settings = job.split.train, job.shown, job.recipe, job.settings
    others = torch.arange(len(train))
    asked = settings.classes or (recipe.unseen if own else ())
    if not asked:
        return Gallery(torch.arange(len(test)), "seen in training" if own else FOREIGN, others)
    named = of_classes(train, asked)
    unseen = of_classes(train, recipe.unseen) if own and recipe.unseen else others[:0]
    new = torch.isin(named, unseen)
    origin = "never seen in training" if new.all() else f"{'some of them ' if new.any() else ''}seen in training"
    return Gallery(of_classes(test, asked), origin if own else FOREIGN, others[~torch.isin(others, named)])


def kinds_of(job: Job, learned: Sequence[str], *, training: bool) -> Kinds:
    """Of each kind, the features of the training images, where they are needed, and of those that are shown.

    The run's own are those that `learned` names, in that order. A kind but the first that cannot be had is left out.
    """
    opened, shown, settings = job.opened, job.shown, job.settings
    own = opened.folder / FEATURES if settings.cache and opened.folder is not None else None
    cache = job.output / FEATURES if settings.cache and job.output is not None else None
    known: dict[tuple[str, bool], Tensor] = {}

    def encoded(images: Images, *, layer: str = BACKBONE, untrained: bool = False) -> Tensor:
        where = {"cache": cache, "also": own}
        return features_of(opened, images, settings, job.console, layer=layer, untrained=untrained, **where)

    def by(kind: str, images: Images) -> Tensor:
        if kind == PIXELS:
            return encoding.raw_pixels(images, opened.size)
        if kind != EMBEDDED:
            key = kind, images is shown
            if key not in known:
                known[key] = encoded(images, untrained=kind == RANDOM)
            return known[key]
        if not hasattr(opened.backbone(), "forward_summary"):
            # What the projector reads are the backbone's features: no image need be encoded twice.
            return _headed(opened.head(EMBEDDING).module, by(LEARNED, images))
        return encoded(images, layer=EMBEDDING)

    kinds: Kinds = {}
    for kind in (*learned, *((RANDOM, PIXELS) if settings.baselines else ())):
        with alone("features", kind, job.failed if kinds else None):
            kinds[kind] = by(kind, job.split.train) if training else None, by(kind, shown)
    return kinds


@torch.inference_mode()
def _headed(head: nn.Module, rows: Tensor) -> Tensor:
    """What a head makes of features, float32 on the CPU."""
    device = _device()
    head = head.to(device).eval()
    return torch.cat([head(part.to(device)).float().cpu() for part in rows.split(HEADED)])


def comparison(job: Job, kinds: Kinds, tasks: Sequence[Task], gallery: Gallery) -> Evaluation:
    """Every kind of features by the tasks that compare it with labels; fitted metrics are kept."""
    settings, labels, output = job.settings, job.labels, job.output
    assert labels is not None

    def keep(kind: str, fitted: LinearMetric) -> None:
        if distributed.rank() > 0 or output is None:
            return
        assert settings.metric is not None, "only metrics that were asked for are fitted"
        name = kind.replace(" ", "_").replace("(", "").replace(")", "")
        file = output / "metrics" / settings.metric.name / f"{name}.safetensors"
        try:
            make_folder(file.parent, output)
            with replacing(file, output) as (path, _):
                fitted.save(path)
        except (OSError, SafetensorError) as problem:
            job.console.warn(f"{file} could not be written: {problem}")

    def augmented(kind: str) -> Prediction:
        device = _device()
        return augmented_probe(
            _backbone_of(job.opened, kind).to(device),
            job.split.train,
            job.shown,
            job.opened.prepare,
            settings.protocol.augmented,
            num_classes(*labels),
            share=settings.protocol.held_out,
            seed=settings.protocol.seed,
            device=device,
            workers=settings.workers,
            report=job.console.report,
        )

    return compare(
        kinds,
        *labels,
        settings.protocol,
        tasks=tasks,
        gallery=gallery,
        metric=settings.metric,
        distances=distances_of(job.opened, settings),
        keep=keep,
        augmented=augmented,
        report=job.console.say,
        progress=job.console.report,
        failed=job.failed,
    )


def few_labels(job: Job, kinds: Kinds) -> list[Measurement]:
    """The probe of each kind of features on few labels."""
    assert job.labels is not None
    own, test_labels = job.labels
    classes, seed = num_classes(own, test_labels), job.settings.protocol.seed
    found: list[Measurement] = []
    for kind in in_order(kinds):
        train, test = kinds[kind]
        assert train is not None
        job.console.say(f"few labels: {label(kind)}")

        def report(what: str, done: int, total: int, kind: str = kind) -> None:
            job.console.report(f"{what}, {label(kind)} features", done, total)

        with alone("fractions", kind, job.failed):
            found += fractions.fractions(
                train, own, test, test_labels, classes, job.settings.few, seed=seed, kind=kind, report=report
            )
    return found


def geometries_of(job: Job, kinds: Kinds) -> list[Measurement]:
    """How each kind lies; views are those of the run's own recipe."""
    seed, shown, channels = job.settings.protocol.seed, job.shown, job.opened.channels
    found: list[Measurement] = []
    if len(shown) < 2:
        return found
    job.console.say("geometry")
    device, size = _device(), job.settings.batch_size
    pairs = job.recipe.views.model_copy(update={"num_views": 2})
    views = pairs.build(size=shown.size, channels=channels, seed=job.recipe.seed).to(device)
    ids = sample_ids(len(shown), PAIRED, seed=seed)
    for kind in in_order(kinds):
        with alone("geometry", kind, job.failed):
            backbone = _backbone_of(job.opened, kind).to(device)
            both = two_views(backbone, views, shown, ids, channels=channels, device=device, batch_size=size)
            found += geometry.geometry(kind, kinds[kind][1], both, seed=seed)
    return found


def _backbone_of(opened: PretrainedBackbone, kind: str) -> nn.Module:
    """What makes the features of a kind."""
    if kind == EMBEDDED:
        return OneLayer(layers_of(opened, (EMBEDDING,))[0])
    return {LEARNED: opened.backbone, RANDOM: opened.untrained, PIXELS: Pixels}[kind]()


def _device() -> torch.device:
    """Where images are encoded."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def stale_rows(job: Job) -> tuple[Measurement, ...]:
    """How far a bank's rows are behind what the encoder makes of their images; nothing without a bank, or its images.

    Collective: each process has its part of the rows, and gives those that were drawn of them.
    """
    opened, recipe, settings, console = job.opened, job.recipe, job.settings, job.console
    assert opened.folder is not None
    own = settings.data is None or settings.data == recipe.data
    if not own or not recipe.objective.follows_images:
        return ()
    found, _ = newest_checkpoint(opened.folder / CHECKPOINTS, only=("objective",))
    images = leave_out(job.split.train, recipe.unseen)
    if found is None or found.metadata.get("images") != images.fingerprint:
        return ()
    if opened.step is not None and found.step != opened.step:
        console.warn(
            f"the rows of the memory bank are not compared with fresh embeddings: the run has gone on to step "
            f"{found.step:,}, and the weights are those of step {opened.step:,}"
        )
        return ()
    ids, mine = sample_ids(len(images), PAIRED, seed=settings.protocol.seed), distributed.share(len(images))
    try:
        fresh = features_of(opened, select(images, ids), settings, console, layer="projector", cache=None)
    except ValueError as problem:
        console.warn(f"the rows of the memory bank are not compared with fresh embeddings: {problem}")
        return ()
    drawn = ids[(ids >= mine.start) & (ids < mine.stop)] - mine.start
    rows = found.parts["objective"]["rows"][drawn].float().to(_device())
    rows = distributed.gather_without_gradient(rows, distributed.counts(len(rows))).cpu()
    return geometry.staleness(rows, fresh)


def maps(job: Job, kinds: Kinds) -> dict[str, tuple[Tensor, Tensor]]:
    """Maps of some of the images shown, by the features that they are compared by; on the first process alone."""
    leading, (_, rows) = next(iter(kinds.items()))
    seed = job.settings.protocol.seed
    if len(rows) < FEWEST_MAPPED or distributed.rank() > 0:
        return {}
    ids = sample_ids(len(rows), MAPPED, seed=seed)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for method in job.settings.maps:
        job.console.say(f"map of {plural(len(ids), 'image')}: {method}")
        try:
            found[method] = ids, flat_map(rows[ids], method, seed=seed)
        except Exception as problem:
            job.failed(f"the map {method}", leading, problem)
    return found
