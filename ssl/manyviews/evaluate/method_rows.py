"""Runs grouped into methods, by what differs between their recipes, and baselines: a row of measurements for each."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyviews.evaluators.results.kinds import GROUPING, LAYERS, LEARNED, PIXELS, RANDOM, is_learned, leading
from manyviews.evaluators.results.measurement import TITLES, Evaluation, Measurement
from manyviews.evaluators.results.side_by_side import Row, by_title
from manyviews.features.backbone import PretrainedBackbone
from manyviews.recipe import Recipe

BASELINES = (RANDOM, PIXELS)
LONGEST = 36
"""Characters of a method's name, so that a table of methods still fits."""


class MeasuredRun(NamedTuple):
    """A run with what was measured of it."""

    opened: PretrainedBackbone
    record: Mapping[str, Any]
    """What its evaluation.json holds of these images and this protocol."""
    evaluation: Evaluation
    """The same, with what is known of each image."""
    kinds: tuple[str, ...] = (LEARNED,)
    """Its own kinds of features that were asked for, the one first by which images are compared."""


class Group(NamedTuple):
    """Runs that stand in one row, by the kinds of features that its numbers may be of."""

    name: str
    kinds: Sequence[str]
    runs: Sequence[MeasuredRun]


def rows_of(
    runs: Sequence[MeasuredRun], looks: Collection[str], *, baselines: bool, apart: bool = False
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """A row for each method, then for each baseline, of what all runs were measured by; and what is to be noted.

    A method's numbers are each of the layer that its objective trains for it; `apart` gives each layer a row.

    Raises:
        ValueError: if there is nothing that all runs were measured by.
    """
    notes = [f"{run.opened.name}: {text}" for run in runs for text in run.record.get("warnings", ())]
    shared = _shared(runs, looks, BASELINES if baselines else (), notes)
    if not shared:
        raise ValueError("\n".join(["there is nothing that all these runs were measured by", *dict.fromkeys(notes)]))
    recipes = [recipe_of(run.opened).model_dump(mode="json", exclude={"seed", "output", "resume"}) for run in runs]
    named = methods(recipes, [run.opened.name for run in runs])
    groups = [*_methods(named, runs, apart=apart), *(_baselines(named, runs) if baselines else ())]
    return tuple(_row(group, shared, looks) for group in groups), tuple(dict.fromkeys(notes))


def recipe_of(opened: PretrainedBackbone) -> Recipe:
    """The recipe of a run."""
    assert opened.recipe is not None, "only runs are compared"
    return opened.recipe


def _shared(
    runs: Sequence[MeasuredRun], looks: Collection[str], baselines: Sequence[str], notes: list[str]
) -> list[str]:
    """The titles of what all kinds of features of all runs have; a note on what not all have."""
    measured = [by_title(run.evaluation, kind, looks) for run in runs for kind in (*run.kinds, *baselines)]
    found: dict[str, Measurement] = {}
    for run in runs:
        found |= by_title(run.evaluation, run.kinds[0], looks)
    shared = [title for title in found if all(title in own for own in measured)]
    if missing := [title for title in found if title not in shared]:
        notes.append(f"{', '.join(missing)}: left out, for not all runs were measured so; tasks=… names it for all")
    if len({str(run.evaluation.gallery.get("classes")) for run in runs}) > 1:
        # What is looked up among other classes is harder or easier.
        if grouped := [title for title in shared if found[title].task in GROUPING]:
            notes.append(
                f"{', '.join(grouped)}: left out, for the runs were measured so on other classes than each other; "
                "classes=… names the same ones for all"
            )
        shared = [title for title in shared if title not in grouped]
    return shared


def _methods(named: Mapping[str, Sequence[int]], runs: Sequence[MeasuredRun], *, apart: bool) -> Iterator[Group]:
    for name, places in named.items():
        own = [runs[place] for place in places]
        # Seeds of a method are measured by one layer.
        kinds = [kind for kind in own[0].kinds if all(kind in run.kinds for run in own)] or [LEARNED]
        if apart:
            yield from (Group(f"{name} ({LAYERS[kind]})", [kind], own) for kind in kinds)
        else:
            yield Group(name, kinds, own)


def _baselines(named: Mapping[str, Sequence[int]], runs: Sequence[MeasuredRun]) -> Iterator[Group]:
    """Each baseline once, of the runs that do not share it."""
    for kind in BASELINES:
        groups: dict[str, dict[int, int]] = {}
        for place, run in enumerate(runs):
            same, seed = _same_baseline(kind, run.opened)
            groups.setdefault(same, {}).setdefault(seed, place)
        for group in groups.values():
            places = list(group.values())
            of = next(name for name, own in named.items() if places[0] in own)
            yield Group(kind if len(groups) == 1 else f"{kind} ({of})", [kind], [runs[place] for place in places])


def _same_baseline(kind: str, opened: PretrainedBackbone) -> tuple[str, int]:
    """What a baseline follows from but for the seed, and the seed: equal for runs that share it."""
    if kind == PIXELS:
        return str(opened.size), 0
    own, seen = recipe_of(opened).encoder, (opened.size, opened.channels)
    return repr((own.name, own.pretrained, own.drop_path, seen)), recipe_of(opened).seed


def _row(group: Group, shared: Sequence[str], looks: Collection[str]) -> Row:
    measured: dict[str, tuple[Measurement, ...]] = {}
    hits: dict[str, Tensor] = {}
    by_run = [{kind: by_title(run.evaluation, kind, looks) for kind in group.kinds} for run in group.runs]
    for title in shared:
        task = by_run[0][group.kinds[0]][title].task
        kind = leading(group.kinds, task)
        measured[title] = tuple(own[kind][title] for own in by_run)
        name = f"{task}/{kind}"
        if task in TITLES and all(name in run.evaluation.hits for run in group.runs):
            each = torch.stack([run.evaluation.hits[name] for run in group.runs])
            hits[task] = each[:, each[0] >= 0] == 1
    names, seeds = zip(*((run.opened.name, recipe_of(run.opened).seed) for run in group.runs), strict=True)
    return Row(group.name, names, seeds, measured, not is_learned(group.kinds[0]), hits)


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
