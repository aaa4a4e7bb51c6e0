"""Reads the relations of a recipe, checks that its objective can be trained by them, and makes lists of them."""

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch

from manyviews.data import Split
from manyviews.data.relation_files import open_relations
from manyviews.data.relation_order import list_size
from manyviews.data.relations import RelationTable, read_relations
from manyviews.objectives import OBJECTIVES
from manyviews.objectives.relations import Kind, Lists, Relations
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import Checkpoint
from manyviews.system.console import Console
from manyviews.system.first_rank import from_first

NAMES: dict[Kind, str] = {"pairs": "pairs", "triplets": "triplets", "ranked": "ranked lists"}


def relations_of(recipe: Recipe, split: Split, console: Console) -> RelationTable | None:
    """Reads the relations of the training images, if there are others than sets; collective.

    Raises:
        ValueError: the file is not of relations, or recipe and relations do not go together.
    """
    if recipe.data.relations is None:
        return None
    path = Path(recipe.data.relations)
    kind = from_first(partial(_kind, path))
    if kind == "sets":
        recipe.check_views()
        if recipe.unrelated == "negatives":
            raise ValueError("unrelated=negatives is for pairs, triplets and ranked lists; leave it out with sets")
        if recipe.ids == "images":
            console.warn(
                f"the sets of {path} are the classes of images, from which nothing is learned with ids=images; "
                "ids=labels makes images of a set positives of each other"
            )
        return None
    _check(recipe, kind)
    held_out = () if split.test is None else split.test.names
    others = chain(held_out, split.left_out, (name for name, _ in split.unreadable))
    table = from_first(partial(read_relations, path, split.train.names, others))
    for note in table.notes:
        console.warn(f"{path}: {note}")
    return table


def _kind(path: Path) -> Kind | Literal["sets"]:
    with open_relations(path) as (kind, _, _):
        return kind


def _check(recipe: Recipe, kind: Kind) -> None:
    """Raises ValueError for a recipe that cannot be trained by relations of this kind."""
    name, train = recipe.objective.name, recipe.train
    if kind not in recipe.objective.traits.relations:
        able = [other for other, settings in OBJECTIVES.items() if kind in settings().traits.relations]
        raise ValueError(
            f"objective={name} is not trained by {NAMES[kind]}, which data.relations={recipe.data.relations} holds; "
            f"use objective={' or '.join(able)}"
        )
    if recipe.ids == "labels":
        raise ValueError(
            f"ids=labels makes classes of the images, and the {NAMES[kind]} of data.relations are of images "
            "themselves; use ids=images, or similar sets (name,set)"
        )
    if not train.drop_last:
        raise ValueError("train.drop_last=false does not go with data.relations, whose batches are whole; leave it out")
    if train.items_per_query is not None and kind != "ranked":
        raise ValueError(
            f"train.items_per_query={train.items_per_query} is for ranked lists (query,item,relevance), and "
            f"data.relations={recipe.data.relations} holds {NAMES[kind]}; leave it out"
        )


def lists_of(recipe: Recipe, relations: RelationTable | None) -> Lists | None:
    """The lists that the objective looks relations up in; of pairs either image may be the query."""
    if relations is None:
        return None
    ids, numbers, others = relations.ids, relations.numbers.float()[:, None], recipe.unrelated == "negatives"
    if relations.kind == "pairs":
        both = torch.cat([ids, ids.flip(1)]), numbers.repeat(2, 1)
        return Lists(Relations("pairs", *both, size=2, others=others))
    size = list_size(relations, recipe.train.items_per_query)
    if relations.kind == "triplets":
        return Lists(Relations("triplets", ids, torch.tensor([[1.0, 0.0]]).repeat(len(ids), 1), size, others))
    return Lists(Relations("ranked", ids, numbers, size, others))


def check_relations(checkpoint: Checkpoint, relations: RelationTable | None) -> None:
    """Raises ValueError for other relations than those of a checkpoint."""
    now = None if relations is None else relations.fingerprint
    if checkpoint.metadata.get("relations") != now:
        raise ValueError(
            "the relations are not those that the run was started with (the file of data.relations was changed); put "
            "it back, or start another run with output=…"
        )
