"""Every objective for one budget: retrieval on five classes after training on the other five, or graded rankings."""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness

UNSEEN = (5, 6, 7, 8, 9)
FIGURES = {"retrieval": ("Recall@1", "MAP@R"), "ranking": ("NDCG@10", "Kendall τ-b")}
LAYERS = {"learned": "backbone", "learned (embedding)": "embedding"}
"""What each layer's features are called in a record, and in the table."""

WORD2VEC = "objective.correction=false objective.normalized=false objective.temperature=1"
"""Negative sampling as it was published, on products of free lengths."""


class Case(NamedTuple):
    """A way of training, as words of the command line."""

    positives: str
    """What makes two images alike: views of one image, or images of one label."""
    words: tuple[str, ...]
    """The recipe and what is changed in it."""


VIEWS: Mapping[str, str] = {
    "in_batch: NT-Xent": "simclr",
    "in_batch: decoupled": "quickstart",
    "in_batch: bilinear score (CPC)": "simclr objective.score=bilinear",
    "queue": "moco",
    "bank: exact softmax": "instance_discrimination",
    "bank: NCE": "instance_discrimination_nce",
    "nearest_neighbours": "nnclr",
    "contrastive": "siamese_instances",
    "triplet, semi-hard": "facenet_instances",
    "margin, distance-weighted": "margin_distance_weighted_instances",
    "n_pair": "n_pair_instances",
    "log_ratio of thumbnails": "log_ratio values=pixels",
    "ranking: ListNet": "list_net ids=images",
    "noise_contrastive: NCE": "noise_contrastive",
    "noise_contrastive: word2vec": f"noise_contrastive {WORD2VEC}",
    "margin_softmax: ArcFace, a class per image": "arcface_instances",
}
LABELS: Mapping[str, str] = {
    "supervised": "supervised",
    "contrastive": "siamese",
    "triplet, semi-hard": "facenet",
    "margin, distance-weighted": "margin_distance_weighted",
    "n_pair: multi-class": "n_pair",
    "n_pair: one-vs-one": "n_pair objective.form=one_vs_one",
    "log_ratio of labels": "log_ratio",
    "ranking: squared error": "list_net objective.loss=squared_error",
    "ranking: cross-entropy": "list_net objective.loss=cross_entropy",
    "ranking: RankNet": "list_net objective.loss=rank_net",
    "ranking: hinge": "list_net objective.loss=hinge",
    "ranking: ListNet": "list_net",
    "ranking: ListMLE": "list_net objective.loss=list_mle",
    "noise_contrastive: NCE": "noise_contrastive ids=labels",
    "noise_contrastive: word2vec": f"noise_contrastive ids=labels {WORD2VEC}",
    "margin_softmax: NormFace": "arcface objective.preset=norm_face",
    "margin_softmax: SphereFace": "sphereface",
    "margin_softmax: CosFace": "cosface",
    "margin_softmax: ArcFace": "arcface",
    "margin_softmax: combined": "arcface objective.preset=combined_1",
}


GRADED: Mapping[str, str] = {
    "in_batch: NT-Xent": "simclr",
    "in_batch: decoupled": "quickstart",
    "log_ratio": "log_ratio values={values}",
    "ranking: ListNet": "list_net ids=images values={values}",
}
"""Objectives by continuous labels beside those that know none, for --graded."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, and for how long."""
    parser.add_argument("--minutes", type=float, default=1.0, help="of training, for each run (1)")
    parser.add_argument("--epochs", type=float, help="of training, for each run, in place of minutes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each objective (3)")
    parser.add_argument("--data", default="sample", help="the images to train on (sample)")
    parser.add_argument("--gallery", default="fashion_mnist", help="the images to look up (fashion_mnist)")
    parser.add_argument(
        "--graded",
        choices=("labels", "pixels"),
        help="train by these values too, and rank the held-out images of --data by them, in place of retrieval",
    )
    parser.add_argument("--only", nargs="+", default=[], help="objectives whose line begins so (all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the cores (1)")
    parser.add_argument("--keep", type=Path, help="folder for the runs; those already measured there are not run again")


def run(options: argparse.Namespace) -> harness.Report:
    """Trains and measures every objective by the words of the command line."""
    cases = {f"{name} (views)": Case("views", tuple(words.split())) for name, words in VIEWS.items()}
    cases |= {f"{name} (labels)": Case("labels", tuple(words.split())) for name, words in LABELS.items()}
    if options.graded is not None:
        cases = {
            f"{name} (values)": Case(
                "values" if "{values}" in words else "views", tuple(words.format(values=options.graded).split())
            )
            for name, words in GRADED.items()
        }
    chosen = {name: case for name, case in cases.items() if not options.only or name.startswith(tuple(options.only))}
    measured = train_and_measure(chosen, options)
    rows: list[dict[str, harness.Value]] = []
    for positives in ("views", "labels", "values"):
        rows += [
            {"positives": positives, "objective": name.rpartition(" (")[0], **row(measured[name], *LAYERS)}
            for name, case in chosen.items()
            if case.positives == positives
        ]
    return harness.Report(
        title="Objectives for one budget, retrieval among classes not seen in training"
        if options.graded is None
        else f"Objectives for one budget, graded rankings of held-out images by values={options.graded}",
        rows=rows + baselines(measured, {"positives": "–"}),
        notes=notes(options),
        packages=("timm",),
    )


