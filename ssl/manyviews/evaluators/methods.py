"""Which runs are seeds of one method, and what the methods are called: by what differs between their recipes."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

LONGEST = 36
"""Characters of a method's name, so that a table of methods still fits."""


def methods(recipes: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> dict[str, list[int]]:
    """The places of the runs of each method, by its name, in the order of their first runs.

    Runs with equal recipes are of one method. It is called by what differs between the methods, as on a command line
    (objective=queue), or, where that would be long or nothing differs, by what its folders' names have in common.

    Args:
        recipes: of each run, as a tree, without what the seeds of one method differ in.
        folders: of each run, no two the same.
    """
    flat = [leaves(recipe) for recipe in recipes]
    groups: list[list[int]] = []
    for place, recipe in enumerate(flat):
        own = next((group for group in groups if flat[group[0]] == recipe), None)
        if own is None:
            groups.append([place])
        else:
            own.append(place)
    said = _differences([flat[group[0]] for group in groups])
    if not all(said) or max(map(len, said)) > LONGEST:
        said = [_common([Path(folders[place]).name for place in group]) for group in groups]
    if not all(said) or len(set(said)) < len(said):
        said = [folders[group[0]] for group in groups]
    return dict(zip(said, groups, strict=True))


def _differences(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is different in each, in words."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    differing = [key for key in keys if any(key not in own or own[key] != recipes[0].get(key) for own in recipes)]
    # The temperature of one objective is not that of another: where the names differ, they say it all.
    parts = [key.removesuffix("name") for key in differing if key.endswith(".name")]
    told = [key for key in differing if key.endswith(".name") or not any(key.startswith(part) for part in parts)]
    return [" ".join(f"{key.removesuffix('.name')}={own[key]}" for key in told if key in own) for own in recipes]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _common(names: Sequence[str]) -> str:
    """What all names begin with: quickstart of quickstart-0 and quickstart-1."""
    if len(names) == 1:
        return names[0]
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return "".join(column[0] for column in letters).rstrip("-_. ")
