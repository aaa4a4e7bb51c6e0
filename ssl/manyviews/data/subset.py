"""Subsets of images: by ids, of some classes, or without some classes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from manyviews.data.decoding.files import Files
from manyviews.data.images import Images, InMemory, Names, fingerprint
from manyviews.data.sources.paths import same_spelling
from manyviews.data.sources.stl10 import Mapped
from manyviews.system.names import did_you_mean, some
from manyviews.system.plural import plural


def sample_ids(count: int, limit: int, *, seed: int) -> Int64[Tensor, " drawn"]:
    """Up to `limit` sorted ids below `count`, sampled with `seed`.

    Examples:
        >>> sample_ids(3, 5, seed=0)
        tensor([0, 1, 2])
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


def select(images: Images, keep: Int64[Tensor, " kept"]) -> Images:
    """The images of these ids, in their order, with new ids from 0; raises ValueError if none.

    Examples:
        >>> from manyviews.data import Sample
        >>> len(select(Sample().build().test, torch.tensor([3, 5])))
        2
    """
    if not len(keep):
        raise ValueError(f"none of {plural(len(images), 'image')} is left")
    assert isinstance(images, InMemory | Mapped | Files)
    names = Names(images.names[index] for index in keep.tolist())
    changed: dict[str, Any] = {"names": names, "fingerprint": fingerprint([images.fingerprint, keep.numpy()])}
    if isinstance(images, Files):
        changed["failed"] = {
            name: images.failed[name] for name in (names if images.failed else ()) if name in images.failed
        }
        changed["reported"] = set(changed["failed"])
    # All that has a row per image.
    for field in ("labels", "pixels", "rows", "states", "digests", "aspects"):
        if (rows := getattr(images, field, None)) is not None:
            changed[field] = rows[keep]
    return dataclasses.replace(images, **changed)


def of_classes(images: Images, classes: Sequence[int | str]) -> Int64[Tensor, " kept"]:
    """Sorted ids of images of these classes; a number is a name if all names are numbers.

    Raises:
        ValueError: an unknown class, or images without labels.

    Examples:
        >>> from manyviews.data import Sample
        >>> of_classes(Sample().build().test, ["Bag"]).shape
        torch.Size([200])
    """
    if images.labels is None:
        raise ValueError(
            f"classes {', '.join(map(str, classes))} are selected, but these images have no labels; put them into one "
            "folder for each class"
        )
    numbers = torch.tensor(sorted({_number(images.classes, entry) for entry in classes}), dtype=torch.int64)
    return torch.isin(images.labels, numbers).nonzero().flatten()


def leave_out(images: Images, classes: Sequence[int | str]) -> Images:
    """All images but those of these classes; raises ValueError as `of_classes` and `select` do.

    Examples:
        >>> from manyviews.data import Sample
        >>> len(leave_out(Sample().build().test, ["Bag", "Sandal"]))
        1600
    """
    if not classes:
        return images
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[of_classes(images, classes)] = False
    return select(images, kept.nonzero().flatten())


def _number(classes: Sequence[str], entry: int | str) -> int:
    text = str(entry)
    name = same_spelling(classes)(text)
    if name is not None:
        return classes.index(name)
    if text.isdecimal():
        # 2 stands for a folder called 02.
        named = [index for index, each in enumerate(classes) if each.isdecimal() and int(each) == int(text)]
        if len(named) == 1:
            return named[0]
        if not all(each.isdecimal() for each in classes):
            if int(text) < len(classes):
                return int(text)
            raise ValueError(f"class {text} is not one of the {len(classes)} classes, numbered from 0")
    raise ValueError(f"{entry!r} is not one of the classes ({some(classes, 10)}){did_you_mean(text, classes, 1, 0.5)}")
