"""Reads a run's folder for its report: the recipe in words, metrics, and warnings."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from manyviews.config import Settings, load
from manyviews.recipe import Recipe
from manyviews.report.findings import Findings, has_labels
from manyviews.run.folder import CONFIG, DONE, METRICS, UNREADABLE
from manyviews.run.health import Watch
from manyviews.system.console import duration
from manyviews.system.files import open_lines, parse_json, spelled
from manyviews.system.plural import plural

MOST_LETTERS = 1 << 26
"""Most letters that are read of one file: metrics of some hundred thousand lines."""
LONGEST_DAY = 40


class History(NamedTuple):
    """The content of a run's folder; `unreadable` are names and reasons of skipped files."""

    recipe: Recipe | None
    """None without a configuration, as for a backbone that was not made by this package."""
    config: str
    """The configuration as it was written, without its header."""
    command: str
    commit: str
    """The commit and the versions of the libraries."""
    metrics: tuple[dict[str, float], ...]
    """The lines of metrics, oldest first; NaN for what is not a number."""
    finished: str
    """The day on which the run ended; empty if it has not."""
    unreadable: tuple[tuple[str, str], ...]


def read_history(folder: Path) -> History:
    """Reads a run's folder; missing files and incomplete lines are ignored."""
    recipe, config, header = None, "", []
    if (folder / CONFIG).is_file():
        lines = _lines(folder / CONFIG)
        header = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
        config = "\n".join(spelled(line) for line in lines if not line.startswith("#"))
        recipe = load(Recipe, folder / CONFIG)
    unreadable = [line.partition("\t") for line in _lines(folder / UNREADABLE) if line]
    return History(
        recipe,
        config,
        spelled(header[0]) if header else "",
        spelled(header[1].removeprefix("commit ")) if len(header) > 1 else "",
        tuple(_metrics(folder / METRICS)),
        spelled("".join(_lines(folder / DONE)[:1]).partition("T")[0])[:LONGEST_DAY],
        tuple((spelled(name), spelled(reason)) for name, _, reason in unreadable),
    )


def in_words(settings: Settings) -> str:
    """Describes a component by its name and its values other than the defaults."""
    parts = []
    for name, field in type(settings).model_fields.items():
        value, key = getattr(settings, name), name.replace("_", " ")
        if name == "name" or value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, Settings):
            parts.append(f"{key} ({in_words(value)})")
        elif isinstance(value, bool):
            parts.append(key if value else f"no {key}")
        else:
            parts.append(f"{key} {_text(value)}")
    named = [str(settings.name)] if hasattr(settings, "name") else []
    return ", ".join(named + parts)


def facts(history: History, findings: Findings) -> list[tuple[str, str]]:
    """Returns terms and descriptions: objective, encoder, images, training, command, commit."""
    recipe, train, test = history.recipe, findings.train, findings.test
    width = f"{plural(findings.width, 'feature')} per image"
    rows = [("features", width)]
    if recipe is not None:
        positives = "views of the same image" if recipe.ids == "images" else "images of the same label"
        if recipe.data.relations is not None and recipe.ids == "images" and recipe.objective.traits.relations:
            positives = "those of the relations"
        start = "pretrained" if recipe.encoder.pretrained else "from random weights"
        projector = recipe.encoder.projector
        projected = f"projected onto {projector.dim:,}" if projector.layers else "no projector"
        views = f"{plural(recipe.views.num_views, 'view')} of each image, {recipe.views.size} px"
        views += f", and {recipe.views.local} local ones, {recipe.views.local_size} px" if recipe.views.local else ""
        unseen = f"; without classes {', '.join(map(str, recipe.unseen))}" if recipe.unseen else ""
        rows = [
            ("objective", f"{in_words(recipe.objective)}; positives are {positives}"),
            ("encoder", f"{recipe.encoder.name}, {start}; {width}, {projected}"),
            ("learned on", f"{in_words(recipe.data)}; {views}{unseen}"),
            ("training", _training(recipe, history)),
        ]
    held_out = f" and {len(test):,} held out" if test is not None else ", none held out"
    colours = "grey" if train.channels == 1 else "colour"
    classes = plural(len(findings.classes), "class", "classes")
    labels = classes if has_labels(findings.shown.labels) else "without labels"
    rows.append(("measured on", f"{len(train):,} training images{held_out}, {colours}, {train.size} px, {labels}"))
    rows += [("command", history.command)] if history.command else []
    rows += [("made by", history.commit)] if history.commit else []
    return [(term, spelled(text)) for term, text in rows]


def _training(recipe: Recipe, history: History) -> str:
    settings, metrics = recipe.train, history.metrics
    budget = plural(settings.minutes, "minute") if settings.minutes else plural(settings.epochs, "epoch")
    parts = [f"{budget}, batch {settings.batch_size:,}, {in_words(recipe.optim)}, seed {recipe.seed}"]
    seconds = max((line["seconds"] for line in metrics if math.isfinite(line.get("seconds", math.nan))), default=None)
    if seconds is not None:
        parts.append(f"{int(metrics[-1]['step']):,} steps in {duration(seconds)}")
    return "; ".join([*parts, f"finished on {history.finished}" if history.finished else "not finished"])


def warnings_of(history: History, widest: int) -> list[str]:
    """Returns warnings about the metrics: non-finite losses, and those of `health.Watch`.

    `widest` is the width of the features, the objective's input without a projector.
    """
    recipe, metrics = history.recipe, [line for line in history.metrics if "loss" in line]
    warnings: list[str] = []
    if lost := sum(not math.isfinite(line["loss"]) for line in metrics):
        warnings.append(f"the loss was not finite in {lost:,} of {plural(len(metrics), 'line')} of metrics")
    if recipe is not None:
        projector = recipe.encoder.projector
        dim = projector.dim if projector.layers else widest
        watch = Watch(min(recipe.train.batch_size, dim))
        for line in metrics:
            finite = {key: value for key, value in line.items() if math.isfinite(value)}
            warnings += watch.warnings(_progress(recipe, line, metrics[-1]), line.get("epoch", 0.0), finite)
    return warnings


def _progress(recipe: Recipe, line: dict[str, float], last: dict[str, float]) -> float:
    if recipe.train.minutes is not None and "seconds" in line:
        return min(1.0, line["seconds"] / (60 * recipe.train.minutes))
    if "epoch" in line:
        return min(1.0, line["epoch"] / recipe.train.epochs)
    return line["step"] / max(last["step"], 1)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " to ".join(map(_text, value)) if isinstance(value, tuple) else str(value)


def _metrics(file: Path) -> list[dict[str, float]]:
    metrics = []
    for text in _lines(file):
        try:
            line = parse_json(text, file.name)
        except ValueError:
            continue
        numbers = {key: value for key, value in line.items() if value is None or isinstance(value, int | float)}
        with suppress(OverflowError):
            values = {key: math.nan if value is None else float(value) for key, value in numbers.items()}
            if math.isfinite(values.get("step", math.nan)):
                metrics.append(values)
    return metrics


def _lines(file: Path) -> list[str]:
    """The lines of a file, up to `MOST_LETTERS` letters; none if there is no file."""
    if not file.is_file():
        return []
    lines, letters = [], 0
    # Reading ends at a line that is longer than any that is written.
    with open_lines(file) as content, suppress(ValueError):
        for line in content:
            letters += len(line)
            if letters > MOST_LETTERS:
                break
            lines.append(line.rstrip("\r\n"))
    return lines
