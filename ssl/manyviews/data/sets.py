"""Makes the sets of a relations file the classes of images."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from manyviews.data.decoding.files import Files
from manyviews.data.images import Images, InMemory, Split, fingerprint
from manyviews.data.relation_files import open_relations
from manyviews.data.relations import RelationTable, read_relations
from manyviews.data.sources.source import Source
from manyviews.data.sources.stl10 import Mapped
from manyviews.system.first_rank import from_first
from manyviews.system.plural import plural


def with_sets(split: Split, data: Source) -> Split:
    """The images with the sets of `data.relations` as their classes; other relations change nothing; collective.

    Images of both splits may be named; those that are not have no class.

    Raises:
        ValueError: the file is not of relations, its sets name no training image, or data.labels has classes too.
    """
    if data.relations is None:
        return split
    path = Path(data.relations)
    parts = [part for part in (split.train, split.test) if part is not None]
    unreadable = [name for name, _ in split.unreadable]
    table = from_first(partial(_sets_in, path, list(chain.from_iterable(part.names for part in parts)), unreadable))
    if table is None:
        return split
    labels = getattr(data, "labels", None)
    if labels not in (None, "none"):
        raise ValueError(
            f"data.relations={path} has sets, which are classes, and data.labels={labels} has classes too; leave one "
            "out"
        )
    numbers = torch.full((sum(map(len, parts)),), -1)
    numbers[table.ids.flatten()] = table.numbers.long()
    count = len(split.train)
    if not bool((numbers[:count] >= 0).any()):
        raise ValueError(f"data.relations={path} names no training image: all in its sets are held out")
    layout = f"{plural(len(table.sets), 'set')} of {path.name} are the classes"
    return split._replace(
        train=_classed(split.train, numbers[:count], table.sets),
        test=None if split.test is None else _classed(split.test, numbers[count:], table.sets),
        layout=f"{split.layout}; {layout}" if split.layout else layout,
    )


def _sets_in(path: Path, names: Sequence[str], others: Sequence[str]) -> RelationTable | None:
    with open_relations(path) as (kind, _, _):
        pass
    return read_relations(path, names, others) if kind == "sets" else None


def _classed(images: Images, labels: Int64[Tensor, " images"], classes: tuple[str, ...]) -> Images:
    none = not bool((labels >= 0).any())
    changed: dict[str, Any] = {"labels": None if none else labels, "classes": () if none else classes}
    changed["fingerprint"] = fingerprint([images.fingerprint, labels.numpy(), *classes])
    assert isinstance(images, InMemory | Mapped | Files)
    return dataclasses.replace(images, **changed)
