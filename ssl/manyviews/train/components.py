"""The parts that a recipe is made of, built for a set of images; and what is to be said of how they go together."""

from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from jaxtyping import Int64
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from manyviews.data import ClassOrder, Images, Order
from manyviews.data.labels import values_of
from manyviews.data.sampler import Composition, composition, way_out
from manyviews.encoder.encoder import Encoder, MomentumTwin
from manyviews.features.limits import check_encoder, check_objective, check_views
from manyviews.objectives import ObjectiveModule, Population
from manyviews.recipe import Recipe
from manyviews.train.session import wrap
from manyviews.views import Views, enlarged

M = TypeVar("M", bound=nn.Module)


class Components(NamedTuple):
    """The parts that move during a run, on their device, alike on every process."""

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
    """What the objective gets as the id of each image (int64, [images]), where that is not its index."""
    shuffled: bool
    """Whether the twin's samples are exchanged between the processes, for the sake of its batch norms."""
    stored: int
    """Side of the images, in pixels, before they are cropped."""
    held_out: str | None = None
    """The fingerprint of the held-out images, where there are some."""


def build(recipe: Recipe, accelerator: Accelerator, images: Images) -> Components:
    """All parts of a run for a set of images.

    Raises:
        ValueError: if a part cannot be built for the images, or does not go with another.
    """
    names, processes = label_names(images) if recipe.ids == "labels" else None, accelerator.num_processes
    check_views(recipe, images=len(images), channels=images.channels, stored=images.size, processes=processes)
    views = recipe.views.build(size=images.size, channels=images.channels, seed=recipe.seed)
    check_encoder(recipe.encoder, channels=images.channels, size=views.window.size)
    torch.manual_seed(recipe.seed)
    encoder = recipe.encoder.build(channels=images.channels, size=views.window.size)
    chunk, smallest = recipe.train.chunk, smallest_part(encoder)
    if chunk is not None and chunk < smallest:
        raise ValueError(
            f"train.chunk={chunk}: the encoder's batch norms need at least {smallest} images at a time; "
            f"use train.chunk={smallest} or more, or an encoder without batch norm"
        )
    split, several = recipe.encoder.batch_norm_splits > 1, accelerator.num_processes > 1
    shuffled = several and not split and recipe.objective.shuffles and has_batch_norm(encoder)
    # A batch norm that is split or shuffled is to see a part of the batch only: synchronising it would undo that.
    if several and not split and not shuffled and accelerator.device.type == "cuda":
        encoder = synchronised(encoder)
    encoder = encoder.to(accelerator.device)
    if recipe.train.channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)
    values = None if recipe.values is None else values_of(images, recipe.values)
    population = Population(torch.arange(len(images)) if names is None else names, values)
    check_objective(recipe, ids=population.size, dim=encoder.dim, processes=processes)
    objective = recipe.objective.build(dim=encoder.dim, population=population, seed=recipe.seed)
    objective, views = objective.to(accelerator.device), views.to(accelerator.device)
    twin = MomentumTwin(encoder) if recipe.objective.twin_momentum is not None else None
    optimiser = recipe.optim.build(encoder, objective, batch_size=recipe.train.batch_size)
    forward, optimiser = wrap(accelerator, torch.compile(encoder) if recipe.train.compile else encoder, optimiser)
    if names is not None:
        names = names.to(accelerator.device)
    parts = (views, encoder, forward, twin, objective, optimiser, names, shuffled)
    return Components(recipe, accelerator, *parts, images.size)


def batches(recipe: Recipe, images: Images, processes: int, begun_on: int | None = None) -> Order:
    """The batches of a run; with `train.drop_last=false` a smaller last one, unless it is too small to be trained on.

    It is kept where each process gets 2 images of it at least, for each part of a split batch norm. With
    `train.images_per_class` the batches are made by the labels.

    Args:
        recipe: the recipe.
        images: what there is to train on.
        processes: over how many processes a batch is shared.
        begun_on: the number of processes of the run that is resumed.

    Raises:
        ValueError: if there are too few images, or if an epoch has another number of steps than it was begun with.
    """
    num_images, per_class = len(images), recipe.train.images_per_class
    if per_class is not None:
        return ClassOrder(labels_of(images), recipe.train.batch_size, per_class, recipe.seed)

    def order(number: int) -> Order:
        smallest = None if recipe.train.drop_last else 2 * recipe.encoder.batch_norm_splits * number
        return Order(num_images, recipe.train.batch_size, recipe.seed, smallest=smallest)

    found = order(processes)
    if begun_on is not None and order(begun_on).steps_per_epoch != found.steps_per_epoch:
        raise ValueError(
            f"the last batch of an epoch ({num_images % recipe.train.batch_size} images) is large enough for either "
            f"{begun_on} processes, on which the run was begun, or {processes}, so that its steps would mean other "
            f"images; resume it on {begun_on}"
        )
    return found


