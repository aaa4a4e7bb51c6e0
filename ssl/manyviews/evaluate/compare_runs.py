"""Several runs are compared: seeds of one method together, methods side by side, on the same test images."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from manyviews.data import Images, Split
from manyviews.evaluate import EVALUATION, FEATURES, EvaluateSettings, Look, chosen, evaluate, planned
from manyviews.evaluate.record import record_of, records_in
from manyviews.evaluate.writing import read
from manyviews.evaluators.alone import sentences
from manyviews.evaluators.geometry import IMAGES, Geometry, neighbourhood_overlap
from manyviews.evaluators.kinds import LAYERS, LEARNED, PIXELS, RANDOM, is_learned, leading
from manyviews.evaluators.measurement import LEADING
from manyviews.evaluators.methods import methods
from manyviews.evaluators.protocol import Task
from manyviews.evaluators.side_by_side import FIGURES, Comparison, Overlap, Row, differences, figures_of
from manyviews.features.backbone import PretrainedBackbone, open_run
from manyviews.features.cached import features_of
from manyviews.features.settings import images_of
from manyviews.recipe import Recipe
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import in_a_line, start
from manyviews.system.writing import write_json

NEIGHBOURS = 10
"""Of each image, in the comparison of neighbourhoods: about as many as vote in kNN."""
BASELINES = (RANDOM, PIXELS)
DAMAGE = (AttributeError, IndexError, KeyError, RecursionError, SafetensorError, TypeError)
"""What a record raises that evaluate has not written, beside ValueError."""


class Shared(NamedTuple):
    """What all runs are measured on."""

    shown: Images
    """The test images; where there are none, those that the runs have learned from."""
    fingerprints: list[str]
    labelled: bool
    """Whether there are labels, and held-out images."""


class Measured(NamedTuple):
    """A run with what was measured of it."""

    opened: PretrainedBackbone
    record: Mapping[str, Any]
    """What its evaluation.json holds of these images and this protocol."""
    outcomes: Mapping[str, Tensor]
    """Likewise of its outcomes.safetensors."""
    kinds: tuple[str, ...] = (LEARNED,)
    """Its own kinds of features that were asked for, the one first by which images are compared."""


def compare_runs(folders: Sequence[Path], settings: EvaluateSettings) -> Comparison:
    """Prints one table of several runs: mean and spread over seeds, differences with a paired bootstrap interval.

    Runs whose configuration is equal but for seed and output are seeds of one method, and the first run's method is
    what the others are compared with. A run is measured first where it has not been yet, or where its weights, images
    or protocol are others by now; nothing else is written into a run.

    Raises:
        ValueError: if a run cannot be read, is given twice, holds another's weights or has other images than the rest;
            if what is asked for takes labels that are not there; or if nothing is left that all were measured by.
    """
    start(None, "fp32", trains=False)
    console = Console(quiet=distributed.rank() > 0)
    _check_different(folders)
    file = None if settings.comparison is None else Path(settings.comparison).expanduser()
    if settings.output is not None:
        raise ValueError(f"output={settings.output} is for one run; of several, comparison=FILE keeps the table")
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"comparison={file} cannot be written; name a file in a folder that exists")
    runs = [open_run(folder) for folder in folders]
    _check_weights(runs)
    images = _images(runs, settings, console)
    looks = {look for opened in runs for look in planned(settings, _recipe(opened), labelled=images.labelled)}
    kinds = [_kinds(opened, images, settings) for opened in runs]
    measured: list[Measured] = []
    for number, opened in enumerate(runs, 1):
        before = measured_before(opened, images, settings)
        # A file system may show a record to one process before another.
        if distributed.any_over_ranks(before is None) or before is None:
            console.say(f"measuring {opened.name}, run {number} of {len(runs)}")
            # What was measured, and not what was written of it: the folder may take no file.
            findings = evaluate(folders[number - 1], settings, quiet=True)
            for sentence in sentences(findings.failures, list(findings.features)):
                console.warn(f"{opened.name}: {sentence}")
            before = Measured(opened, *record_of(findings, opened, settings))
        measured.append(before)
    with raise_on_all_ranks():
        try:
            measured = [run._replace(kinds=own) for run, own in zip(measured, kinds, strict=True)]
            rows, notes = side_by_side(measured, looks, baselines=settings.baselines, apart=settings.layer == "both")
        except DAMAGE as problem:
            raise ValueError(
                f"the {EVALUATION} of a run is damaged ({type(problem).__name__}: {problem}); delete it, and the run "
                "is measured anew"
            ) from problem
    seed = settings.protocol.seed
    overlaps, neighbours = _overlaps(rows, runs, images.shown, settings, console) if "geometry" in looks else ((), 0)
    comparison = Comparison(rows, differences(rows, seed=seed), len(images.shown), overlaps, neighbours, notes)
    with raise_on_all_ranks():
        if distributed.rank() == 0:
            _tell(comparison, console)
            if file is not None:
                try:
                    write_json(file, comparison.to_json())
                except OSError as problem:
                    console.warn(f"{file} could not be written: {in_a_line(problem)}")
    return comparison


def measured_before(opened: PretrainedBackbone, images: Shared, settings: EvaluateSettings) -> Measured | None:
    """What was measured of a run before, if it is all that is asked for, of these weights and images; else None."""
    looks = planned(settings, _recipe(opened), labelled=images.labelled)
    kinds = _kinds(opened, images, settings)
    assert opened.folder is not None
    try:
        whole, outcomes = read(opened.folder)
        for record, prefix in records_in(whole):
            own = {name: value for name, value in outcomes.items() if name.startswith(prefix)}
            own = {name.removeprefix(prefix): value for name, value in own.items()}
            found = Measured(opened, record, own, kinds)
            if _holds(found, images, settings, looks):
                return found
    except (*DAMAGE, OSError, ValueError):
        pass
    return None


def _kinds(opened: PretrainedBackbone, images: Shared, settings: EvaluateSettings) -> tuple[str, ...]:
    """The run's own kinds of features that are measured; collective."""
    return chosen(opened, settings, planned(settings, _recipe(opened), labelled=images.labelled)).kinds


