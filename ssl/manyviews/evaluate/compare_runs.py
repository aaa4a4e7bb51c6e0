"""Several runs are compared: seeds of one method together, methods side by side, on the same test images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from manyviews.data import Images, Split, sample_ids
from manyviews.evaluate import FEATURES, EvaluateSettings, Look, chosen, evaluate, planned
from manyviews.evaluate.method_rows import BASELINES, MeasuredRun, recipe_of, rows_of
from manyviews.evaluate.record import evaluation_of, record_of, records_in
from manyviews.evaluate.writing import read
from manyviews.evaluators.alone import sentences
from manyviews.evaluators.geometry import IMAGES, neighbourhood_overlap
from manyviews.evaluators.results.kinds import GROUPING
from manyviews.evaluators.results.side_by_side import Comparison, Overlap, Row, differences
from manyviews.features.backbone import PretrainedBackbone, open_run
from manyviews.features.cached import features_of
from manyviews.features.encoding import images_of
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import in_a_line, start
from manyviews.system.writing import write_json

NEIGHBOURS = 10
"""Of each image, in the comparison of neighbourhoods: about as many as vote in kNN."""


class Shared(NamedTuple):
    """What all runs are measured on."""

    shown: Images
    """The test images; where there are none, those that the runs have learned from."""
    fingerprints: list[str]
    labelled: bool
    """Whether there are labels, and held-out images."""


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
    looks = {look for opened in runs for look in planned(settings, recipe_of(opened), labelled=images.labelled)}
    kinds = [_kinds(opened, images, settings) for opened in runs]
    measured: list[MeasuredRun] = []
    for number, (opened, own) in enumerate(zip(runs, kinds, strict=True), 1):
        before = measured_before(opened, images, settings)
        # A file system may show a record to one process before another.
        if distributed.any_over_ranks(before is None) or before is None:
            console.say(f"measuring {opened.name}, run {number} of {len(runs)}")
            # What was measured, and not what was written of it: the folder may take no file.
            findings = evaluate(folders[number - 1], settings, quiet=True)
            for sentence in sentences(findings.failures, list(findings.features)):
                console.warn(f"{opened.name}: {sentence}")
            record, _ = record_of(findings, opened, settings)
            before = MeasuredRun(opened, record, findings.evaluation, own)
        measured.append(before)
    with raise_on_all_ranks():
        rows, notes = rows_of(measured, looks, baselines=settings.baselines, apart=settings.layer == "both")
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


def measured_before(opened: PretrainedBackbone, images: Shared, settings: EvaluateSettings) -> MeasuredRun | None:
    """What was measured of a run before, if it is all that is asked for, of these weights and images; else None."""
    looks = planned(settings, recipe_of(opened), labelled=images.labelled)
    kinds = _kinds(opened, images, settings)
    assert opened.folder is not None
    try:
        whole, outcomes = read(opened.folder)
        for record, prefix in records_in(whole):
            own = {name.removeprefix(prefix): value for name, value in outcomes.items() if name.startswith(prefix)}
            found = MeasuredRun(opened, record, evaluation_of(record, own), kinds)
            if _holds(found, images, settings, looks):
                return found
    except (OSError, SafetensorError, ValueError):
        pass
    return None


def _kinds(opened: PretrainedBackbone, images: Shared, settings: EvaluateSettings) -> tuple[str, ...]:
    """The run's own kinds of features that are measured; collective."""
    return chosen(opened, settings, planned(settings, recipe_of(opened), labelled=images.labelled)).kinds


def _holds(run: MeasuredRun, images: Shared, settings: EvaluateSettings, looks: Sequence[Look]) -> bool:
    """Whether a record is of these weights and images, and has all that is asked for."""
    record = run.record
    asked: dict[str, Any] = {
        "weights": dict(run.opened.origin),
        "images": images.fingerprints,
        "precision": settings.precision,
        "protocol": settings.protocol.model_dump(mode="json"),
        "metric": None if settings.metric is None else settings.metric.model_dump(mode="json"),
    }
    if GROUPING & set(looks):
        asked["classes"] = None if settings.classes is None else list(settings.classes)
    if "fractions" in looks:
        asked["few"] = settings.few.model_dump(mode="json")
    if any(record.get(key) != value for key, value in asked.items()):
        return False
    done = {(own.task, own.features) for own in run.evaluation.measurements}
    wanted = {(look, kind) for look in looks for kind in (*run.kinds, *(BASELINES if settings.baselines else ()))}
    return wanted <= done


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
        same = repr((settings.data or recipe_of(opened).data, opened.channels))
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
    drawn = sample_ids(len(shown), IMAGES, seed=settings.protocol.seed)

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
