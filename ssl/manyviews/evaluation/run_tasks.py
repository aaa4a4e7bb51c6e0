"""Computes every kind of features of a run and measures its tasks."""

from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from manyviews.data import Images, leave_out, sample_ids, select
from manyviews.evaluation.job import Job
from manyviews.evaluators.augmented import augmented_probe
from manyviews.evaluators.compare import compare
from manyviews.evaluators.distance import Euclidean
from manyviews.evaluators.failures import catch_failure
from manyviews.evaluators.geometry import Pixels, geometry, staleness, two_views
from manyviews.evaluators.map import flat_map
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
from manyviews.features import encoding
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.cached import features_of
from manyviews.features.layers import BACKBONE, EMBEDDING, OneLayer, layers_of
from manyviews.features.placing import placed
from manyviews.linear_metrics import LinearMetric
from manyviews.run.checkpoints import newest_checkpoint
from manyviews.run.folder import CHECKPOINTS
from manyviews.system import distributed
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, replacing

FEATURES = "features"
PAIRED, MAPPED = 2_000, 2_000
"""Images that two views are made of, and images on a map: more would take longer and show no more."""
FEWEST_MAPPED = 3
HEAD_BATCH = 8192
"""Features that go through the projector at once."""
Kinds = dict[str, tuple[Tensor | None, Tensor]]
"""Features by kind: of the training images, if they are needed, and of the images shown."""


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
        metric_pairs=job.metric_pairs,
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


def maps(job: Job, kinds: Kinds) -> dict[str, tuple[Tensor, Tensor]]:
    """Computes maps of some of the images shown, by the first kind of features; on rank 0 alone."""
    leading, (_, rows) = next(iter(kinds.items()))
    seed = job.settings.protocol.seed
    if len(rows) < FEWEST_MAPPED or distributed.rank() > 0:
        return {}
    ids = sample_ids(len(rows), MAPPED, seed=seed)
    points: dict[str, tuple[Tensor, Tensor]] = {}
    for method in job.settings.maps:
        job.console.say(f"map of {plural(len(ids), 'image')}: {method}")
        try:
            points[method] = ids, flat_map(rows[ids], method, seed=seed)
        except Exception as problem:
            job.on_failure(f"the map {method}", leading, problem)
    return points
