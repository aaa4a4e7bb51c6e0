"""Prints what a run will do, before its first step."""

from pathlib import Path

import torch

from manyviews.data import ClassOrder, Images, RelationOrder, RelationTable
from manyviews.data.listing.inventory import copy_warnings
from manyviews.data.pictures import reads_crops
from manyviews.data.relation_order import LISTS
from manyviews.objectives.cost import Sizes
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.files import shown
from manyviews.system.plural import plural
from manyviews.train.components import cautions, negatives_of
from manyviews.train.setup import Setup


def describe(setup: Setup, folder: Path, console: Console) -> None:
    """Prints what will run."""
    split, order, components, contrasts = setup.split, setup.order, setup.components, setup.contrasts
    recipe, accelerator, train = components.recipe, components.accelerator, split.train
    processes, parameters = distributed.world_size(), sum(p.numel() for p in components.encoder.parameters())
    local, chunk = recipe.train.batch_size // processes, recipe.train.part
    each = f" ({local} on each)" if processes > 1 else ""
    each += f" in chunks of {chunk}" if chunk is not None and chunk < local else ""
    budget = plural(recipe.train.minutes, "minute") if recipe.train.minutes else plural(recipe.train.epochs, "epoch")
    budget += f", {plural(order.steps_per_epoch, 'step')} an epoch"
    precision = accelerator.mixed_precision.replace("no", "fp32")
    console.say(f"images     {len(train):,} of {recipe.data.name}, {pixels_of(train)}")
    if split.layout:
        console.say(f"layout     {split.layout}")
    if recipe.unseen and train.labels is not None:
        learned = set(train.labels.tolist())
        left_out = [name for number, name in enumerate(train.classes) if number not in learned]
        console.say(f"unseen     {shown(', '.join(left_out))}: left out of training")
    if isinstance(order, RelationOrder) and setup.relations is not None:
        console.say(f"relations  {relations_in_words(setup.relations, order, recipe.unrelated == 'negatives')}")
    views = recipe.views
    small = f" and {views.local} local ones, {views.local_size} px" if views.local else ""
    context = components.encoder.context
    if context is not None:
        side, passing = context.grid.patches, context.grid.patches**2 * min(chunk or local, local)
        small = f", cut into {side} × {side} patches of {context.grid.side} px: {passing:,} pass the encoder at once"
    console.say(f"views      {views.num_views} per image, {views.size} px{small}")
    console.say(
        f"encoder    {recipe.encoder.name}: {components.encoder.num_features:,} features, {parameters:,} parameters"
    )
    silent = (
        "" if recipe.objective.traits.bounds_information else "; it bounds no information, so the metrics hold none"
    )
    console.say(f"objective  {recipe.objective.name}{silent}")
    ids = len(train) if components.names is None else int(components.names.max()) + 1
    dim = components.encoder.dim
    of_an_image = components.encoder.per_image(views.num_views + views.local)
    sizes = Sizes(ids, of_an_image, recipe.train.batch_size, dim, processes, recipe.keys)
    cost = recipe.objective.cost(sizes)
    cost = cost._replace(negatives=negatives_of(recipe, split.train, contrasts, cost.negatives))
    if setup.relations is None:
        console.say(f"negatives  {cost}{' on average' if contrasts is not None else ''}")
    console.say(
        f"training   {budget}, batch {recipe.train.batch_size}{each}, {recipe.optim.name}, {precision} on "
        f"{processes} × {accelerator.device.type} ({plural(torch.get_num_threads(), 'thread')})"
    )
    if setup.extended:
        console.say(setup.extended)
    console.say(f"run        {folder.resolve()}")
    for caution in (*cautions(components), *(copy_warnings(split) if distributed.rank() == 0 else ())):
        console.warn(caution)
    if contrasts is not None and contrasts.without_negatives:
        console.warn(
            f"in {contrasts.without_negatives:,} of {plural(contrasts.batches, 'batch', 'batches')} all images are of "
            "one class, and have no negatives; train.images_per_class=… fills each batch with several classes"
        )
    if isinstance(order, ClassOrder) and order.left_out:
        console.warn(
            f"{order.left_out:,} images have no class, or one of fewer than train.images_per_class={order.per_class} "
            "images, and are left out of training"
        )


def relations_in_words(relations: RelationTable, order: RelationOrder, negatives: bool) -> str:
    """What the relations are, how many images they have, and how batches and epochs are made of them."""
    own = order.size - 1
    lists = plural(order.lists, LISTS[order.kind])
    of_items = f", {len(relations.ids):,} relevances" if order.kind == "ranked" else ""
    each = f" of a query and {plural(own, 'item')}" if order.kind == "ranked" else ""
    others = "; other images of a batch are negatives" if negatives else ""
    each += f" and {order.unrelated:,} images of none" if order.unrelated else ""
    batch = f"a batch has {order.per_batch:,}{each}, an epoch is a pass over them{others}"
    return f"{lists}{of_items}, of {plural(relations.images, 'image')}; {batch}"


def pixels_of(images: Images) -> str:
    """What is read of images: their pixels in memory, or crops of the files."""
    channels = "grey" if images.channels == 1 else "in colour"
    if reads_crops(images):
        return f"{channels}, cropped from the files as needed, at full resolution"
    if images.aspects is None:
        return f"{images.channels} × {images.size} × {images.size}"
    squeezed = f"whole and of any shape, squeezed to {images.size} × {images.size} in memory"
    return f"{channels}, {squeezed} (with data.memory=0 cropped from the files)"
