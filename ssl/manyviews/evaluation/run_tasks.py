"""Computes every kind of features of a run and measures its tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from manyviews.data import Images, Split, leave_out, of_classes, sample_ids, select
from manyviews.evaluation.settings import EvaluateSettings, recipe_of
from manyviews.evaluators.augmented import augmented_probe
from manyviews.evaluators.compare import compare
from manyviews.evaluators.distance import Euclidean
from manyviews.evaluators.failures import OnFailure, catch_failure
from manyviews.evaluators.geometry import Pixels, geometry, staleness, two_views
from manyviews.evaluators.pair_lists import read_pairs
from manyviews.evaluators.protocol import Gallery
from manyviews.evaluators.relevance import Relevance
from manyviews.evaluators.results.measurement import (
    EMBEDDED,
    LEARNED,
    PIXELS,
    RANDOM,
    Evaluation,
    Measurement,
    Task,
    in_order,
)
from manyviews.evaluators.splits import Prediction, num_classes
from manyviews.evaluators.verification import Pairs
from manyviews.features import encoding
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.cached import features_of
from manyviews.features.layers import BACKBONE, EMBEDDING, OneLayer, layers_of
from manyviews.features.placing import placed
from manyviews.linear_metrics import LinearMetric
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import newest_checkpoint
from manyviews.run.folder import CHECKPOINTS
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.writing import make_folder, replacing

FEATURES = "features"
FOREIGN = "of other data than the run's"
PAIRED = 2_000
"""Images that two views are made of: more would take longer and show no more."""
HEAD_BATCH = 8192
"""Features that go through the projector at once."""
Kinds = dict[str, tuple[Tensor | None, Tensor]]
"""Features by kind: of the training images, if they are needed, and of the images shown."""


class Job(NamedTuple):
    """A run to measure, the images to measure it on, and where messages and files go."""

    pretrained: PretrainedBackbone
    split: Split
    settings: EvaluateSettings
    console: Console
    on_failure: OnFailure
    """Called if a task fails on a kind of features, which is then left out."""
    output: Path | None
    """Folder for features, fitted metrics and clusters; None if it cannot be written to."""
    pairs: Pairs | None = None
    """Pairs to verify, by their positions in the images shown, then in the training images."""

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return recipe_of(self.pretrained)

    @property
    def shown(self) -> Images:
        """The held-out images, or the training images if there are none."""
        return self.split.train if self.split.test is None else self.split.test

    @property
    def labelled(self) -> bool:
        """Whether training and held-out images have classes."""
        return is_labelled(self.split)

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """The classes of training images and images shown, −1 without one."""
        train, test = self.split.train.labels, self.shown.labels
        if not self.labelled or train is None or test is None:
            return torch.full((len(self.split.train),), -1), torch.full((len(self.shown),), -1)
        return train, test

    @property
    def paired(self) -> Tensor:
        """Ids of training images, other than those shown, that the pairs have."""
        images = torch.empty(0, dtype=torch.int64) if self.pairs is None else self.pairs.images.unique()
        return images[images >= len(self.shown)] - len(self.shown)


def is_labelled(split: Split) -> bool:
    """Returns whether images are held out, and they and the training images have classes."""
    return split.train.labels is not None and split.test is not None and split.test.labels is not None


def pairs_of(split: Split, settings: EvaluateSettings) -> Pairs | None:
    """Reads the pairs of the settings, of held-out or training images; None without a file.

    Raises:
        ValueError: as `read_pairs` does.
    """
    if settings.pairs is None:
        return None
    names = [*(split.train if split.test is None else split.test).names]
    names += [] if split.test is None else [*split.train.names]
    return read_pairs(settings.pairs, names, settings.protocol.verification, seed=settings.protocol.seed)


def gallery_of(job: Job, *, own: bool) -> Gallery:
    """Returns the test images of the given classes, or of the run's unseen ones, or all.

    `own` is whether the images are the run's.
    """
    train, test, recipe, settings = job.split.train, job.shown, job.recipe, job.settings
    others = torch.arange(len(train))
    classes = settings.classes or (recipe.unseen if own else ())
    if not classes:
        return Gallery(torch.arange(len(test)), "seen in training" if own else FOREIGN, others)
    named = of_classes(train, classes)
    unseen = of_classes(train, recipe.unseen) if own and recipe.unseen else others[:0]
    new = torch.isin(named, unseen)
    origin = "never seen in training" if new.all() else f"{'some of them ' if new.any() else ''}seen in training"
    return Gallery(of_classes(test, classes), origin if own else FOREIGN, others[~torch.isin(others, named)])


def kinds_of(job: Job, learned: Sequence[str], *, training: bool) -> Kinds:
    """Computes the features of every kind, the run's own (`learned`) first, in their order.

    A kind other than the first that cannot be computed is left out.
    """
    pretrained, shown, settings = job.pretrained, job.shown, job.settings
    own = pretrained.folder / FEATURES if settings.cache and pretrained.folder is not None else None
    cache = job.output / FEATURES if settings.cache and job.output is not None else None
    encoded: dict[tuple[str, bool], Tensor] = {}

    def features(kind: str, images: Images) -> Tensor:
        if kind == PIXELS:
            return encoding.raw_pixels(images, pretrained.view)
        if kind == EMBEDDED and not hasattr(pretrained.backbone(), "forward_summary"):
            # The projector reads the backbone's features: no image need be encoded twice.
            return _project(pretrained.head(EMBEDDING).module, features(LEARNED, images))
        key = kind, images is shown
        if key not in encoded:
            layer, untrained = EMBEDDING if kind == EMBEDDED else BACKBONE, kind == RANDOM
            encoded[key] = features_of(
                pretrained, images, settings, job.console, layer=layer, untrained=untrained, cache=cache, also=own
            )
        return encoded[key]

    kinds: Kinds = {}
    for kind in (*learned, *((RANDOM, PIXELS) if settings.baselines else ())):
        with catch_failure("features", kind, job.on_failure if kinds else None):
            kinds[kind] = features(kind, job.split.train) if training else None, features(kind, shown)
    return kinds


@torch.inference_mode()
def _project(head: nn.Module, features: Tensor) -> Tensor:
    """The output of a projection head, float32 on the CPU."""
    device = _device()
    head = head.to(device).eval()
    return torch.cat([head(part.to(device)).float() for part in features.split(HEAD_BATCH)]).cpu()


def labelled_tasks(
    job: Job,
    kinds: Kinds,
    tasks: Sequence[Task],
    gallery: Gallery,
    relevance: Relevance | None,
    thresholds: Mapping[str, float],
) -> Evaluation:
    """Measures the tasks that compare images, with labels, pairs, relevances or none; fitted metrics are saved."""
    settings, labels, output = job.settings, job.labels, job.output

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
            _backbone_of(job.pretrained, kind).to(device),
            job.split.train,
            job.shown,
            job.pretrained.view,
            settings.protocol.augmented,
            num_classes(*labels),
            share=settings.protocol.held_out,
            seed=settings.protocol.seed,
            device=device,
            workers=settings.workers,
            report=job.console.report,
        )

    # By default the embedding is searched by the distance that its objective trains.
    by_euclidean = settings.metric is None and job.recipe.objective.traits.distance == "euclidean"
    return compare(
        kinds,
        *labels,
        settings.protocol,
        tasks=tasks,
        gallery=gallery,
        pairs=job.pairs,
        relevance=relevance,
        thresholds=thresholds,
        few=settings.few,
        metric=settings.metric,
        distances={EMBEDDED: Euclidean()} if by_euclidean else None,
        keep=keep,
        augmented=augmented,
        report=job.console.say,
        progress=job.console.report,
        on_failure=job.on_failure,
    )


def geometries_of(job: Job, kinds: Kinds) -> list[Measurement]:
    """Measures the geometry of each kind of features, with the views of the run's own recipe."""
    seed, shown, channels = job.settings.protocol.seed, job.shown, job.pretrained.channels
    measurements: list[Measurement] = []
    if len(shown) < 2:
        return measurements
    job.console.say("geometry")
    device, size = _device(), job.settings.batch_size
    pairs = job.recipe.views.model_copy(update={"num_views": 2, "local": 0})
    views = pairs.build(size=job.pretrained.size, channels=channels, seed=job.recipe.seed).to(device)
    ids = sample_ids(len(shown), PAIRED, seed=seed)
    for kind in in_order(kinds):
        with catch_failure("geometry", kind, job.on_failure):
            backbone = _backbone_of(job.pretrained, kind).to(device)
            both = two_views(backbone, views, shown, ids, channels=channels, device=device, batch_size=size)
            measurements += geometry(kind, placed(kinds[kind][1]), both, seed=seed)
    return measurements


