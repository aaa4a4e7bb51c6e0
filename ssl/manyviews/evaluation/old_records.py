"""Converts old records of evaluation.json: one list for each kind of result, fewer settings of the protocol."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from manyviews.evaluators.fractions import mean_of_draws
from manyviews.evaluators.geometry import BANK
from manyviews.evaluators.protocol import ProtocolSettings
from manyviews.evaluators.results.measurement import CHOICES, TASKS, Measurement

LISTS = ("scores", "figures", "fractions", "geometry", "staleness")


def converted(record: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the results of an old record to measurements, and adds new settings to its protocol.

    Settings that did not exist are those by default: a task without them was measured as with these. Raises
    KeyError, TypeError, AttributeError or ValueError for a record in neither format.
    """
    record = {**record, "protocol": _with_new_settings(record["protocol"])} if "protocol" in record else record
    if not any(name in record for name in LISTS):
        return dict(record)
    measurements = sorted(_measurements(record), key=lambda own: TASKS.index(own.task))
    differences = [
        {"task": row["method"]} | {name: value for name, value in row.items() if name != "method"}
        for row in record.get("differences", ())
    ]
    others = {name: value for name, value in record.items() if name not in LISTS}
    return others | {"measurements": [own.to_json() for own in measurements], "differences": differences}


def _with_new_settings(protocol: Any) -> Any:
    """The protocol with all settings that there are; of another version as it is."""
    try:
        return ProtocolSettings.model_validate(protocol).model_dump(mode="json")
    except ValidationError:
        return protocol


def _measurements(record: Mapping[str, Any]) -> Iterator[Measurement]:
    for row in record.get("scores", ()):
        task, kind, distance = row["method"], row["features"], row.get("metric") if row["method"] == "knn" else None
        details = {name: row.get(name) for name in ("validation", "num_train")}
        details |= {name: row[name] for name in CHOICES if row.get(name) is not None}
        both = {"n": row["num_test"], "dim": row["dim"], "distance": distance}
        yield Measurement(task, kind, "accuracy", row["accuracy"], row["low"], row["high"], details=details, **both)
        if row.get("balanced") is not None:
            yield Measurement(task, kind, "balanced accuracy", row["balanced"], **both)
    for row in record.get("figures", ()):
        (number, *_), left_out = row["counts"].values(), row["counts"].get("left_out")
        for name, value in row["values"].items():
            low, high = row["intervals"].get(name, (None, None))
            yield Measurement(
                row["task"],
                row["features"],
                name,
                value,
                low,
                high,
                n=number,
                deviation=row["deviations"].get(name),
                dim=row["dim"],
                distance=row.get("metric", "cosine"),
                details={} if left_out is None else {"left_out": left_out},
            )
    for kind, rows in record.get("fractions", {}).items():
        for row in rows:
            yield mean_of_draws(kind, row["name"], row["images"], row["accuracies"], row.get("regularisations", []))
    for row in record.get("geometry", ()):
        for name in ("effective rank", "uniformity", "alignment"):
            value = row.get(name.replace(" ", "_"))
            if value is not None:
                yield Measurement("geometry", row["features"], name, value, n=row["images"], dim=row["dim"])
    if (stale := record.get("staleness")) is not None:
        for name, value in {"mean": stale["mean"], **stale["quantiles"]}.items():
            yield Measurement("staleness", BANK, name, value, n=stale["images"])
