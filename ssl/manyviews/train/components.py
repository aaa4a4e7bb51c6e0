"""Builds the training components of a recipe and warns of risky combinations."""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Int64
from torch import Tensor, nn

from manyviews.data import ClassOrder, Images, Order, RelationOrder, RelationTable
from manyviews.data.labels import values_of
from manyviews.data.relation_order import list_size
from manyviews.data.sampler import Composition, composition, way_out
from manyviews.encoder.encoder import Encoder, MomentumTwin
from manyviews.encoder.sync_batch_norm import synchronise_batch_norms
from manyviews.features.limits import check_encoder, check_objective, check_views
from manyviews.objectives import ObjectiveModule, Population
from manyviews.recipe import Recipe
from manyviews.system import distributed
from manyviews.train.relations import lists_of
from manyviews.train.session import wrap
from manyviews.views import Views, enlarged


class Components(NamedTuple):
    """Training components on their device; identical on every rank."""

    recipe: Recipe
    accelerator: Accelerator
    views: Views
    encoder: Encoder
    forward: nn.Module
    """The encoder as Accelerate wraps it: what a step calls."""
    twin: MomentumTwin | None
    objective: ObjectiveModule
    optimiser: Any
    names: Tensor | None
    """The id of each image for the objective (int64, [images]); None: its index."""
    shuffled: bool
    """Whether the twin's samples are shuffled between ranks, for its batch norms."""
    enlarged: str | None
    """A warning if views have more pixels than the images."""
    held_out: str | None = None
    """The fingerprint of the held-out images."""
    relations: str | None = None
    """The fingerprint of the relations."""


def build(
    recipe: Recipe,
    accelerator: Accelerator,
    images: Images,
    relations: RelationTable | None = None,
    *,
    alone: bool = False,
) -> Components:
    """Builds all components for a set of images; `alone`, as if there were one process, and not compiled.

    Raises:
        ValueError: if a component cannot be built for the images, or does not go with another.
    """
    names, processes = label_names(images) if recipe.ids == "labels" else None, distributed.world_size()
    check_views(recipe, images=len(images), channels=images.channels, stored=images.size, processes=processes)
    views = recipe.views.build(size=images.size, channels=images.channels, seed=recipe.seed)
    check_encoder(recipe.encoder, channels=images.channels, size=views.window.size)
    torch.manual_seed(recipe.seed)
    local_size = views.settings.local_size if views.settings.local else None
    encoder = recipe.encoder.build(channels=images.channels, size=views.window.size, local_size=local_size)
    chunk, smallest = recipe.train.part, smallest_part(encoder)
    if chunk is not None and chunk < smallest:
        raise ValueError(
            f"train.chunk={chunk}: the encoder's batch norms need at least {smallest} images at a time; "
            f"use train.chunk={smallest} or more, or an encoder without batch norm"
        )
    split, several = recipe.encoder.batch_norm_splits > 1, processes > 1
    shuffled = several and not split and recipe.objective.traits.shuffles and has_batch_norm(encoder)
    # A split or shuffled batch norm must see only a part of the batch.
    if several and not split and not shuffled and accelerator.device.type == "cuda":
        synchronise_batch_norms(encoder)
    encoder = encoder.to(accelerator.device)
    if recipe.train.channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)
    values = None if recipe.values is None else values_of(images, recipe.values)
    # Without relations no image comes twice in a batch, and with images per class no other number of a class.
    alike = None if relations is not None else 1 if names is None else recipe.train.images_per_class
    lists = lists_of(recipe, relations)
    lists = None if lists is None else lists.to(accelerator.device)
    ids = torch.arange(len(images)) if names is None else names
    grid = None if encoder.context is None else encoder.context.grid.patches
    population = Population(ids, values, alike, recipe.keys, lists, grid)
    of_an_image = encoder.per_image(recipe.views.num_views + recipe.views.local)
    check_objective(recipe, ids=population.size, embeddings=of_an_image, dim=encoder.dim, processes=processes)
    objective = recipe.objective.build(dim=encoder.dim, population=population, seed=recipe.seed)
    objective, views = objective.to(accelerator.device), views.to(accelerator.device)
    twin = MomentumTwin(encoder) if recipe.objective.traits.twin_momentum is not None else None
    optimiser = recipe.optim.build(encoder, objective, batch_size=recipe.train.batch_size)
    compiled = torch.compile(encoder, dynamic=False) if recipe.train.compile and not alone else encoder
    forward, optimiser = wrap(accelerator, compiled, optimiser, alone=alone)
    if names is not None:
        names = names.to(accelerator.device)
    parts = (views, encoder, forward, twin, objective, optimiser, names, shuffled)
    built = Components(recipe, accelerator, *parts, enlarged(views.window.size, images, recipe.data))
    return built if relations is None else built._replace(relations=relations.fingerprint)


