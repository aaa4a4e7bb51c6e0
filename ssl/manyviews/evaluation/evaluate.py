"""Evaluates a run: its features beside baselines, their geometry, and a report."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from manyviews.data import Split
from manyviews.evaluation import cautions
from manyviews.evaluation.inputs import metric_pairs_of, relevance_of, thresholds_of
from manyviews.evaluation.job import Job, gallery_of, is_labelled, pairs_of
from manyviews.evaluation.record import record_of
from manyviews.evaluation.run_tasks import (
    geometries_of,
    kinds_of,
    labelled_tasks,
    maps,
    stale_rows,
)
from manyviews.evaluation.settings import AnyTask, EvaluateSettings, measured_layers, planned_tasks, recipe_of
from manyviews.evaluation.writing import check_output, unwritable, write, write_clusters
from manyviews.evaluators.clustering import cannot_cluster
from manyviews.evaluators.failures import Failure, catch_failure, failure_messages
from manyviews.evaluators.knn import MOST_HELD_OUT
from manyviews.evaluators.logistic import cut_short
from manyviews.evaluators.protocol import refusals, takes_training
from manyviews.evaluators.relevance import Relevance
from manyviews.evaluators.results.measurement import LEARNED, PIXELS, THRESHOLD, Evaluation, Measurement, Task
from manyviews.evaluators.results.tables import printed, sheets
from manyviews.evaluators.splits import held_out_of_each
from manyviews.evaluators.verification import threshold_text
from manyviews.features.backbone import open_run
from manyviews.features.encoding import images_of
from manyviews.report import Findings
from manyviews.run.folder import DONE
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import in_a_line, lost_process, start
from manyviews.system.plural import plural


def evaluate(folder: Path, settings: EvaluateSettings, *, quiet: bool = False) -> Findings:
    """Evaluates a run and its baselines; prints tables, writes evaluation.json and report.html.

    If a task fails, the others are still measured, and `failures` of the result names it. The numbers are printed
    before anything is written; a file that cannot be written is a warning. Ranks share the images to encode and the
    search for neighbours; the numbers are those of one rank.

    Raises:
        ValueError: if the run cannot be read, a task takes labels or held-out images that are not there, or nothing
            can be measured.
    """
    start(None, "fp32", trains=False)
    console, pretrained = Console(quiet=quiet or distributed.rank() > 0), open_run(folder)
    recipe = recipe_of(pretrained)
    output = folder if settings.output is None else Path(settings.output).expanduser()
    check_output(output, folder)
    problem = unwritable(output) if distributed.rank() == 0 else ""
    if problem:
        console.warn(
            f"{output} cannot be written to ({problem}): results will only be printed; output=FOLDER writes them "
            "elsewhere"
        )
    is_writable = not distributed.any_over_ranks(bool(problem))
    split = images_of(pretrained, settings, console)
    inventory = cautions.inventory_of(folder)
    own = cautions.is_own(settings.data, recipe.data, inventory, split)
    failures: list[Failure] = []

    def on_failure(task: str, kind: str, problem: Exception) -> None:
        if lost_process(problem):
            raise problem
        failures.append(Failure(task, kind, in_a_line(problem)))

    planned = planned_tasks(settings, recipe, labelled=is_labelled(split))
    with raise_on_all_ranks():
        pairs = pairs_of(split, settings)
    job = Job(pretrained, split, settings, console, on_failure, output if is_writable else None, pairs)
    layers = measured_layers(pretrained, settings, planned)
    tasks: list[Task] = [task for task in planned if task != "geometry"]
    gallery = None
    relevance: Relevance | None = None
    thresholds: dict[str, float] = {}
    if tasks:
        gallery = gallery_of(job, own=own)
        with raise_on_all_ranks():
            job = job._replace(metric_pairs=metric_pairs_of(job, gallery))
        listed = pairs is not None
        refused = refusals(tasks, gallery, *job.labels, settings.protocol, settings.metric, listed=listed)
        if settings.relations is not None:
            with raise_on_all_ranks():
                relevance = relevance_of(job, gallery)
        elif "ranking" in tasks:

            def refuse(_task: str, _kind: str, problem: Exception) -> None:
                refused["ranking"] = in_a_line(problem)

            with catch_failure("ranking", LEARNED, refuse):
                relevance = relevance_of(job, gallery)
        if "clustering" in tasks and "clustering" not in refused:
            thresholds = thresholds_of(job)
            if problem := cannot_cluster(
                settings.protocol.clustering, len(gallery.images), thresholds.get(layers.kinds[0])
            ):
                refused["clustering"] = problem
        if len(refused) == len(planned):
            raise ValueError("\n".join(dict.fromkeys(refused.values())))
        failures += [Failure(task, kind, reason) for task, reason in refused.items() for kind in layers.kinds]
        tasks = [task for task in tasks if task not in refused]
    for message in failure_messages(failures, layers.kinds):
        console.warn(message)
    training = takes_training(tasks, settings.metric) or bool(len(job.paired))
    kinds = kinds_of(job, layers.kinds, training=training)
    with console.bar():
        evaluation = Evaluation()
        if gallery is not None and tasks:
            evaluation = labelled_tasks(job, kinds, tasks, gallery, relevance, thresholds)
        more: list[Measurement] = []
        if "geometry" in planned:
            more += geometries_of(job, kinds)
            with catch_failure("staleness of the bank", LEARNED, on_failure):
                more += stale_rows(job)
        evaluation = replace(evaluation, measurements=(*evaluation.measurements, *more))
        about_images: list[str] = []
        with catch_failure("copies and sizes of classes", LEARNED, on_failure):
            about_images += cautions.of_measured(split, kinds.get(PIXELS), evaluation)
    findings = Findings(
        folder=folder,
        train=split.train,
        test=split.test,
        features=kinds,
        evaluation=evaluation,
        points=maps(job, kinds) if settings.report else {},
        warnings=(
            *_warnings(folder, split, planned, settings, layers.missing),
            *cautions.whose(settings.data, recipe.data, inventory, split),
            *(cautions.learned_pairs(job.paired, split.train, recipe.unseen) if own else ()),
            *about_images,
        ),
        layers=layers.reason,
        failures=tuple(failures),
        view=pretrained.view,
    )
    with raise_on_all_ranks():
        if distributed.rank() == 0:
            # Before any file is written.
            _print(findings, console)
            record, outcomes = record_of(findings, pretrained, settings)
            page = write(findings, record, outcomes, output, console.warn, page=settings.report)
            if page is not None:
                console.say(f"report: {page}")
            if is_writable and (file := write_clusters(findings, output, console.warn)) is not None:
                console.say(f"clusters: {file}")
    return findings


def check_measured(findings: Findings, settings: EvaluateSettings) -> None:
    """Checks that every task that the settings name was measured, and any task at all.

    Raises:
        ValueError: naming those that were not.
    """
    nothing = not findings.evaluation.measurements
    named: set[str] = set(settings.tasks or ())
    if settings.relations is not None:
        named.add("ranking")
    if settings.metric is not None:
        named.add(f"metric={settings.metric.name}")
    missing = [own for own in findings.failures if nothing or own.task in named]
    if missing:
        raise ValueError("\n".join(failure_messages(missing, list(findings.features))))


def _warnings(
    folder: Path, split: Split, tasks: tuple[AnyTask, ...], settings: EvaluateSettings, missing: str
) -> Iterator[str]:
    """Warnings to a reader of the numbers."""
    if missing:
        yield f"{missing[0].upper()}{missing[1:]}."
    if not (folder / DONE).exists():
        yield "The run has not finished: these are the weights of its newest checkpoint."
    if split.unreadable:
        yield f"{plural(len(split.unreadable), 'file')} left out because they could not be read."
    labels = split.train.labels
    if labels is not None and bool((labels >= 0).any()) and {"knn", "linear", "augmented"} & set(tasks):
        share, counts = settings.protocol.held_out, labels[labels >= 0].bincount()
        rule = held_out_of_each(counts, min(share, MOST_HELD_OUT / int(counts.sum())))
        if rule == "one":
            yield (
                f"A share of {share:g} is less than one training image of every class: k, temperature and λ were "
                "chosen on one image of each class that has two or more."
            )
        elif rule == "none":
            yield (
                "No class has two labelled training images, so none could be held out: k, temperature and λ were not "
                "chosen but are those in the table."
            )
    if {"linear", "fractions"} & set(tasks) and (remark := cut_short(len(split.train.classes))):
        yield remark


def _print(findings: Findings, console: Console) -> None:
    for sheet in sheets(findings.evaluation):
        console.rich.print(printed(sheet))
    for own in findings.evaluation.of("verification", features=findings.kind, metric=THRESHOLD):
        console.say(threshold_text(own))
    if verdict := findings.evaluation.verdict():
        console.say(verdict)
    if findings.layers:
        console.say(findings.layers)
    for text in (*findings.warnings, *failure_messages(findings.failures, list(findings.features))):
        console.warn(text)
