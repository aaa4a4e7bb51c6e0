"""What an evaluation.json holds: its measurements by task, kind of features and metric."""

import json
from pathlib import Path
from typing import Any


def recorded(folder: Path) -> dict[str, Any]:
    """The newest record of a folder."""
    return json.loads((folder / "evaluation.json").read_text())


def measured(record: dict[str, Any], *tasks: str, metric: str | None = None) -> list[dict[str, Any]]:
    """The measurements of some tasks, of one metric or of all."""
    return [row for row in record["measurements"] if row["task"] in tasks and metric in (None, row["metric"])]


def values(record: dict[str, Any], task: str, metric: str) -> dict[str, float]:
    """What was measured by one task and metric, by kind of features."""
    return {row["features"]: row["value"] for row in measured(record, task, metric=metric)}
