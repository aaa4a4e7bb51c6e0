"""Which of the folders of a data set hold the images to learn from, and which the held-out ones."""

from collections.abc import Sequence
from pathlib import Path

from manyviews.data.listing.listing import Listing, listing_of
from manyviews.data.listing.walk import PassedOver
from manyviews.system.files import shown
from manyviews.system.plural import plural

TRAIN = ("train", "training")
HELD_OUT = (("test", "testing"), ("val", "valid", "validation"), ("dev",), ("eval", "evaluation"))
"""Names of folders of held-out images, in any case; of several the first one with labels is used."""
MOST_NAMED = 3
NO_SPLITS = "data.splits=false reads folders of any name alike"


def splits_of(
    root: Path, names: Sequence[str], passed: PassedOver, *, tested: bool
) -> tuple[Listing, tuple[Listing, ...]]:
    """The images to learn from, and those that may be held out, the first choice first.

    Args:
        root: the data folder.
        names: those of all images below it.
        passed: hears of images that belong to no split.
        tested: the held-out images are elsewhere (`data.test`), and none are looked for.

    Raises:
        ValueError: the names can be read in several ways; the message says how to choose one.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, slash, _ = name.partition("/")
        folders.setdefault(folder if slash else "", []).append(name)
    trains = sorted(folder for folder in folders if folder.casefold() in TRAIN)
    groups = [sorted(folder for folder in folders if folder.casefold() in group) for group in HELD_OUT]
    held_out = [folder for group in groups for folder in group]
    others = sorted(folders.keys() - {*trains, *held_out})
    here = shown(root)

    def split(folder: str) -> Listing:
        return listing_of(root, folders[folder], f"{folder}/")

    for same in (trains, *([] if tested else groups)):
        if len(same) > 1:
            first = shown(root / same[0])
            way = f"data.path={first} data.test=FOLDER" if same is trains else f"data.test={first}"
            raise ValueError(f"{here} holds {_all(same)}, names of one split: say which, as in {way}; {NO_SPLITS}")
    if not trains and not held_out:
        _refuse_splits_below(root, names)
        return listing_of(root, names), ()
    if trains and (held_out or tested or not others):
        unused = [*others, *held_out] if tested else others
        passed.unused += [
            f"{plural(len(folders[folder]), 'image')} {_where(folder)}, beside {trains[0]}/" for folder in unused
        ]
        return split(trains[0]), () if tested else tuple(map(split, held_out))
    if trains:
        raise ValueError(
            f"{here} holds {trains[0]}/ beside {_all(others)}, and no folder of held-out images. "
            f"data.path={shown(root / trains[0])} reads {trains[0]}/ alone; {NO_SPLITS}"
        )
    if tested and others:
        reason = f"a name of held-out images, while data.test is another folder ({NO_SPLITS})"
        passed.unused += [f"{plural(len(folders[name]), 'image')} in {name}/, {reason}" for name in held_out]
        return listing_of(root, [name for folder in others for name in folders[folder]]), ()
    if len(held_out) == 1 and not others:
        return split(held_out[0]), ()
    ways = f"data.test={shown(root / held_out[0])} holds it out; " if others else ""
    raise ValueError(
        f"{here} holds {_all([*held_out, *others])}, and no train/: which images are to be learned from? {ways}"
        f"data.path={shown(root / held_out[0])} reads it alone; {NO_SPLITS}"
    )


def _refuse_splits_below(root: Path, names: Sequence[str]) -> None:
    """Raises where a sub-folder holds images to learn from and held-out ones, which would be mixed."""
    seen: dict[str, set[str]] = {}
    for name in names:
        parts = name.split("/", 2)
        if len(parts) > 2:
            seen.setdefault(parts[0], set()).add(parts[1].casefold())
    known = {folder for group in HELD_OUT for folder in group}
    mixed = sorted(folder for folder, below in seen.items() if below & known and below & {*TRAIN})
    if mixed:
        raise ValueError(
            f"{shown(root / mixed[0])} holds images to learn from and held-out ones, in folders of such names. "
            f"data.path={shown(root / mixed[0])} reads them so; {NO_SPLITS}"
        )


def _all(folders: Sequence[str]) -> str:
    """Some folders as a list in a sentence."""
    named = [shown(f"{folder}/") if folder else "images in no sub-folder" for folder in folders[:MOST_NAMED]]
    rest = [f"{len(folders) - MOST_NAMED} more"] if len(folders) > MOST_NAMED else []
    *first, last = [*named, *rest]
    return f"{', '.join(first)} and {last}" if first else last


def _where(folder: str) -> str:
    return f"in {folder}/" if folder else "in no sub-folder"