def _holds(run: Measured, images: Shared, settings: EvaluateSettings, looks: Sequence[Look]) -> bool:
    """Whether a record is of these weights and images, and has all that is asked for."""
    record = run.record
    asked: dict[str, Any] = {
        "weights": dict(run.opened.origin),
        "images": images.fingerprints,
        "precision": settings.precision,
        "protocol": settings.protocol.model_dump(mode="json"),
        "metric": None if settings.metric is None else settings.metric.model_dump(mode="json"),
    }
    if set(LEADING) & set(looks):
        asked["classes"] = None if settings.classes is None else list(settings.classes)
    if "fractions" in looks:
        asked["few"] = settings.few.model_dump(mode="json")
    if any(record.get(key) != value for key, value in asked.items()):
        return False
    done = {(score["method"], score["features"]) for score in record.get("scores", ())}
    done |= {(figures["task"], figures["features"]) for figures in record.get("figures", ())}
    done |= {("fractions", kind) for kind in record.get("fractions", ())}
    done |= {("geometry", own["features"]) for own in record.get("geometry", ())}
    wanted = {(look, kind) for look in looks for kind in (*run.kinds, *(BASELINES if settings.baselines else ()))}
    return wanted <= done


def side_by_side(
    runs: Sequence[Measured], looks: Collection[str], *, baselines: bool, apart: bool = False
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """A row for each method, then for each baseline, of what all runs were measured by; and what is to be noted.

    A method's figures are each of the layer that its objective trains for it; `apart` gives each layer a row.

    Raises:
        ValueError: if there is nothing that all runs were measured by.
    """
    notes = [f"{run.opened.name}: {text}" for run in runs for text in run.record.get("warnings", ())]
    kinds = BASELINES if baselines else ()
    values = [{kind: figures_of(run.record, kind, looks) for kind in (*run.kinds, *kinds)} for run in runs]
    titles = dict.fromkeys(title for run, own in zip(runs, values, strict=True) for title in own[run.kinds[0]])
    shared = [title for title in titles if all(title in figures for own in values for figures in own.values())]
    if missing := [title for title in titles if title not in shared]:
        notes.append(f"{', '.join(missing)}: left out, for not all runs were measured so; tasks=… names it for all")
    if len({json.dumps(run.record.get("gallery", {}).get("classes")) for run in runs}) > 1:
        # What is looked up among other classes is harder or easier.
        if grouped := [title for title in shared if title in {FIGURES[task] for task in LEADING}]:
            notes.append(
                f"{', '.join(grouped)}: left out, for the runs were measured so on other classes than each other; "
                "classes=… names the same ones for all"
            )
        shared = [title for title in shared if title not in grouped]
    lying = "geometry" in looks and all(run.record.get("geometry") for run in runs)
    if not shared and not lying:
        raise ValueError("\n".join(["there is nothing that all these runs were measured by", *dict.fromkeys(notes)]))
    named = methods(
        [_recipe(run.opened).model_dump(mode="json", exclude={"seed", "output", "resume"}) for run in runs],
        [run.opened.name for run in runs],
    )
    rows = []
    for name, places in named.items():
        own_runs, own_values = [runs[place] for place in places], [values[place] for place in places]
        # Seeds of a method are measured by one layer.
        own = [kind for kind in own_runs[0].kinds if all(kind in run.kinds for run in own_runs)] or [LEARNED]
        for kinds_of_row in [[kind] for kind in own] if apart else [own]:
            called = f"{name} ({LAYERS[kinds_of_row[0]]})" if apart else name
            rows.append(_row(called, kinds_of_row, own_runs, own_values, shared, lying))
    for kind in kinds:
        groups: dict[str, dict[int, int]] = {}
        for place, run in enumerate(runs):
            same, seed = _same_baseline(kind, run.opened)
            groups.setdefault(same, {}).setdefault(seed, place)
        for group in groups.values():
            places = list(group.values())
            of = next(name for name, own in named.items() if places[0] in own)
            name = kind if len(groups) == 1 else f"{kind} ({of})"
            own_runs, own_values = [runs[place] for place in places], [values[place] for place in places]
            rows.append(_row(name, [kind], own_runs, own_values, shared, lying))
    return tuple(rows), tuple(dict.fromkeys(notes))


def _row(
    name: str,
    kinds: Sequence[str],
    runs: Sequence[Measured],
    values: Sequence[Mapping[str, Mapping[str, float]]],
    shared: Sequence[str],
    lying: bool,
) -> Row:
    tasks: dict[str, Task] = {title: task for task, title in FIGURES.items()}
    by = {title: leading(kinds, tasks.get(title)) for title in shared}
    hits: dict[Task, Tensor] = {}
    for title, task in tasks.items():
        kind = by.get(title)
        if title in shared and all(f"hits/{task}/{kind}" in run.outcomes for run in runs):
            each = torch.stack([run.outcomes[f"hits/{task}/{kind}"] for run in runs])
            hits[task] = each[:, each[0] >= 0] == 1
    lies = leading(kinds)
    found = [Geometry(**own) for run in runs for own in run.record.get("geometry", ()) if own["features"] == lies]
    return Row(
        name,
        tuple(run.opened.name for run in runs),
        tuple(_recipe(run.opened).seed for run in runs),
        {title: tuple(own[kind][title] for own in values) for title, kind in by.items()},
        tuple(found) if lying else (),
        not is_learned(lies),
        hits,
        {title: LAYERS[kind] for title, kind in by.items() if is_learned(kind)},
    )


def _recipe(opened: PretrainedBackbone) -> Recipe:
    assert opened.recipe is not None, "only runs are compared"
    return opened.recipe


def _same_baseline(kind: str, opened: PretrainedBackbone) -> tuple[str, int]:
    """What a baseline follows from but for the seed, and the seed: equal for runs that share it."""
    if kind == "raw pixels":
        return str(opened.size), 0
    own, seen = _recipe(opened).encoder, (opened.size, opened.channels)
    return repr((own.name, own.pretrained, own.drop_path, seen)), _recipe(opened).seed


def _check_different(folders: Sequence[Path]) -> None:
    if len(folders) < 2:
        raise ValueError("a comparison takes 2 runs or more")
    places = [folder.resolve() for folder in folders]
    twice = [str(folder) for place, folder in enumerate(folders) if places[place] in places[:place]]
    if twice:
        raise ValueError(f"{', '.join(dict.fromkeys(twice))} is given twice; name each run once")


def _check_weights(runs: Sequence[PretrainedBackbone]) -> None:
    seen: dict[str, PretrainedBackbone] = {}
    for opened in runs:
        before = seen.setdefault(opened.origin["sha256"], opened)
        if before is not opened:
            raise ValueError(
                f"{opened.name} holds the same weights as {before.name}: one is a copy, and no run of its own to be "
                "compared; leave one of them out"
            )


def _images(runs: Sequence[PretrainedBackbone], settings: EvaluateSettings, console: Console) -> Shared:
    # Runs of the same images need not read them again.
    splits: dict[str, Split] = {}
    found: dict[tuple[str, ...], list[str]] = {}
    for opened in runs:
        same = repr((settings.data or _recipe(opened).data, opened.channels))
        if same not in splits:
            splits[same] = images_of(opened, settings, console)
        parts = [part.fingerprint for part in splits[same][:2] if part is not None]
        found.setdefault(tuple(parts), []).append(opened.name)
    if len(found) > 1:
        groups = " | ".join(", ".join(names) for names in found.values())
        raise ValueError(
            f"the images of these runs are not the same: {groups} (| stands between runs of different images); give "
            "data=… so that all are measured on the same ones"
        )
    train, test = next(iter(splits.values()))[:2]
    labelled = train.labels is not None and test is not None and test.labels is not None
    return Shared(train if test is None else test, list(next(iter(found))), labelled)


def _overlaps(
    rows: Sequence[Row], runs: Sequence[PretrainedBackbone], shown: Images, settings: EvaluateSettings, console: Console
) -> tuple[tuple[Overlap, ...], int]:
    """The neighbours that first runs of the methods have in common, and the first two runs of each."""
    k = min(NEIGHBOURS, len(shown) - 2)
    if k < 1:
        return (), 0
    by_name = {opened.name: opened for opened in runs}
    methods = [row for row in rows if not row.baseline]
    drawn = torch.randperm(len(shown), generator=torch.Generator().manual_seed(settings.protocol.seed))[:IMAGES]
    drawn = drawn.sort().values

    def features(name: str) -> Tensor:
        opened = by_name[name]
        cache = opened.folder / FEATURES if settings.cache and opened.folder is not None else None
        return features_of(opened, shown, settings, console, cache=cache)[drawn]

    firsts = {row.name: features(row.runs[0]) for row in methods}
    found = []
    for place, row in enumerate(methods):
        if len(row.runs) > 1:
            share = neighbourhood_overlap(firsts[row.name], features(row.runs[1]), k)
            found.append(Overlap(row.name, row.name, share))
        for other in methods[place + 1 :]:
            share = neighbourhood_overlap(firsts[row.name], firsts[other.name], k)
            found.append(Overlap(row.name, other.name, share))
    return tuple(found), k


def _tell(comparison: Comparison, console: Console) -> None:
    for table in comparison.tables():
        console.rich.print(table)
    for row in comparison.rows:
        if not row.baseline:
            seeds = f"seed{'s' * (len(row.seeds) > 1)} {', '.join(map(str, row.seeds))}"
            console.say(f"{row.name}: {', '.join(row.runs)} ({seeds})")
    console.say(comparison.verdict())
    for note in comparison.notes:
        console.warn(note)
