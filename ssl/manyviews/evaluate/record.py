"""evaluation.json: what was measured of a run, by weights, images and protocol, replaced by the same alone.

The newest results stand at the top level, together with earlier ones of the same weights, images and protocol. Those of
others follow under `kept`, newest first, each in the same form.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from manyviews.evaluate.settings import EvaluateSettings
from manyviews.evaluators.alone import Failure
from manyviews.evaluators.fractions import FractionResult
from manyviews.evaluators.geometry import Geometry, Staleness
from manyviews.evaluators.kinds import LAYERS
from manyviews.evaluators.learned_distance import Cosine, Metric
from manyviews.evaluators.measurement import LEADING, Figures
from manyviews.evaluators.protocol import ProtocolSettings
from manyviews.evaluators.scores import TITLES, Difference, Evaluation, Score
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
    "scores": lambda row: (row["features"], row["method"]),
    "figures": lambda row: (row["features"], row["task"]),
    "differences": lambda row: (row["features"], row["baseline"], row["method"]),
    "geometry": lambda row: row["features"],
}
"""The lists of a record, and what one of their rows replaces another by."""


class Gallery(BaseModel):
    """Which test images were compared with each other."""

    images: int
    classes: list[int]
    origin: str


class Stored(BaseModel):
    """The results of a record, as far as a report shows them."""

    model_config = ConfigDict(frozen=True)

    protocol: ProtocolSettings
    metric: Metric | None
    """As it was asked for: where none was, each result names its own."""
    scores: tuple[Score, ...] = ()
    figures: tuple[Figures, ...] = ()
    differences: tuple[Difference, ...] = ()
    gallery: Gallery | None = None
    fractions: dict[str, tuple[FractionResult, ...]] = {}
    geometry: tuple[Geometry, ...] = ()
    staleness: Staleness | None = None


def record_of(findings: Findings, opened: PretrainedBackbone, settings: EvaluateSettings) -> tuple[Record, Outcomes]:
    """What one evaluation has measured, as JSON values, and what was predicted of each test image."""
    images = [part.fingerprint for part in (findings.train, findings.test) if part is not None]
    record: Record = {"weights": dict(opened.origin), "images": images}
    record["layers"] = {kind: LAYERS.get(kind) for kind in findings.features}
    outcomes: Outcomes = {}
    evaluation = findings.evaluation
    if evaluation is not None:
        record |= evaluation.to_json()
        record["gallery"]["names"] = [findings.train.classes[number] for number in record["gallery"]["classes"]]
        outcomes = {f"predictions/{name}": value for name, value in evaluation.predictions.items()}
        outcomes |= {f"hits/{name}": value for name, value in evaluation.hits.items()}
        outcomes |= {"labels": labels} if (labels := findings.shown.labels) is not None else {}
    # As it was asked for: where no metric was, each result names its own.
    record |= settings.model_dump(mode="json", include={"classes", "precision", "protocol", "metric", "layer"})
    record["few"] = settings.few.model_dump(mode="json")
    record["fractions"] = {kind: [asdict(row) for row in rows] for kind, rows in findings.fractions.items()}
    record["geometry"] = [asdict(own) for own in findings.geometry]
    record["staleness"] = asdict(findings.staleness) if findings.staleness is not None else None
    record["failures"] = [asdict(own) for own in findings.failures]
    record["warnings"] = list(findings.warnings)
    record["tasks"] = looks_of(record)
    # As it will be read: tuples are lists.
    plain: Record = json.loads(json.dumps(record))
    return plain, outcomes


def records_in(whole: Mapping[str, Any]) -> Iterator[tuple[Record, str]]:
    """The records of an evaluation.json, the newest first, each with what its outcomes' names begin with.

    Raises:
        ValueError: if it is not of the form that evaluate writes.
    """
    top = {name: value for name, value in whole.items() if name != KEPT}
    kept = whole.get(KEPT, [])
    if not isinstance(kept, list) or not all(isinstance(record, dict) for record in kept):
        raise ValueError(f"{KEPT} is no list of records")
    yield top, ""
    for record in kept:
        yield record, f"{number_of(record)}/"


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


def looks_of(record: Mapping[str, Any]) -> list[str]:
    """The tasks that a record has results of."""
    found = dict.fromkeys(score["method"] for score in record.get("scores", ()))
    found |= dict.fromkeys(figures["task"] for figures in record.get("figures", ()))
    found |= {"fractions": None} if record.get("fractions") else {}
    found |= {"geometry": None} if record.get("geometry") else {}
    return list(found)


def with_kept(findings: Findings, whole: Mapping[str, Any], outcomes: Outcomes) -> Findings:
    """The findings with all that is kept of the same weights and images, for a report.

    Raises:
        ValueError: if a result is not of the form that evaluate writes.
    """
    (record, _), *others = records_in(whole)
    stored = _stored(record)
    also = []
    for other, _ in others:
        if (other.get("weights"), other.get("images")) == (record["weights"], record["images"]):
            try:
                also.append(_also(_stored(other), _difference(other, record)))
            except ValueError:
                # Of another version of the protocol: it stays in the file.
                continue
    return findings._replace(
        evaluation=_evaluation(stored, outcomes) or findings.evaluation,
        geometry=stored.geometry,
        fractions=stored.fractions,
        staleness=stored.staleness,
        failures=tuple(Failure(**row) for row in record.get("failures", ())),
        also=tuple(also),
    )


def _of_the_same(record: Record, old: Mapping[str, Any]) -> Record:
    merged: Record = {**old, **record}
    for name, key in ROWS.items():
        if name not in record and name not in old:
            continue
        fresh = {key(row) for row in record.get(name, ())}
        rows = [*record.get(name, ()), *(row for row in old.get(name, ()) if key(row) not in fresh)]
        merged[name] = _in_order(name, rows)
    for name in ("fractions", "layers"):
        merged[name] = {**record.get(name, {}), **old.get(name, {}), **record.get(name, {})}
    if record["staleness"] is None:
        merged["staleness"] = old.get("staleness")
    done = {(task, kind) for task, kind, _ in _measured(merged)}
    failures = {(row["task"], row["features"]): row for row in (*old.get("failures", ()), *record.get("failures", ()))}
    merged["failures"] = [row for key, row in failures.items() if key not in done]
    merged["tasks"] = looks_of(merged)
    evaluation = _evaluation(_stored(merged), {})
    if evaluation is not None:
        merged["verdict"] = evaluation.verdict()
    return merged


def _in_order(name: str, rows: Sequence[Record]) -> list[Record]:
    """Rows as one evaluation has them: scores kind by kind, figures and differences task by task."""
    kinds = list(dict.fromkeys(_kind(row) for row in rows))

    def place(row: Record) -> tuple[int, int]:
        tasks, own = (*TITLES, *LEADING), row.get("task", row.get("method"))
        task = tasks.index(own) if own in tasks else len(tasks)
        kind = kinds.index(_kind(row))
        return (kind, task) if name in ("scores", "geometry") else (task, kind)

    return sorted(rows, key=place)


def _kind(row: Record) -> str:
    return str(row.get("baseline", row["features"]))


def _measured(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for name, task in (("scores", "method"), ("figures", "task")):
        for row in record.get(name, ()):
            yield row[task], row["features"], row
    for kind in record.get("fractions", {}):
        yield "fractions", kind, {}
    for row in record.get("geometry", ()):
        yield "geometry", row["features"], row


def _stored(record: Mapping[str, Any]) -> Stored:
    scores = [
        {**score, "validation": math.nan if score.get("validation") is None else score["validation"]}
        for score in record.get("scores", ())
    ]
    try:
        return Stored.model_validate({**record, "scores": scores})
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _evaluation(stored: Stored, outcomes: Outcomes) -> Evaluation | None:
    if stored.gallery is None or not (stored.scores or stored.figures):
        return None
    parts: dict[str, Outcomes] = {"predictions": {}, "hits": {}}
    for name, value in outcomes.items():
        part, _, rest = name.partition("/")
        if part in parts:
            parts[part][rest] = value
    return Evaluation(
        stored.protocol,
        stored.metric or Cosine(),
        stored.scores,
        stored.figures,
        stored.differences,
        stored.gallery.model_dump(),
        parts["predictions"],
        parts["hits"],
    )


def _also(stored: Stored, title: str) -> Also:
    return Also(title, _evaluation(stored, {}), stored.geometry, stored.fractions, stored.staleness)


def _difference(record: Mapping[str, Any], top: Mapping[str, Any]) -> str:
    """In what a record of the same weights and images was measured otherwise than the one at the top."""
    own, other = (_leaves({name: one.get(name) for name in CONTEXT[2:]}) for one in (record, top))
    changed = [f"{key}={_text(value)}" for key, value in own.items() if other.get(key) != value]
    return ", ".join(changed) or "another protocol"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _text(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