def _backbone_of(pretrained: PretrainedBackbone, kind: str) -> nn.Module:
    """The module that computes a kind of features."""
    if kind == EMBEDDED:
        return OneLayer(layers_of(pretrained, (EMBEDDING,))[0])
    if kind == PIXELS:
        return Pixels(pretrained.view.mean, pretrained.view.std)
    return pretrained.backbone() if kind == LEARNED else pretrained.untrained()


def _device() -> torch.device:
    """The device that images are encoded on."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def stale_rows(job: Job) -> tuple[Measurement, ...]:
    """Measures the staleness of a run's memory bank, if there is one; collective.

    Each rank owns a part of the rows, and gives those of its part that were sampled.
    """
    pretrained, recipe, settings, console = job.pretrained, job.recipe, job.settings, job.console
    assert pretrained.folder is not None
    own = settings.data is None or settings.data == recipe.data
    if not own or not recipe.objective.traits.follows_images:
        return ()
    checkpoint, _ = newest_checkpoint(pretrained.folder / CHECKPOINTS, only=("objective",))
    images = leave_out(job.split.train, recipe.unseen)
    if checkpoint is None or checkpoint.metadata.get("images") != images.fingerprint:
        return ()
    ids, mine = sample_ids(len(images), PAIRED, seed=settings.protocol.seed), distributed.share(len(images))
    try:
        if pretrained.step is not None and checkpoint.step != pretrained.step:
            raise ValueError(f"the weights are of step {pretrained.step:,}, and the rows of step {checkpoint.step:,}")
        fresh = features_of(pretrained, select(images, ids), settings, console, layer="projector", cache=None)
    except ValueError as problem:
        console.warn(f"the rows of the memory bank are not compared with fresh embeddings: {problem}")
        return ()
    sampled = ids[(ids >= mine.start) & (ids < mine.stop)] - mine.start
    rows = checkpoint.parts["objective"]["rows"][sampled].float().to(_device())
    rows = distributed.gather_without_gradient(rows, distributed.counts(len(rows))).cpu()
    return staleness(rows, fresh)
