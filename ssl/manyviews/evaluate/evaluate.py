"""A run is measured: its features beside baselines, how they lie, and a report of it all."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from manyviews.data import Split
from manyviews.evaluate import cautions
from manyviews.evaluate.layer import chosen
from manyviews.evaluate.record import record_of
from manyviews.evaluate.run_tasks import (
    Job,
    comparison,
    few_labels,
    gallery_of,
    geometries_of,
    kinds_of,
    maps,
    stale_rows,
)
from manyviews.evaluate.settings import EvaluateSettings, Look
from manyviews.evaluate.writing import check_output, unwritable, write
from manyviews.evaluators.alone import Failure, alone, sentences
from manyviews.evaluators.knn import MOST_HELD_OUT
from manyviews.evaluators.logistic import cut_short
from manyviews.evaluators.protocol import Task
from manyviews.evaluators.requirements import refusals, takes_training
from manyviews.evaluators.results.kinds import LEARNED, PIXELS
from manyviews.evaluators.results.measurement import Evaluation, Measurement
from manyviews.evaluators.results.tables import printed, sheets
from manyviews.evaluators.splits import kind_of_choice
from manyviews.features.backbone import open_run
from manyviews.features.encoding import images_of
from manyviews.recipe import Recipe
from manyviews.report import Findings
from manyviews.run.folder import DONE
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import in_a_line, lost_process, start
from manyviews.system.plural import plural


def evaluate(folder: Path, settings: EvaluateSettings, *, quiet: bool = False) -> Findings:
    """Measures a run's features beside random weights and raw pixels: a table, evaluation.json and report.html.

    A task that fails does so alone: the others are measured, and `failures` of what is returned names it. The numbers
    are printed before anything is written, and what cannot be written is a warning. On several processes each encodes
    its share of the images, and searches its share of the neighbours; the numbers are those of one process.

    Raises:
        ValueError: if the run cannot be read, what is asked for takes labels or held-out images that are not there, or
            nothing of it can be measured.
    """
    start(None, "fp32", trains=False)
    console, opened = Console(quiet=quiet or distributed.rank() > 0), open_run(folder)
    recipe = opened.recipe
    assert recipe is not None
    output = folder if settings.output is None else Path(settings.output).expanduser()
    check_output(output, folder)
    keeps = _looked_at(output, console)
    split = images_of(opened, settings, console)
    inventory = cautions.inventory_of(folder)
    failures: list[Failure] = []

    def failed(task: str, kind: str, problem: Exception) -> None:
        if lost_process(problem):
            raise problem
        failures.append(Failure(task, kind, in_a_line(problem)))

    job = Job(opened, recipe, split, settings, console, failed, output if keeps else None)
    labels = job.labels
    looks = planned(settings, recipe, labelled=labels is not None)
    layers = chosen(opened, settings, looks)
    tasks: list[Task] = [look for look in looks if look != "fractions" and look != "geometry"]
    gallery = None
    if labels is not None and tasks:
        gallery = gallery_of(job, own=cautions.is_own(settings.data, recipe.data, inventory, split))
        refused = refusals(tasks, gallery, *labels, settings.protocol, settings.metric)
        if len(refused) == len(looks):
            raise ValueError("\n".join(dict.fromkeys(refused.values())))
        failures += [Failure(task, kind, reason) for task, reason in refused.items() for kind in layers.kinds]
        tasks = [task for task in tasks if task not in refused]
    for sentence in sentences(failures, layers.kinds):
        console.warn(sentence)
    training = "fractions" in looks or takes_training(tasks, settings.metric)
    kinds = kinds_of(job, layers.kinds, training=training)
    with console.bar():
        evaluation = Evaluation()
        if labels is not None and gallery is not None and tasks:
            evaluation = comparison(job, kinds, tasks, gallery)
        more: list[Measurement] = []
        if labels is not None and "fractions" in looks:
            more += few_labels(job, kinds)
        if "geometry" in looks:
            more += geometries_of(job, kinds)
            with alone("staleness of the bank", LEARNED, failed):
                more += stale_rows(job)
        evaluation = replace(evaluation, measurements=(*evaluation.measurements, *more))
        noticed: list[str] = []
        with alone("copies and sizes of classes", LEARNED, failed):
            noticed += cautions.of_measured(split, kinds.get(PIXELS), evaluation)
    findings = Findings(
        folder=folder,
        train=split.train,
        test=split.test,
        features=kinds,
        evaluation=evaluation,
        points=maps(job, kinds) if settings.report else {},
        warnings=(
            *_warnings(folder, split, looks, settings, layers.missing),
            *cautions.whose(settings.data, recipe.data, inventory, split),
            *noticed,
        ),
        layers=layers.reason,
        failures=tuple(failures),
    )
    with raise_on_all_ranks():
        if distributed.rank() == 0:
            # Whatever becomes of files.
            _tell(findings, console)
            record, outcomes = record_of(findings, opened, settings)
            page = write(findings, record, outcomes, output, console.warn, page=settings.report)
            if page is not None:
                console.say(f"report: {page}")
    return findings


def check_measured(findings: Findings, settings: EvaluateSettings) -> None:
    """Checks that what was asked for by name was measured, and anything at all, after all else was shown.

    Raises:
        ValueError: naming what was not.
    """
    nothing = not findings.evaluation.measurements
    named: set[str] = set(settings.tasks or ())
    if settings.metric is not None:
        named.add(f"metric={settings.metric.name}")
    lacking = [own for own in findings.failures if nothing or own.task in named]
    if lacking:
        raise ValueError("\n".join(sentences(lacking, list(findings.features))))


def _looked_at(output: Path, console: Console) -> bool:
    """Whether the output folder takes files, looked at by the first process before the work; collective."""
    problem = unwritable(output) if distributed.rank() == 0 else ""
    if problem:
        console.warn(
            f"{output} cannot be written to ({problem}), so that results will only be printed; output=FOLDER writes "
            "them elsewhere"
        )
    return not distributed.any_over_ranks(bool(problem))


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


def _warnings(
    folder: Path, split: Split, looks: tuple[Look, ...], settings: EvaluateSettings, missing: str
) -> Iterator[str]:
    """What a reader of the numbers should know."""
    if missing:
        yield f"{missing[0].upper()}{missing[1:]}."
    if not (folder / DONE).exists():
        yield "The run has not finished: these are the weights of its newest checkpoint."
    if split.unreadable:
        yield f"{plural(len(split.unreadable), 'file')} left out, for they could not be read."
    if split.train.labels is not None and {"knn", "linear", "augmented"} & set(looks):
        yield from _choice(split.train.labels, settings)
    if {"linear", "fractions"} & set(looks) and (remark := cut_short(len(split.train.classes))):
        yield remark


def _choice(labels: Tensor, settings: EvaluateSettings) -> Iterator[str]:
    """What is to be said where classes are so small that the share for the choice is not one image of any."""
    counts, share = labels[labels >= 0].bincount(), settings.protocol.held_out
    if not len(counts):
        return
    match kind_of_choice(counts, share=share, most=MOST_HELD_OUT):
        case "one":
            yield (
                f"A share of {share:g} is not one training image of any class: k, temperature and λ were chosen on one "
                f"image of each class that has two or more."
            )
        case "none":
            yield (
                "No class has two labelled training images, so that none could be held out: k, temperature and λ were "
                "not chosen but are those that the table shows."
            )


def _tell(findings: Findings, console: Console) -> None:
    """The tables and the verdict."""
    for sheet in sheets(findings.evaluation):
        console.rich.print(printed(sheet))
    if verdict := findings.evaluation.verdict():
        console.say(verdict)
    if findings.layers:
        console.say(findings.layers)
    for text in (*findings.warnings, *sentences(findings.failures, list(findings.features))):
        console.warn(text)
