"""What is measured of a run: features of each kind, and what is found of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from manyviews.data import Images, Split, leave_out, of_classes, select
from manyviews.evaluate.layer import distances_of
from manyviews.evaluate.settings import EvaluateSettings
from manyviews.evaluators import fractions, geometry
from manyviews.evaluators.alone import Failed, alone
from manyviews.evaluators.augmented import AugmentedResult, augmented_probe
from manyviews.evaluators.compare import compare
from manyviews.evaluators.kinds import EMBEDDED, LEARNED, PIXELS, RANDOM, in_order, label
from manyviews.evaluators.map import flat_map
from manyviews.evaluators.protocol import Gallery, Task
from manyviews.evaluators.scores import Evaluation
from manyviews.evaluators.splits import num_classes
from manyviews.evaluators.two_views import Pixels, two_views
from manyviews.features import encoding
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.cached import features_of
from manyviews.features.layers import BACKBONE, EMBEDDING, OneLayer, layers_of
from manyviews.linear_metrics import LinearMetric
from manyviews.objectives import Bank
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


def gallery_of(train: Images, test: Images, recipe: Recipe, settings: EvaluateSettings, *, own: bool) -> Gallery:
    """The test images of the classes asked for, or of those that the run has never seen, or of all.

    `own` tells whether the images are the run's.
    """
    others = torch.arange(len(train))
    asked = settings.classes or (recipe.unseen if own else ())
    if not asked:
        return Gallery(torch.arange(len(test)), "seen in training" if own else FOREIGN, others)
    named = of_classes(train, asked)
    unseen = of_classes(train, recipe.unseen) if own and recipe.unseen else others[:0]
    new = torch.isin(named, unseen)
    origin = "never seen in training" if new.all() else f"{'some of them ' if new.any() else ''}seen in training"
    return Gallery(of_classes(test, asked), origin if own else FOREIGN, others[~torch.isin(others, named)])


def kinds_of(
    opened: PretrainedBackbone,
    learned: Sequence[str],
    training: Images | None,
    shown: Images,
    settings: EvaluateSettings,
    console: Console,
    *,
    output: Path | None,
    failed: Failed,
) -> Kinds:
    """Of each kind, the features of the training images, where they are needed, and of those that are shown.

    The run's own are those that `learned` names, in that order. Features are kept below `output`, if that is given. A
    kind but the first that cannot be had is left out, and `failed` is called.
    """
    own = opened.folder / FEATURES if settings.cache and opened.folder is not None else None
    cache = output / FEATURES if settings.cache and output is not None else None
    known: dict[tuple[str, bool], Tensor] = {}

    def encoded(images: Images, *, layer: str = BACKBONE, untrained: bool = False) -> Tensor:
        return features_of(opened, images, settings, console, layer=layer, untrained=untrained, cache=cache, also=own)

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
            return _headed(opened.embedding().module, by(LEARNED, images))
        return encoded(images, layer=EMBEDDING)

    kinds: Kinds = {}
    for kind in (*learned, *((RANDOM, PIXELS) if settings.baselines else ())):
        with alone("features", kind, failed if kinds else None):
            kinds[kind] = None if training is None else by(kind, training), by(kind, shown)
    return kinds


@torch.inference_mode()
def _headed(head: nn.Module, rows: Tensor) -> Tensor:
    """What a head makes of features, float32 on the CPU."""
    device = _device()
    head = head.to(device).eval()
    return torch.cat([head(part.to(device)).float().cpu() for part in rows.split(HEADED)])


def comparison(
    output: Path | None,
    opened: PretrainedBackbone,
    split: Split,
    kinds: Kinds,
    labels: tuple[Tensor, Tensor],
    settings: EvaluateSettings,
    tasks: Sequence[Task],
    gallery: Gallery,
    console: Console,
    failed: Failed,
) -> Evaluation:
    """Every kind of features by the tasks that compare it with labels; fitted metrics go to `output`, if given."""

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
            console.warn(f"{file} could not be written: {problem}")

    def augmented(kind: str) -> AugmentedResult:
        assert split.test is not None
        device, classes = _device(), num_classes(*labels)
        return augmented_probe(
            _backbone_of(opened, kind).to(device),
            split.train,
            split.test,
            opened.prepare,
            settings.protocol.augmented,
            classes,
            share=settings.protocol.held_out,
            seed=settings.protocol.seed,
            device=device,
            workers=settings.workers,
            report=console.report,
        )

    return compare(
        kinds,
        *labels,
        settings.protocol,
        tasks=tasks,
        gallery=gallery,
        metric=settings.metric,
        distances=distances_of(opened, settings),
        keep=keep,
        augmented=augmented,
        report=console.say,
        progress=console.report,
        failed=failed,
    )


def few_labels(
    kinds: Kinds, labels: tuple[Tensor, Tensor], settings: EvaluateSettings, console: Console, failed: Failed
) -> dict[str, tuple[fractions.FractionResult, ...]]:
    """The probe of each kind of features on few labels."""
    own, test_labels = labels
    classes, found = num_classes(own, test_labels), {}
    for kind in in_order(kinds):
        train, test = kinds[kind]
        assert train is not None
        console.say(f"few labels: {label(kind)}")

        def report(what: str, done: int, total: int, kind: str = kind) -> None:
            console.report(f"{what}, {label(kind)} features", done, total)

        with alone("fractions", kind, failed):
            found[kind] = fractions.fractions(
                train, own, test, test_labels, classes, settings.few, seed=settings.protocol.seed, report=report
            )
    return found


def geometries_of(
    opened: PretrainedBackbone,
    recipe: Recipe,
    kinds: Kinds,
    shown: Images,
    settings: EvaluateSettings,
    console: Console,
    failed: Failed,
) -> tuple[geometry.Geometry, ...]:
    """How each kind lies; views are those of the run's own recipe."""
    seed = settings.protocol.seed
    if len(shown) < 2:
        return ()
    console.say("geometry")
    device = _device()
    pairs = recipe.views.model_copy(update={"num_views": 2})
    views = pairs.build(size=shown.size, channels=opened.channels, seed=recipe.seed).to(device)
    ids = _some(len(shown), PAIRED, seed)
    found = []
    for kind in in_order(kinds):
        rows = kinds[kind][1]
        with alone("geometry", kind, failed):
            backbone = _backbone_of(opened, kind).to(device)
            both = two_views(
                backbone, views, shown, ids, channels=opened.channels, device=device, batch_size=settings.batch_size
            )
            found.append(geometry.geometry(kind, rows, both, seed=seed))
    return tuple(found)


