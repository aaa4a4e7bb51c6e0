"""evaluation.json: the measurements of a run, by weights, images and protocol.

The newest results are at the top level, merged with earlier ones of the same weights, images and protocol. Records of
others follow under `kept`, newest first, in the same format.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from operator import itemgetter
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from manyviews.evaluation.method_rows import leaves
from manyviews.evaluation.old_records import converted
from manyviews.evaluation.settings import EvaluateSettings, pairs_mark, relations_mark
from manyviews.evaluators.failures import Failure
from manyviews.evaluators.results.measurement import LAYERS, TASKS, Difference, Evaluation, Measurement
from manyviews.features.backbone import PretrainedBackbone
from manyviews.report import Findings

EVALUATION, OUTCOMES, KEPT = "evaluation.json", "outcomes.safetensors", "kept"
OWN = ("predictions", "hits", "values", "labels")
"""First parts of the names of the newest record's outcomes."""
MARKS = ("pairs", "relations")
"""Files that results depend on, in the context of a record only where they are given."""
CONTEXT = ("weights", "images", "classes", "precision", "protocol", "metric", "few", *MARKS)
"""What results depend on beside task and kind of features."""
MOST_KEPT = 50
"""Most records of other weights, images or protocols: the file is read whole, so the oldest are dropped."""
Record = dict[str, Any]
Outcomes = dict[str, Tensor]
"""Values of each test image, by "hits/knn/learned" and so on; of a kept record after its key: "0f3a…/hits/…"."""
ROWS = {"measurements": itemgetter("task", "features"), "differences": itemgetter("features", "baseline", "task")}
"""The lists of a record, and the key of their rows: a new row replaces the old ones of its key."""


class Gallery(BaseModel):
    """The test images that were compared with each other."""

    images: int
    classes: list[int]
    origin: str


class Stored(BaseModel):
    """The part of a record that a report shows."""

    measurements: tuple[Measurement, ...] = ()
    differences: tuple[Difference, ...] = ()
    gallery: Gallery | None = None
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()


def record_of(
    findings: Findings, pretrained: PretrainedBackbone, settings: EvaluateSettings
) -> tuple[Record, Outcomes]:
    """Returns the results of an evaluation as JSON values, and its outcomes for each test image."""
    images = [part.fingerprint for part in (findings.train, findings.test) if part is not None]
    record: Record = {"weights": dict(pretrained.origin), "images": images}
    record["layers"] = {kind: LAYERS.get(kind) for kind in findings.features}
    outcomes: Outcomes = {}
    evaluation = findings.evaluation
    record |= evaluation.to_json()
    if "gallery" in record:
        record["gallery"]["names"] = [findings.train.classes[number] for number in record["gallery"]["classes"]]
        outcomes = {f"predictions/{name}": value for name, value in evaluation.predictions.items()}
        outcomes |= {f"hits/{name}": value for name, value in evaluation.hits.items()}
        outcomes |= {f"values/{name}": value for name, value in evaluation.values.items()}
        outcomes |= {"labels": labels} if (labels := findings.shown.labels) is not None else {}
    # As in the settings: without a metric, each measurement names its own distance.
    record |= settings.model_dump(mode="json", include={"classes", "precision", "protocol", "metric", "few", "layer"})
    for name, mark in zip(MARKS, (pairs_mark(settings), relations_mark(settings)), strict=True):
        record |= {} if mark is None else {name: mark}
    record["failures"] = [asdict(own) for own in findings.failures]
    record["warnings"] = list(findings.warnings)
    record["tasks"] = tasks_of(record)
    # With lists for tuples, as it will be read.
    plain: Record = json.loads(json.dumps(record))
    return plain, outcomes