def batches(
    recipe: Recipe,
    images: Images,
    processes: int,
    begun_on: int | None = None,
    relations: RelationTable | None = None,
) -> Order:
    """The batch sampler of a run: of relations, with `train.images_per_class` by label, or else of all images.

    With `train.drop_last=false` an epoch ends with a smaller batch, if that has 2 images for each process and each part
    of a split batch norm. `begun_on` is the world size of the run that is resumed.

    Raises:
        ValueError: if there are too few images, or an epoch has other steps than on the `begun_on` processes.
    """
    num_images, per_class = len(images), recipe.train.images_per_class
    if relations is not None:
        size, others = list_size(relations, recipe.train.items_per_query), torch.ones(num_images, dtype=torch.bool)
        others[relations.ids] = False
        drawn: dict[str, Any] = {"others": others.nonzero().flatten(), "unrelated": recipe.train.unrelated}
        return RelationOrder(relations, size, recipe.train.batch_size, recipe.seed, processes=processes, **drawn)
    if per_class is not None:
        return ClassOrder(labels_of(images), recipe.train.batch_size, per_class, recipe.seed)

    def order(number: int) -> Order:
        smallest = None if recipe.train.drop_last else 2 * recipe.encoder.batch_norm_splits * number
        return Order(num_images, recipe.train.batch_size, recipe.seed, smallest=smallest)

    sampler = order(processes)
    if begun_on is not None and order(begun_on).steps_per_epoch != sampler.steps_per_epoch:
        raise ValueError(
            f"the last batch of an epoch ({num_images % recipe.train.batch_size} images) is large enough for either "
            f"{begun_on} processes, on which the run was started, or {processes}, so that its steps would mean other "
            f"images; resume it on {begun_on}"
        )
    return sampler


