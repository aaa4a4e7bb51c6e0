"""evaluation.json: what was measured of a run, by weights, images and protocol, replaced by the same alone.

The newest results stand at the top level, together with earlier ones of the same weights, images and protocol. Those of
others follow under `kept`, newest first, each in the same form.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from manyviews.evaluate.method_rows import leaves
from manyviews.evaluate.old_records import converted
from manyviews.evaluate.settings import EvaluateSettings
from manyviews.evaluators.alone import Failure
from manyviews.evaluators.results.kinds import LAYERS
from manyviews.evaluators.results.measurement import TASKS, Difference, Evaluation, Measurement
from manyviews.features.backbone import PretrainedBackbone
from manyviews.report import Findings
from manyviews.report.findings import Also

EVALUATION, OUTCOMES, KEPT = "evaluation.json", "outcomes.safetensors", "kept"
OWN = ("predictions", "hits", "labels")
"""What the names of the newest record's outcomes begin with."""
CONTEXT = ("weights", "images", "classes", "precision", "protocol", "metric", "few")
"""What results follow from beside the task and the kind of features."""
MOST_KEPT = 50
"""Records of other weights, images or protocols; of more the oldest go, for whoever reads the file reads it whole."""
Record = dict[str, Any]
Outcomes = dict[str, Tensor]
"""Of each test image, by "hits/knn/learned" and so on; of a kept record its number stands before: "0f3a…/hits/…"."""
ROWS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "measurements": lambda row: (row["task"], row["features"]),
    "differences": lambda row: (row["features"], row["baseline"], row["task"]),
}
"""The lists of a record, and what one of their rows replaces others by."""


class Gallery(BaseModel):
    """Which test images were compared with each other."""

    images: int
    classes: list[int]
    origin: str


class Stored(BaseModel):
    """A record, as far as a report shows it."""

    measurements: tuple[Measurement, ...] = ()
    differences: tuple[Difference, ...] = ()
    gallery: Gallery | None = None
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()


def record_of(findings: Findings, opened: PretrainedBackbone, settings: EvaluateSettings) -> tuple[Record, Outcomes]:
    """What one evaluation has measured, as JSON values, and what was predicted of each test image."""
    images = [part.fingerprint for part in (findings.train, findings.test) if part is not None]
    record: Record = {"weights": dict(opened.origin), "images": images}
    record["layers"] = {kind: LAYERS.get(kind) for kind in findings.features}
    outcomes: Outcomes = {}
    evaluation = findings.evaluation
    record |= evaluation.to_json()
    if "gallery" in record:
        record["gallery"]["names"] = [findings.train.classes[number] for number in record["gallery"]["classes"]]
        outcomes = {f"predictions/{name}": value for name, value in evaluation.predictions.items()}
        outcomes |= {f"hits/{name}": value for name, value in evaluation.hits.items()}
        outcomes |= {"labels": labels} if (labels := findings.shown.labels) is not None else {}
    # As it was asked for: where no metric was, each result names its own distance.
    record |= settings.model_dump(mode="json", include={"classes", "precision", "protocol", "metric", "few", "layer"})
    record["failures"] = [asdict(own) for own in findings.failures]
    record["warnings"] = list(findings.warnings)
    record["tasks"] = tasks_of(record)
    # As it will be read: tuples are lists.
    plain: Record = json.loads(json.dumps(record))
    return plain, outcomes


