"""A run is measured: its features beside baselines, how they lie, and a report of it all."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from contrastive import distributed
from contrastive.checkpoints import together
from contrastive.data import Split
from contrastive.evaluate import fractions, geometry
from contrastive.evaluate.compare import check, takes_training
from contrastive.evaluate.kinds import LAYERS
from contrastive.evaluate.protocol import Task
from contrastive.evaluate.stored import write_whole
from contrastive.extract import images_of
from contrastive.launch import start
from contrastive.measure.layer import chosen
from contrastive.measure.parts import (
    FOREIGN,
    comparison,
    few_labels,
    gallery_of,
    geometries_of,
    kinds_of,
    maps,
    stale_rows,
)
from contrastive.measure.settings import EvaluateSettings, Look
from contrastive.opened import Opened, digest, open_run
from contrastive.progress import Teller
from contrastive.recipe import Recipe
from contrastive.report import Findings, write_report
from contrastive.run import DONE

EVALUATION, OUTCOMES = "evaluation.json", "outcomes.safetensors"


def evaluate(folder: Path, settings: EvaluateSettings, *, quiet: bool = False) -> Findings:
    """Measures a run's features beside random weights and raw pixels: a table, evaluation.json and report.html.

    On several processes each encodes its share of the images, and searches its share of the neighbours; the numbers
    are those of one process.

    Raises:
        ValueError: if the run cannot be read, or what is asked for takes labels or held-out images that are not there.
    """
    start(None, "fp32", trains=False)
    teller, opened = Teller(quiet=quiet or distributed.rank() > 0), open_run(folder)
    recipe = opened.recipe
    assert recipe is not None
    split = images_of(opened, settings, teller)
    labels, shown = _labels(split), split.train if split.test is None else split.test
    looks = planned(settings, recipe, labelled=labels is not None)
    layers = chosen(opened, settings, looks)
    tasks: list[Task] = [look for look in looks if look != "fractions" and look != "geometry"]
    gallery = None
    if labels is not None and tasks:
        gallery = gallery_of(split.train, shown, recipe, settings)
        check(tasks, gallery, *labels, settings.protocol, settings.metric)
    training = split.train if "fractions" in looks or takes_training(tasks, settings.metric) else None
    kinds = kinds_of(opened, layers.kinds, training, shown, settings, teller)
    with teller.bar():
        evaluation, few = None, {}
        if labels is not None and gallery is not None:
            evaluation = comparison(folder, opened, split, kinds, labels, settings, tasks, gallery, teller)
        if labels is not None and "fractions" in looks:
            few = few_labels(kinds, labels, settings, teller)
        geometries = geometries_of(opened, recipe, kinds, shown, settings, teller) if "geometry" in looks else ()
        stale = stale_rows(opened, recipe, split.train, settings, teller) if "geometry" in looks else None
    findings = Findings(
        folder=folder,
        train=split.train,
        test=split.test,
        features=kinds,
        evaluation=evaluation,
        geometry=geometries,
        fractions=few,
        staleness=stale,
        points=maps(kinds, settings, teller) if settings.report else {},
        warnings=tuple(_warnings(folder, recipe, split, settings, layers.missing)),
        layers=layers.reason,
    )
    with together():
        if distributed.rank() == 0:
            _write(findings, opened, settings)
            _tell(findings, teller)
            if settings.report:
                teller.say(f"report: {write_report(findings)}")
    return findings


def _labels(split: Split) -> tuple[Tensor, Tensor] | None:
    """The classes of training and held-out images, where there are both."""
    if split.train.labels is None or split.test is None or split.test.labels is None:
        return None
    return split.train.labels, split.test.labels


def planned(settings: EvaluateSettings, recipe: Recipe, *, labelled: bool) -> tuple[Look, ...]:
    """What is measured: what was asked for, or what the images allow."""
    if settings.tasks is None:
        retrieval: tuple[Look, ...] = ("retrieval",) if recipe.unseen else ()
        return ("knn", "linear", "fractions", *retrieval, "geometry") if labelled else ("geometry",)
    if not labelled and set(settings.tasks) != {"geometry"}:
        raise ValueError(
            f"tasks={','.join(settings.tasks)} takes labels and held-out images, and there are none: give "
            "data=/a/folder that has one sub-folder per class, or tasks=geometry"
        )
    return settings.tasks


def _warnings(folder: Path, recipe: Recipe, split: Split, settings: EvaluateSettings, missing: str) -> Iterator[str]:
    """What a reader of the numbers should know."""
    if missing:
        yield f"{missing[0].upper()}{missing[1:]}."
    if not (folder / DONE).exists():
        yield "The run has not finished: these are the weights of its newest checkpoint."
    if settings.data is not None and settings.data != recipe.data:
        yield f"The images are {FOREIGN}."
    if split.unreadable:
        yield f"{len(split.unreadable)} files could not be read and were left out."
    if split.test is None:
        yield "No images were held out: those shown are images that the run has learned from."


def _tell(findings: Findings, teller: Teller) -> None:
    """The tables and the verdict."""
    tables = list(findings.evaluation.tables()) if findings.evaluation is not None else []
    tables += [fractions.table(findings.fractions)] if findings.fractions else []
    tables += [geometry.table(findings.geometry)] if findings.geometry else []
    for table in tables:
        teller.console.print(table)
    if findings.evaluation is not None:
        teller.say(findings.evaluation.verdict())
    if findings.layers:
        teller.say(findings.layers)
    if findings.staleness is not None:
        stale = findings.staleness
        low, high = stale.quantiles["5 %"], stale.quantiles["95 %"]
        teller.say(
            f"Memory bank: the cosine of a row with a fresh embedding of its image is {stale.mean:.2f} on average "
            f"({low:.2f} to {high:.2f} for nine rows of ten, {stale.images:,} rows); 1 where no row is stale."
        )
    for text in findings.warnings:
        teller.warn(text)


def _write(findings: Findings, opened: Opened, settings: EvaluateSettings) -> None:
    """evaluation.json, and outcomes.safetensors with what was predicted of each test image."""
    images = [part.fingerprint for part in (findings.train, findings.test) if part is not None]
    report: dict[str, Any] = {"weights": opened.origin, "images": images, "tasks": settings.tasks}
    evaluation, outcomes = findings.evaluation, {}
    report |= evaluation.to_json() if evaluation is not None else {}
    # As it was asked for: where no metric was, each result names its own.
    report |= settings.model_dump(mode="json", include={"classes", "precision", "protocol", "metric", "layer"})
    report["layers"] = {kind: LAYERS.get(kind) for kind in findings.features}
    if evaluation is not None:
        report["gallery"]["names"] = [findings.train.classes[number] for number in report["gallery"]["classes"]]
        outcomes = {f"predictions/{name}": value for name, value in evaluation.predictions.items()}
        outcomes |= {f"hits/{name}": value for name, value in evaluation.hits.items()}
        outcomes |= {"labels": labels} if (labels := findings.shown.labels) is not None else {}
    report["few"] = settings.few.model_dump(mode="json")
    report["fractions"] = {kind: [asdict(row) for row in found] for kind, found in findings.fractions.items()}
    report["geometry"] = [asdict(own) for own in findings.geometry]
    report["staleness"] = asdict(findings.staleness) if findings.staleness is not None else None
    report["warnings"] = list(findings.warnings)
    # The record goes first and comes last, and knows its outcomes: another evaluation may be writing beside this one.
    record = findings.folder / EVALUATION
    record.unlink(missing_ok=True)
    save_file({name: value.contiguous() for name, value in outcomes.items()}, findings.folder / OUTCOMES)
    report["outcomes"] = digest(findings.folder / OUTCOMES)
    write_whole(record, [json.dumps(report, indent=1), "\n"])