def check_classes(recipe: Recipe, images: Images, order: Order) -> Composition | None:
    """Counts positives and negatives in the batches, with ids=labels; else None.

    Raises:
        ValueError: if nothing could be learned: one class only, or no batch with the negatives or positives that the
            objective takes from it.
    """
    if recipe.ids != "labels":
        return None
    ids, name = label_names(images), recipe.objective.name
    instead = "ids=images, as in the recipes called …_instances, makes each image a class of its own"
    if int(ids.max()) == 0:
        raise ValueError(
            f"ids=labels takes negatives from other classes, and all {len(ids):,} images are of one class; {instead}"
        )
    views = 1 if recipe.objective.traits.splits_views else recipe.views.num_views
    counts = composition(order, ids, views=views, paired=recipe.objective.traits.pairs_off)
    if recipe.objective.traits.negatives_from != "batch":
        return counts
    size, per_class = recipe.train.batch_size, recipe.train.images_per_class
    asked = f"train.batch_size={size}" + (f" and train.images_per_class={per_class}" if per_class else "")
    fewer = way_out(ids.bincount().numpy(), size, size // 2)
    if counts.without_negatives == counts.batches:
        raise ValueError(
            f"objective={name} takes negatives from the batch, and with {asked} each batch holds one class alone: the "
            f"loss would be 0 without anything learned; {fewer}"
        )
    # A local view has a positive in its own image.
    if counts.without_positives == counts.batches and not recipe.views.local:
        raise ValueError(
            f"objective={name} takes positives from the batch, and with {asked}, of one view each, no batch "
            f"holds two images of a class; {fewer}, or set views.num_views=2"
        )
    return counts


def negatives_of(recipe: Recipe, images: Images, counts: Composition | None, most: int) -> int:
    """Mean negatives per anchor, from `check_classes`; `most` with every image a class."""
    if counts is None or recipe.objective.traits.negatives_from == "rows":
        return most
    if recipe.objective.traits.negatives_from == "queue":
        # The queue holds images of all classes, by their shares.
        shares = label_names(images).bincount().double() / len(images)
        return round(most * (1 - shares.square().sum().item()))
    return round(counts.negatives)


def label_names(images: Images) -> Int64[Tensor, " images"]:
    """An id for each label, without gaps; an image without a label has its own.

    Raises:
        ValueError: if no image has a label.
    """
    labels = labels_of(images)
    alone = labels.max() + 1 + torch.arange(len(labels))
    ids: Tensor = torch.where(labels >= 0, labels, alone).unique(return_inverse=True)[1]
    return ids


def labels_of(images: Images) -> Int64[Tensor, " images"]:
    """The labels of images; raises ValueError if no image has one."""
    labels = images.labels
    if labels is None or not bool((labels >= 0).any()):
        raise ValueError(
            "ids=labels makes images of the same label positives of each other, but these images have no labels; put "
            "them into one folder for each class, or use ids=images"
        )
    return labels


def smallest_part(encoder: Encoder) -> int:
    """The smallest training batch: 2 images for each part of a batch norm, or 1 without."""
    return 2 * encoder.batch_norm_splits if has_batch_norm(encoder) else 1


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the module has a batch norm."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(child, norms) for child in module.modules())


def less_memory(components: Components) -> str:
    """The settings by which a step takes less memory."""
    settings = components.recipe.train
    local = max(settings.batch_size // components.accelerator.num_processes, 1)
    at_once = min(settings.part or local, local)
    half, lower = max(at_once // 2, smallest_part(components.encoder)), "views.size or train.batch_size"
    if half >= at_once:
        return f"lower {lower}, or take a smaller encoder"
    return (
        f"set train.chunk={half}, where {at_once} images of a process pass at once (the same gradient, for one more "
        f"forward pass), or lower {lower}"
    )


def cautions(components: Components) -> list[str]:
    """Warnings to show before the first step."""
    recipe, processes = components.recipe, components.accelerator.num_processes
    chunk, normed, local = recipe.train.part, has_batch_norm(components.encoder), recipe.train.batch_size // processes
    warnings = [] if components.enlarged is None else [f"views.size: {components.enlarged}"]
    if chunk is not None and chunk >= local:
        warnings.append(f"train.chunk={chunk} changes nothing: a process has no more than {local} images of a batch")
    elif chunk is not None and normed:
        joined = processes if any(isinstance(child, nn.SyncBatchNorm) for child in components.encoder.modules()) else 1
        warnings.append(
            "batch norms normalise each chunk by its own statistics, of about "
            f"{chunk * joined} images and not of {local * joined}: in "
            "this alone the gradient is not that of the whole batch; an encoder without batch norm has exactly that one"
        )
    if components.twin is not None and normed and not components.shuffled and recipe.encoder.batch_norm_splits == 1:
        cure = "encoder.batch_norm_splits=2 hides it"
        if processes > 1:
            cure = f"objective.shuffle=true, where the objective has it, or {cure}"
        warnings.append(
            "the encoder and its twin normalise the same batch, through which the loss can be lowered without "
            f"learning anything (He et al. 2020, section 3.3); {cure}"
        )
    return warnings
