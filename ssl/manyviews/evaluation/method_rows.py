"""Groups runs into methods by their recipes; makes a row for each method and baseline."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyviews.evaluation.settings import recipe_of
from manyviews.evaluators.results.measurement import (
    GROUPING,
    LAYERS,
    LEARNED,
    PIXELS,
    RANDOM,
    TITLES,
    Evaluation,
    Measurement,
    in_order,
    is_learned,
)
from manyviews.evaluators.results.side_by_side import Row, by_title
from manyviews.features.backbone import PretrainedBackbone

BASELINES = (RANDOM, PIXELS)
LONGEST = 36
"""Most characters of a method's name, so that a table of methods fits the terminal."""


class MeasuredRun(NamedTuple):
    """A run with its measurements."""

    pretrained: PretrainedBackbone
    record: Mapping[str, Any]
    """The record in evaluation.json of these images and this protocol."""
    evaluation: Evaluation
    """The same, with the results of single images."""
    kinds: tuple[str, ...] = (LEARNED,)
    """Its own kinds of features; images are compared by the first."""


def rows_of(
    runs: Sequence[MeasuredRun], tasks: Collection[str], *, baselines: bool, apart: bool = False
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Returns rows of the methods and baselines, of measurements that all runs have, and notes.

    The numbers of a method are each of the layer that its objective trains for it; `apart` gives each layer a row.

    Raises:
        ValueError: if there is no measurement that all runs have.
    """
    notes = [f"{run.pretrained.name}: {text}" for run in runs for text in run.record.get("warnings", ())]
    shared = _shared(runs, tasks, BASELINES if baselines else (), notes)
    if not shared:
        raise ValueError("\n".join(["these runs have no measurement in common", *dict.fromkeys(notes)]))
    recipes = [recipe_of(run.pretrained).model_dump(mode="json", exclude={"seed", "output", "resume"}) for run in runs]
    rows = []
    by_method = methods(recipes, [run.pretrained.name for run in runs])
    for name, indices in by_method.items():
        own = [runs[index] for index in indices]
        # Seeds of a method are measured by one layer.
        kinds = [kind for kind in own[0].kinds if all(kind in run.kinds for run in own)] or [LEARNED]
        if apart:
            rows += [_row(f"{name} ({LAYERS[kind]})", [kind], own, shared, tasks) for kind in kinds]
        else:
            rows.append(_row(name, kinds, own, shared, tasks))
    for name, kind, own in _baselines(by_method, runs) if baselines else ():
        rows.append(_row(name, [kind], own, shared, tasks))
    return tuple(rows), tuple(dict.fromkeys(notes))


def _shared(
    runs: Sequence[MeasuredRun], tasks: Collection[str], baselines: Sequence[str], notes: list[str]
) -> list[str]:
    """The titles of the measurements that all runs have; adds a note on the others."""
    measured = [by_title(run.evaluation, kind, tasks) for run in runs for kind in (*run.kinds, *baselines)]
    of_any: dict[str, Measurement] = {}
    for run in runs:
        of_any |= by_title(run.evaluation, run.kinds[0], tasks)
    shared = [title for title in of_any if all(title in own for own in measured)]
    if missing := [title for title in of_any if title not in shared]:
        notes.append(f"{', '.join(missing)}: left out, because not all runs have it; tasks=… measures it for all")
    by = {str(own.details.get("by")) for run in runs for own in run.evaluation.of("ranking")}
    if len(by) > 1 and (ranked := [title for title in shared if of_any[title].task == "ranking"]):
        notes.append(
            f"{', '.join(ranked)}: left out, because the runs were judged by different relevances ({', '.join(by)}); "
            "protocol.ranking.by=… names the same one for all"
        )
        shared = [title for title in shared if title not in ranked]
    if len({str(run.evaluation.gallery.get("classes")) for run in runs}) > 1:
        # Retrieval among other classes is harder or easier.
        if grouped := [title for title in shared if of_any[title].task in GROUPING]:
            notes.append(
                f"{', '.join(grouped)}: left out, because the runs were measured on different classes; classes=… "
                "names the same ones for all"
            )
        shared = [title for title in shared if title not in grouped]
    return shared


def _baselines(
    by_method: Mapping[str, Sequence[int]], runs: Sequence[MeasuredRun]
) -> Iterator[tuple[str, str, list[MeasuredRun]]]:
    """The name, kind and runs of each baseline; one run for each seed of a shared baseline."""
    for kind in BASELINES:
        groups: dict[tuple[object, ...], dict[int, int]] = {}
        for index, run in enumerate(runs):
            # Pixels depend on their size alone, random weights on encoder and seed.
            encoder, seed = recipe_of(run.pretrained).encoder, recipe_of(run.pretrained).seed
            key: tuple[object, ...] = (run.pretrained.size,)
            if kind == RANDOM:
                key += (encoder.name, encoder.pretrained, encoder.drop_path, run.pretrained.channels)
            groups.setdefault(key, {}).setdefault(seed if kind == RANDOM else 0, index)
        for group in groups.values():
            indices = list(group.values())
            method = next(name for name, own in by_method.items() if indices[0] in own)
            yield kind if len(groups) == 1 else f"{kind} ({method})", kind, [runs[index] for index in indices]


def _row(
    name: str, kinds: Sequence[str], runs: Sequence[MeasuredRun], shared: Sequence[str], tasks: Collection[str]
) -> Row:
    measured: dict[str, tuple[Measurement, ...]] = {}
    hits: dict[str, Tensor] = {}
    by_run = [{kind: by_title(run.evaluation, kind, tasks) for kind in kinds} for run in runs]
    for title in shared:
        task = by_run[0][kinds[0]][title].task
        kind = in_order(kinds, task)[0]
        measured[title] = tuple(own[kind][title] for own in by_run)
        outcome = f"{task}/{kind}"
        if task in TITLES and all(outcome in run.evaluation.hits for run in runs):
            each = torch.stack([run.evaluation.hits[outcome] for run in runs])
            hits[task] = each[:, each[0] >= 0] == 1
    folders, seeds = zip(*((run.pretrained.name, recipe_of(run.pretrained).seed) for run in runs), strict=True)
    return Row(name, folders, seeds, measured, not is_learned(kinds[0]), hits)


def methods(recipes: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> dict[str, list[int]]:
    """Groups runs with equal recipes into methods; returns their indices by the method's name.

    `recipes` are trees without the keys in which the seeds of one method differ; `folders` are distinct. A method is
    named by its differences from the others, as on a command line (objective=queue), or, if these are long or none, by
    the common beginning of its folders' names.
    """
    flat = [leaves(recipe) for recipe in recipes]
    by_recipe: dict[str, list[int]] = {}
    for index, recipe in enumerate(flat):
        by_recipe.setdefault(json.dumps(recipe, sort_keys=True), []).append(index)
    groups = list(by_recipe.values())
    names = _differences([flat[group[0]] for group in groups])
    if not all(names) or max(map(len, names)) > LONGEST:
        names = [_common([Path(folders[index]).name for index in group]) for group in groups]
    if not all(names) or len(set(names)) < len(names):
        names = [folders[group[0]] for group in groups]
    return dict(zip(names, groups, strict=True))


def _differences(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys and values in which each recipe differs from the others."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    differing = [key for key in keys if any(key not in own or own[key] != recipes[0].get(key) for own in recipes)]
    # The temperature of one objective is not that of another: if the names differ, they are enough.
    parts = [key.removesuffix("name") for key in differing if key.endswith(".name")]
    shown = [key for key in differing if key.endswith(".name") or not any(key.startswith(part) for part in parts)]
    return [" ".join(f"{key.removesuffix('.name')}={own[key]}" for key in shown if key in own) for own in recipes]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a tree by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def _common(names: Sequence[str]) -> str:
    """The common beginning of all names: quickstart for quickstart-0 and quickstart-1."""
    if len(names) == 1:
        return names[0]
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return "".join(column[0] for column in letters).rstrip("-_. ")
