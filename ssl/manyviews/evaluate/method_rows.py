"""Runs grouped into methods and their baselines: a row of measurements for each."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyviews.evaluators.kinds import GROUPING, LAYERS, LEARNED, PIXELS, RANDOM, is_learned, leading
from manyviews.evaluators.measurement import TITLES, Evaluation, Measurement
from manyviews.evaluators.methods import methods
from manyviews.evaluators.side_by_side import Row, by_title
from manyviews.features.backbone import PretrainedBackbone
from manyviews.recipe import Recipe

BASELINES = (RANDOM, PIXELS)


class Measured(NamedTuple):
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
    runs: Sequence[Measured]


def rows_of(
    runs: Sequence[Measured], looks: Collection[str], *, baselines: bool, apart: bool = False
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


def _shared(runs: Sequence[Measured], looks: Collection[str], baselines: Sequence[str], notes: list[str]) -> list[str]:
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


def _methods(named: Mapping[str, Sequence[int]], runs: Sequence[Measured], *, apart: bool) -> Iterator[Group]:
    for name, places in named.items():
        own = [runs[place] for place in places]
        # Seeds of a method are measured by one layer.
        kinds = [kind for kind in own[0].kinds if all(kind in run.kinds for run in own)] or [LEARNED]
        if apart:
            yield from (Group(f"{name} ({LAYERS[kind]})", [kind], own) for kind in kinds)
        else:
            yield Group(name, kinds, own)


def _baselines(named: Mapping[str, Sequence[int]], runs: Sequence[Measured]) -> Iterator[Group]:
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