def check_classes(recipe: Recipe, images: Images, order: Order) -> Composition | None:
    """What the batches hold where classes are the ids; None where images are.

    Raises:
        ValueError: if nothing could be learned: all images have one class, or no batch holds the negatives, or the
            positives, that the objective takes from it.
    """
    if recipe.ids != "labels":
        return None
    ids, name = label_names(images), recipe.objective.name
    instead = "ids=images, as in the recipes called …_instances, makes each image a class of its own"
    if int(ids.max()) == 0:
        raise ValueError(
            f"ids=labels takes negatives from other classes, and all {len(ids):,} images are of one class; {instead}"
        )
    views = 1 if recipe.objective.splits_views else recipe.views.num_views
    found = composition(order, ids, views=views, paired=recipe.objective.pairs_off)
    if recipe.objective.negatives_from != "batch":
        return found
    size, per_class = recipe.train.batch_size, recipe.train.images_per_class
    asked = f"train.batch_size={size}" + (f" and train.images_per_class={per_class}" if per_class else "")
    fewer = way_out(ids.bincount().numpy(), size, size // 2)
    if found.without_negatives == found.batches:
        raise ValueError(
            f"objective={name} takes negatives from the batch, and with {asked} each batch holds one class alone: the "
            f"loss would be 0 without anything learned; {fewer}"
        )
    if found.without_positives == found.batches:
        raise ValueError(
            f"objective={name} takes positives from the batch, and with {asked}, of one view each, no batch "
            "holds two images of a class; {fewer}, or set views.num_views=2"
        )
    return found


def negatives_of(recipe: Recipe, images: Images, found: Composition | None, most: int) -> int:
    """Negatives of an anchor in a step, on average over the anchors where classes are the ids.

    Args:
        recipe: the recipe.
        images: what there is to train on.
        found: what the batches hold.
        most: the objective's number where each image is a class of its own.
    """
    if found is None or recipe.objective.negatives_from == "rows":
        return most
    if recipe.objective.negatives_from == "queue":
        # What stands in the queue are images of all classes, by their shares.
        shares = label_names(images).bincount().double() / len(images)
        return round(most * (1 - shares.square().sum().item()))
    return round(found.negatives)


def label_names(images: Images) -> Int64[Tensor, " images"]:
    """An id for each image that it shares with the images of its label; each image without a label has its own.

    The ids are numbered without gaps, as rows of class weights are.

    Raises:
        ValueError: if no image has a label.
    """
    labels = labels_of(images)
    alone = labels.max() + 1 + torch.arange(len(labels))
    ids: Tensor = torch.where(labels >= 0, labels, alone).unique(return_inverse=True)[1]
    return ids


def labels_of(images: Images) -> Int64[Tensor, " images"]:
    """The labels of images that have some.

    Raises:
        ValueError: if no image has a label.
    """
    labels = images.labels
    if labels is None or not bool((labels >= 0).any()):
        raise ValueError(
            "ids=labels makes images of the same label positives of each other, but these images have no labels; put "
            "them into one folder for each class, or use ids=images"
        )
    return labels


def smallest_part(encoder: Encoder) -> int:
    """The fewest images that may pass the encoder by themselves in training: 2 for each part of a batch norm."""
    return 2 * encoder.batch_norm_splits if has_batch_norm(encoder) else 1


def synchronised(module: M) -> M:
    """The module with batch norms that normalise by the batch of all processes.

    By timm: where a norm of its kind has its activation inside, torch's conversion would lose that.
    """
    converted: M = convert_sync_batchnorm(module)
    return converted


def has_batch_norm(module: nn.Module) -> bool:
    """Whether samples that pass the module together in training change each other."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(child, norms) for child in module.modules())


def cautions(components: Components) -> list[str]:
    """What does not forbid a run, but should be known before it begins."""
    recipe, processes = components.recipe, components.accelerator.num_processes
    chunk, normed, local = recipe.train.chunk, has_batch_norm(components.encoder), recipe.train.batch_size // processes
    larger = enlarged(components.views.window.size, components.stored, recipe.data)
    said = [] if larger is None else [f"views.size: {larger}"]
    if chunk is not None and chunk >= local:
        said.append(f"train.chunk={chunk} changes nothing: a process has no more than {local} images of a batch")
    elif chunk is not None and normed:
        joined = processes if any(isinstance(child, nn.SyncBatchNorm) for child in components.encoder.modules()) else 1
        said.append(
            "batch norms normalise each chunk by its own statistics, of about "
            f"{chunk * joined} images and not of {local * joined}: in "
            "this alone the gradient is not that of the whole batch; an encoder without batch norm has exactly that one"
        )
    if components.twin is not None and normed and not components.shuffled and recipe.encoder.batch_norm_splits == 1:
        cure = "encoder.batch_norm_splits=2 hides it"
        if processes > 1:
            cure = f"objective.shuffle=true, where the objective has it, or {cure}"
        said.append(
            "the encoder and its twin normalise the same batch, through which the loss can be lowered without "
            f"learning anything (He et al. 2020, section 3.3); {cure}"
        )
    return said
