"""What an evaluation.json holds: its measurements by task, kind of features and metric; and tables as text."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manyviews.evaluators.results.tables import Sheet, printed


def recorded(folder: Path) -> dict[str, Any]:
    """The newest record of a folder."""
    return json.loads((folder / "evaluation.json").read_text())


def measured(record: dict[str, Any], *tasks: str, metric: str | None = None) -> list[dict[str, Any]]:
    """The measurements of some tasks, of one metric or of all."""
    return [row for row in record["measurements"] if row["task"] in tasks and metric in (None, row["metric"])]


def values(record: dict[str, Any], task: str, metric: str) -> dict[str, float]:
    """What was measured by one task and metric, by kind of features."""
    return {row["features"]: row["value"] for row in measured(record, task, metric=metric)}


def printed_text(tables: Iterable[Sheet | Table], width: int = 80) -> str:
    """Tables as a terminal of some width shows them."""
    console = Console(width=width)
    with console.capture() as capture:
        for table in tables:
            console.print(printed(table) if isinstance(table, Sheet) else table)
    return capture.get()
