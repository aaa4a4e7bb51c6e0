"""Compares several runs on the same test images: a row for each method, over its seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from manyviews.data import Images, Split, sample_ids
from manyviews.evaluation.evaluate import evaluate
from manyviews.evaluation.job import is_labelled
from manyviews.evaluation.method_rows import BASELINES, MeasuredRun, rows_of
from manyviews.evaluation.record import evaluation_of, record_of, records_in
from manyviews.evaluation.run_tasks import FEATURES
from manyviews.evaluation.settings import (
    AnyTask,
    EvaluateSettings,
    measured_layers,
    pairs_mark,
    planned_tasks,
    recipe_of,
    relations_mark,
)
from manyviews.evaluation.writing import read
from manyviews.evaluators.failures import failure_messages
from manyviews.evaluators.geometry import IMAGES, neighbourhood_overlap
from manyviews.evaluators.results.measurement import GROUPING
from manyviews.evaluators.results.side_by_side import Comparison, Overlap, Row, differences
from manyviews.features.backbone import PretrainedBackbone, open_run
from manyviews.features.cached import features_of
from manyviews.features.encoding import images_of
from manyviews.features.placing import placed
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import in_a_line, start
from manyviews.system.writing import write_json

NEIGHBOURS = 10
"""Neighbours of each image in the comparison of neighbourhoods: about as many as vote in kNN."""


class Shared(NamedTuple):
    """The images that all runs are measured on."""

    shown: Images
    """The test images, or the training images if there are none."""
    fingerprints: list[str]
    labelled: bool
    """Whether there are labels and held-out images."""


def compare_runs(folders: Sequence[Path], settings: EvaluateSettings) -> Comparison:
    """Prints one table of several runs: mean and spread over seeds, differences with intervals.

    Runs whose configuration is equal but for seed and output are seeds of one method; the others are compared with the
    method of the first run. A run is evaluated first if it has not been, or if its weights, images or protocol have
    changed; nothing else is written into a run.

    Raises:
        ValueError: if a run cannot be read, is named twice, has the weights of another or other images than the rest;
            if a task takes labels that are not there; or if there is no measurement that all runs have.
    """
    start(None, "fp32", trains=False)
    console = Console(quiet=distributed.rank() > 0)
    file = None if settings.comparison is None else Path(settings.comparison).expanduser()
    if settings.output is not None:
        raise ValueError(f"output={settings.output} is for one run; of several, comparison=FILE keeps the table")
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"comparison={file} cannot be written; name a file in a folder that exists")
    runs = _open(folders)
    images = _images(runs, settings, console)
    planned = [planned_tasks(settings, recipe_of(pretrained), labelled=images.labelled) for pretrained in runs]
    tasks = {task for own in planned for task in own}
    # The embedding is loaded by all ranks together, before any run is evaluated.
    layers = [measured_layers(pretrained, settings, own) for pretrained, own in zip(runs, planned, strict=True)]
    measured: list[MeasuredRun] = []
    for folder, pretrained, (kinds, *_) in zip(folders, runs, layers, strict=True):
        before = measured_before(pretrained, images, settings)
        # A file system may show a record to one rank before another.
        if distributed.any_over_ranks(before is None) or before is None:
            console.say(f"measuring {pretrained.name}, run {len(measured) + 1} of {len(runs)}")
            # From memory, not from the record: the folder may not be writable.
            findings = evaluate(folder, settings, quiet=True)
            for message in failure_messages(findings.failures, list(findings.features)):
                console.warn(f"{pretrained.name}: {message}")
            record, _ = record_of(findings, pretrained, settings)
            before = MeasuredRun(pretrained, record, findings.evaluation, kinds)
        measured.append(before)
    with raise_on_all_ranks():
        rows, notes = rows_of(measured, tasks, baselines=settings.baselines, apart=settings.layer == "both")
    seed = settings.protocol.seed
    overlaps, neighbours = _overlaps(rows, runs, images.shown, settings, console) if "geometry" in tasks else ((), 0)
    comparison = Comparison(rows, differences(rows, seed=seed), len(images.shown), overlaps, neighbours, notes)
    with raise_on_all_ranks():
        if distributed.rank() == 0:
            _print(comparison, console)
            if file is not None:
                try:
                    write_json(file, comparison.to_json())
                except OSError as problem:
                    console.warn(f"{file} could not be written: {in_a_line(problem)}")
    return comparison


def measured_before(pretrained: PretrainedBackbone, images: Shared, settings: EvaluateSettings) -> MeasuredRun | None:
    """Reads measurements of a run that cover the settings, weights and images; None without any."""
    tasks = planned_tasks(settings, recipe_of(pretrained), labelled=images.labelled)
    kinds = measured_layers(pretrained, settings, tasks).kinds
    assert pretrained.folder is not None
    try:
        whole, outcomes = read(pretrained.folder)
        for record, prefix in records_in(whole):
            own = {name.removeprefix(prefix): value for name, value in outcomes.items() if name.startswith(prefix)}
            run = MeasuredRun(pretrained, record, evaluation_of(record, own), kinds)
            if _covers(run, images, settings, tasks):
                return run
    except (OSError, SafetensorError, ValueError):
        pass
    return None


def _covers(run: MeasuredRun, images: Shared, settings: EvaluateSettings, tasks: Sequence[AnyTask]) -> bool:
    """Whether a record is of these weights and images, and has all measurements of the settings."""
    required: dict[str, Any] = {
        "weights": dict(run.pretrained.origin),
        "images": images.fingerprints,
        "precision": settings.precision,
        "protocol": settings.protocol.model_dump(mode="json"),
        "metric": None if settings.metric is None else settings.metric.model_dump(mode="json"),
    }
    if GROUPING & set(tasks):
        required["classes"] = None if settings.classes is None else list(settings.classes)
    if "verification" in tasks:
        required["pairs"] = pairs_mark(settings)
    if "ranking" in tasks:
        required["relations"] = relations_mark(settings)
    if "fractions" in tasks:
        required["few"] = settings.few.model_dump(mode="json")
    if any(run.record.get(key) != value for key, value in required.items()):
        return False
    done = {(own.task, own.features) for own in run.evaluation.measurements}
    return done >= {(task, kind) for task in tasks for kind in (*run.kinds, *(BASELINES * settings.baselines))}


def _open(folders: Sequence[Path]) -> list[PretrainedBackbone]:
    """Opens the runs; raises ValueError for fewer than two, or equal folders or weights."""
    if len(folders) < 2:
        raise ValueError("a comparison takes 2 runs or more")
    resolved = [folder.resolve() for folder in folders]
    if twice := [str(folder) for index, folder in enumerate(folders) if resolved[index] in resolved[:index]]:
        raise ValueError(f"{', '.join(dict.fromkeys(twice))} is named twice; name each run once")
    by_weights: dict[str, PretrainedBackbone] = {}
    for pretrained in map(open_run, folders):
        other = by_weights.setdefault(pretrained.origin["sha256"], pretrained)
        if other is not pretrained:
            raise ValueError(
                f"{pretrained.name} has the same weights as {other.name}: one is a copy of the other; leave one of "
                "them out"
            )
    return list(by_weights.values())


def _images(runs: Sequence[PretrainedBackbone], settings: EvaluateSettings, console: Console) -> Shared:
    # Runs of the same images do not read them again.
    splits: dict[str, Split] = {}
    by_fingerprints: dict[tuple[str, ...], list[str]] = {}
    for pretrained in runs:
        same = repr((settings.data or recipe_of(pretrained).data, pretrained.channels))
        if same not in splits:
            splits[same] = images_of(pretrained, settings, console)
        parts = [part.fingerprint for part in splits[same][:2] if part is not None]
        by_fingerprints.setdefault(tuple(parts), []).append(pretrained.name)
    if len(by_fingerprints) > 1:
        groups = " | ".join(", ".join(names) for names in by_fingerprints.values())
        raise ValueError(
            f"the images of these runs are not the same: {groups} (| stands between runs of different images); give "
            "data=… to measure all on the same ones"
        )
    split = next(iter(splits.values()))
    shown = split.train if split.test is None else split.test
    return Shared(shown, list(next(iter(by_fingerprints))), is_labelled(split))


def _overlaps(
    rows: Sequence[Row], runs: Sequence[PretrainedBackbone], shown: Images, settings: EvaluateSettings, console: Console
) -> tuple[tuple[Overlap, ...], int]:
    """Neighbours in common of the first runs of two methods, and of the first two runs of one."""
    k = min(NEIGHBOURS, len(shown) - 2)
    if k < 1:
        return (), 0
    by_name = {pretrained.name: pretrained for pretrained in runs}
    methods = [row for row in rows if not row.baseline]
    ids = sample_ids(len(shown), IMAGES, seed=settings.protocol.seed)

    def features(name: str) -> Tensor:
        pretrained = by_name[name]
        cache = pretrained.folder / FEATURES if settings.cache and pretrained.folder is not None else None
        return placed(features_of(pretrained, shown, settings, console, cache=cache)[ids])

    firsts = {row.name: features(row.runs[0]) for row in methods}
    overlaps = []
    for index, row in enumerate(methods):
        others = [(row.name, features(row.runs[1]))] if len(row.runs) > 1 else []
        others += [(other.name, firsts[other.name]) for other in methods[index + 1 :]]
        overlaps += [Overlap(row.name, name, neighbourhood_overlap(firsts[row.name], rows, k)) for name, rows in others]
    return tuple(overlaps), k


def _print(comparison: Comparison, console: Console) -> None:
    for table in comparison.tables():
        console.rich.print(table)
    for row in comparison.rows:
        if not row.baseline:
            seeds = f"seed{'s' * (len(row.seeds) > 1)} {', '.join(map(str, row.seeds))}"
            console.say(f"{row.name}: {', '.join(row.runs)} ({seeds})")
    console.say(comparison.verdict())
    for note in comparison.notes:
        console.warn(note)