def records_in(whole: Mapping[str, Any]) -> Iterator[tuple[Record, str]]:
    """The records of an evaluation.json, the newest first, each with what its outcomes' names begin with.

    Those that were written as a list for each kind of result are converted.

    Raises:
        ValueError: if it is not of the form that evaluate writes.
    """
    top = {name: value for name, value in whole.items() if name != KEPT}
    kept = whole.get(KEPT, [])
    if not isinstance(kept, list) or not all(isinstance(record, dict) for record in kept):
        raise ValueError(f"{KEPT} is no list of records")
    try:
        yield converted(top), ""
        for record in kept:
            yield converted(record), f"{number_of(record)}/"
    except (KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ValueError(f"a result is not of the form that evaluate writes: {problem!r}") from problem


def number_of(record: Mapping[str, Any]) -> str:
    """What tells a record from those of other weights, images or protocols."""
    told = json.dumps({name: record.get(name) for name in CONTEXT}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def merge(
    record: Record, outcomes: Outcomes, before: Mapping[str, Any], kept_outcomes: Outcomes
) -> tuple[Record, Outcomes, int]:
    """A new record together with what an evaluation.json held, all outcomes, and how many records had to go.

    Of the same weights, images and protocol, results that were measured anew replace the old ones and others stay. What
    was predicted of each image stays for these weights alone: of others, as of a run that went on, the numbers stay.

    Raises:
        ValueError: if what was there is not of the form that evaluate writes.
    """
    own, others = number_of(record), []
    merged, together = record, dict(outcomes)
    for old, prefix in records_in(before):
        parts = {name: value for name, value in kept_outcomes.items() if name.startswith(prefix)}
        parts = {name.removeprefix(prefix): value for name, value in parts.items()}
        if not prefix:
            parts = {name: value for name, value in parts.items() if name.partition("/")[0] in OWN}
        if number_of(old) == own:
            merged = _of_the_same(record, old)
            together = parts | together
            continue
        number = number_of(old)
        others.append({name: value for name, value in old.items() if name != "outcomes"})
        if old.get("weights") == record["weights"]:
            together |= {f"{number}/{name}": value for name, value in parts.items()}
    for old in others[MOST_KEPT:]:
        together = {name: value for name, value in together.items() if not name.startswith(f"{number_of(old)}/")}
    if others:
        merged = merged | {KEPT: others[:MOST_KEPT]}
    return merged, together, len(others[MOST_KEPT:])


def tasks_of(record: Mapping[str, Any]) -> list[str]:
    """The tasks that a record has results of."""
    return [task for task in dict.fromkeys(row["task"] for row in record["measurements"]) if task != "staleness"]


def with_kept(findings: Findings, whole: Mapping[str, Any], outcomes: Outcomes) -> Findings:
    """The findings with all that is kept of the same weights and images, for a report.

    Raises:
        ValueError: if a result is not of the form that evaluate writes.
    """
    (record, _), *others = records_in(whole)
    also = []
    for other, _ in others:
        if (other.get("weights"), other.get("images")) == (record["weights"], record["images"]):
            try:
                also.append(Also(_settings_apart(other, record), evaluation_of(other)))
            except ValueError:
                # Of another version: it stays in the file.
                continue
    failures = stored(record).failures
    return findings._replace(evaluation=evaluation_of(record, outcomes), failures=failures, also=tuple(also))


def stored(record: Mapping[str, Any]) -> Stored:
    """A record's results, checked.

    Raises:
        ValueError: if one is not of the form that evaluate writes.
    """
    try:
        return Stored.model_validate(record)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def evaluation_of(record: Mapping[str, Any], outcomes: Mapping[str, Tensor] | None = None) -> Evaluation:
    """The evaluation that a record and its outcomes hold.

    Raises:
        ValueError: if a result is not of the form that evaluate writes.
    """
    own = stored(record)
    parts: dict[str, Outcomes] = {"predictions": {}, "hits": {}}
    for name, value in (outcomes or {}).items():
        part, _, rest = name.partition("/")
        if part in parts:
            if value.dtype != torch.int64 or value.ndim != 1:
                raise ValueError(f"{name} of {OUTCOMES} is no whole number for each image")
            parts[part][rest] = value
    gallery = {} if own.gallery is None else own.gallery.model_dump()
    return Evaluation(own.measurements, own.differences, gallery, **parts)


def _of_the_same(record: Record, old: Mapping[str, Any]) -> Record:
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
    """In what a record of the same weights and images was measured otherwise than the one at the top."""
    own, other = (leaves({name: one.get(name) for name in CONTEXT[2:]}) for one in (record, top))
    changed = [f"{key}={_text(value)}" for key, value in own.items() if other.get(key) != value]
    return ", ".join(changed) or "another protocol"


def _text(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