def _backbone_of(opened: PretrainedBackbone, kind: str) -> nn.Module:
    """What makes the features of a kind."""
    if kind == EMBEDDED:
        return OneLayer(layers_of(opened, (EMBEDDING,))[0])
    return {LEARNED: opened.backbone, RANDOM: opened.untrained, PIXELS: Pixels}[kind]()


def _device() -> torch.device:
    """Where images are encoded."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def stale_rows(
    opened: PretrainedBackbone, recipe: Recipe, train: Images, settings: EvaluateSettings, console: Console
) -> geometry.Staleness | None:
    """How far a bank's rows are behind what the encoder makes of their images; None without a bank, or its images.

    Collective: each process has its part of the rows, and gives those that were drawn of them.
    """
    assert opened.folder is not None
    own = settings.data is None or settings.data == recipe.data
    if not own or not isinstance(recipe.objective, Bank) or recipe.objective.estimator == "parametric":
        return None
    found, _ = newest_checkpoint(opened.folder / CHECKPOINTS, only=("objective",))
    images = leave_out(train, recipe.unseen)
    if found is None or found.metadata.get("images") != images.fingerprint:
        return None
    if opened.step is not None and found.step != opened.step:
        console.warn(
            f"the rows of the memory bank are not compared with fresh embeddings: the run has gone on to step "
            f"{found.step:,}, and the weights are those of step {opened.step:,}"
        )
        return None
    ids, mine = _some(len(images), PAIRED, settings.protocol.seed), distributed.share(len(images))
    try:
        fresh = features_of(opened, select(images, ids), settings, console, layer="projector", cache=None)
    except ValueError as problem:
        console.warn(f"the rows of the memory bank are not compared with fresh embeddings: {problem}")
        return None
    drawn = ids[(ids >= mine.start) & (ids < mine.stop)] - mine.start
    rows = found.parts["objective"]["rows"][drawn].float().to(_device())
    rows = distributed.gather_without_gradient(rows, distributed.counts(len(rows))).cpu()
    return geometry.staleness(rows, fresh)


def _some(count: int, most: int, seed: int) -> Tensor:
    """At most so many ids, drawn by the seed, ascending."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def maps(
    kinds: Kinds, settings: EvaluateSettings, console: Console, failed: Failed
) -> dict[str, tuple[Tensor, Tensor]]:
    """Maps of some of the images shown, by the features that they are compared by; on the first process alone."""
    leading, (_, rows) = next(iter(kinds.items()))
    seed = settings.protocol.seed
    if len(rows) < FEWEST_MAPPED or distributed.rank() > 0:
        return {}
    ids = _some(len(rows), MAPPED, seed)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for method in settings.maps:
        console.say(f"map of {plural(len(ids), 'image')}: {method}")
        try:
            found[method] = ids, flat_map(rows[ids], method, seed=seed)
        except Exception as problem:
            failed(f"the map {method}", leading, problem)
    return found