def records_in(whole: Mapping[str, Any]) -> Iterator[tuple[Record, str]]:
    """Yields the records of an evaluation.json, newest first, with their outcomes' prefix.

    Records in the old format are converted; raises ValueError if one is in neither format.
    """
    top = {name: value for name, value in whole.items() if name != KEPT}
    kept = whole.get(KEPT, [])
    if not isinstance(kept, list) or not all(isinstance(record, dict) for record in kept):
        raise ValueError(f"{KEPT} is no list of records")
    try:
        yield converted(top), ""
        for record in kept:
            yield converted(record), f"{key_of(record)}/"
    except (KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ValueError(f"a result is not in the format of evaluate: {problem!r}") from problem


def key_of(record: Mapping[str, Any]) -> str:
    """Returns the key of a record: a hash of its weights, images and protocol."""
    context = json.dumps(
        {name: record.get(name) for name in CONTEXT if name in record or name not in MARKS}, sort_keys=True
    )
    return hashlib.sha256(context.encode()).hexdigest()[:12]


def merge(
    record: Record, outcomes: Outcomes, before: Mapping[str, Any], outcomes_before: Outcomes
) -> tuple[Record, Outcomes, int]:
    """Merges a record into an evaluation.json; returns both merged, and how many were dropped.

    New results replace those of the same weights, images, protocol, task and features. Outcomes are kept for the
    weights of the new record alone; records of other weights, as of an earlier step, keep their numbers. Raises
    ValueError if an old record is in neither format.
    """
    others: list[Record] = []
    merged, all_outcomes = record, dict(outcomes)
    for old, prefix in records_in(before):
        parts = {name.removeprefix(prefix): value for name, value in outcomes_before.items() if name.startswith(prefix)}
        if not prefix:
            parts = {name: value for name, value in parts.items() if name.partition("/")[0] in OWN}
        if key_of(old) == key_of(record):
            merged, all_outcomes = _merged(record, old), parts | all_outcomes
            continue
        others.append({name: value for name, value in old.items() if name != "outcomes"})
        if old.get("weights") == record["weights"]:
            all_outcomes |= {f"{key_of(old)}/{name}": value for name, value in parts.items()}
    dropped = {key_of(old) for old in others[MOST_KEPT:]}
    all_outcomes = {name: value for name, value in all_outcomes.items() if name.partition("/")[0] not in dropped}
    if others:
        merged = merged | {KEPT: others[:MOST_KEPT]}
    return merged, all_outcomes, len(others[MOST_KEPT:])


def tasks_of(record: Mapping[str, Any]) -> list[str]:
    """Returns the tasks that a record has results of."""
    return [task for task in dict.fromkeys(row["task"] for row in record["measurements"]) if task != "staleness"]


def with_kept(findings: Findings, whole: Mapping[str, Any], outcomes: Outcomes) -> Findings:
    """Adds the file's results of the same weights and images; raises ValueError if malformed."""
    (record, _), *others = records_in(whole)
    also = []
    for other, _ in others:
        if (other.get("weights"), other.get("images")) == (record["weights"], record["images"]):
            try:
                also.append((_settings_apart(other, record), evaluation_of(other)))
            except ValueError:
                # Written by another version: it stays in the file.
                continue
    failures = stored(record).failures
    evaluation = replace(evaluation_of(record, outcomes), ranked=findings.evaluation.ranked)
    return findings._replace(evaluation=evaluation, failures=failures, also=tuple(also))


def stored(record: Mapping[str, Any]) -> Stored:
    """Validates the results of a record; raises ValueError with the first wrong key."""
    try:
        return Stored.model_validate(record)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def evaluation_of(record: Mapping[str, Any], outcomes: Mapping[str, Tensor] | None = None) -> Evaluation:
    """Returns the evaluation in a record and its outcomes; raises ValueError for another format."""
    own = stored(record)
    parts: dict[str, Outcomes] = {"predictions": {}, "hits": {}, "values": {}}
    for name, value in (outcomes or {}).items():
        part, _, rest = name.partition("/")
        if part in parts:
            if value.dtype != (torch.float32 if part == "values" else torch.int64) or value.ndim != 1:
                raise ValueError(f"{name} of {OUTCOMES} is not a number for each image")
            parts[part][rest] = value
    gallery = {} if own.gallery is None else own.gallery.model_dump()
    by_image = parts["predictions"], parts["hits"], parts["values"]
    return Evaluation(own.measurements, own.differences, gallery, *by_image)


def _merged(record: Record, old: Mapping[str, Any]) -> Record:
    merged: Record = {**old, **record}
    for name, key in ROWS.items():
        fresh = {key(row) for row in record.get(name, ())}
        rows = [*record.get(name, ()), *(row for row in old.get(name, ()) if key(row) not in fresh)]
        merged[name] = sorted(rows, key=lambda row: TASKS.index(row["task"]))
    merged["layers"] = {**old.get("layers", {}), **record.get("layers", {})}
    done = {(row["task"], row["features"]) for row in merged["measurements"]}
    failures = {(row["task"], row["features"]): row for row in (*old.get("failures", ()), *record.get("failures", ()))}
    merged["failures"] = [row for key, row in failures.items() if key not in done]
    merged["tasks"] = tasks_of(merged)
    if verdict := evaluation_of(merged).verdict():
        merged["verdict"] = verdict
    return merged


def _settings_apart(record: Mapping[str, Any], top: Mapping[str, Any]) -> str:
    """The settings in which a kept record differs from the one at the top level."""
    own, other = (leaves({name: one.get(name) for name in CONTEXT[2:]}) for one in (record, top))
    changed = [f"{key}={_text(value)}" for key, value in own.items() if other.get(key) != value]
    return ", ".join(changed) or "another protocol"


def _text(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