def notes(options: argparse.Namespace) -> tuple[str, ...]:
    """What was done, in words."""
    length = f"{options.minutes:g} minutes" if options.epochs is None else f"{options.epochs:g} epochs"
    if options.graded is not None:
        return (
            f"{length} of training on {options.data}, {options.jobs} runs at once.",
            f"Relevance among its held-out images is 1 / (1 + distance of values={options.graded}), with linear gain.",
            "In %: median (smallest-largest) over seeds; of Kendall's τ-b a hundredth is a per cent.",
        )
    return (
        f"{length} of training on classes 0 to 4 of {options.data}, {options.jobs} runs at once.",
        f"Retrieval among the test images of classes 5 to 9 of {options.gallery}, by backbone and embedding.",
        "In %: median (smallest-largest) over seeds.",
    )


def train_and_measure(cases: Mapping[str, Case], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """For each case the evaluations of its runs, one for each seed; the first run of each seed measures baselines."""
    jobs = list(product(range(options.seeds), cases))
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        place, first = options.keep or Path(scratch), next(iter(cases))

        def measure(job: tuple[int, str]) -> dict[str, Any]:
            seed, name = job
            folder = place / harness.file_name(f"{name} {seed}")
            report = folder / "evaluation.json"
            if not report.exists():
                recipe, *words = cases[name].words
                classes = f"{list(UNSEEN)}".replace(" ", "")
                unseen, task = [f"unseen={classes}"], "retrieval"
                looked_up = [f"data={options.gallery}", f"classes={classes}"]
                if options.graded is not None:
                    unseen, task, looked_up = [], "ranking", [f"protocol.ranking.by={options.graded}"]
                words += [f"data={options.data}", *unseen, f"seed={seed}"]
                words += [_length(options), f"train.threads={threads}", "train.monitor=0"]
                training = ["pretrain", recipe, *words, "train.preview=0", f"output={folder}"]
                wanted = [f"baselines={str(name == first).lower()}", "report=false"]
                harness.commands(threads, training, ["evaluate", str(folder), f"tasks=[{task}]", *looked_up, *wanted])
            found: dict[str, Any] = json.loads(report.read_text())
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            return found | {"epochs": max(line["epoch"] for line in lines if "epoch" in line)}

        reports = list(pool.map(measure, jobs))
    return {name: [found for job, found in zip(jobs, reports, strict=True) if job[1] == name] for name in cases}


def _length(options: argparse.Namespace) -> str:
    return f"train.minutes={options.minutes}" if options.epochs is None else f"train.epochs={options.epochs}"


def row(reports: Sequence[Mapping[str, Any]], *kinds: str) -> dict[str, harness.Value]:
    """Epochs and figures over seeds: those of each layer of a run side by side, or those of a baseline."""
    learned = kinds[0] in LAYERS
    epochs = harness.Spread.of([report["epochs"] for report in reports]).median if learned else None
    figures: dict[str, harness.Value] = {}
    for name in FIGURES[task_of(reports[0])]:
        for kind in kinds:
            found = [100 * scores(report, kind)[name] for report in reports]
            figures[f"{name}, {LAYERS.get(kind, 'backbone')}"] = harness.Spread.of(found)
    judged = {"judged by": judged_by(reports[0])} if learned else {}
    return {"epochs": epochs, **judged, **figures, "seeds": len(reports)}


def judged_by(report: Mapping[str, Any]) -> str:
    """The layer that comes first in the retrieval or ranking of a record: that which evaluate judges by."""
    task = task_of(report)
    layer: str = next(own["layer"] for own in report["measurements"] if own["task"] == task)
    return layer


def task_of(report: Mapping[str, Any]) -> str:
    """The task of a record, retrieval or ranking."""
    return "ranking" if "ranking" in report["tasks"] else "retrieval"


def baselines(measured: Mapping[str, Sequence[Mapping[str, Any]]], first: Mapping[str, str]) -> list[dict[str, Any]]:
    """Random weights, drawn by each seed, and raw pixels."""
    reports = next(iter(measured.values()))
    return [{**first, "objective": kind, **row(reports, kind)} for kind in ("random weights", "raw pixels")]


def scores(report: Mapping[str, Any], kind: str) -> dict[str, float]:
    """The figures of retrieval or ranking of one kind of features."""
    task = task_of(report)
    rows = [own for own in report["measurements"] if (own["features"], own["task"]) == (kind, task)]
    return {own["metric"]: own["value"] for own in rows}
