"""What a run has left in its folder, read back for a report: its recipe in words, its metrics, what went wrong."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from manyviews.config import Settings, load
from manyviews.recipe import Recipe
from manyviews.report.findings import Findings, has_labels
from manyviews.run.folder import CONFIG, DONE, METRICS
from manyviews.run.health import Watch
from manyviews.system.console import duration
from manyviews.system.files import open_lines, parse_json, spelled
from manyviews.system.plural import plural

UNREADABLE = "unreadable.txt"
MOST_LETTERS = 1 << 26
"""Of one file that are read; that is metrics of some hundred thousand lines."""
LONGEST_DAY = 40


class History(NamedTuple):
    """What a run's folder says of its past."""

    recipe: Recipe | None
    """None where there is no configuration, as beside a backbone that no run of this package has made."""
    config: str
    """The configuration as it was written, without its header."""
    command: str
    commit: str
    """The commit and the versions of what was used."""
    metrics: tuple[dict[str, float], ...]
    """The lines of metrics, oldest first; what is not a number is NaN."""
    finished: str
    """The day on which the run ended; empty if it has not."""
    unreadable: tuple[tuple[str, str], ...]
    """Files that were left out: name and reason."""


def read_history(folder: Path) -> History:
    """Reads what there is of a run's folder; a file that is missing, or a line that was cut off, is no error."""
    recipe, config, header = None, "", []
    if (folder / CONFIG).is_file():
        lines = _lines(folder / CONFIG)
        header = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
        config = printable_lines([line for line in lines if not line.startswith("#")])
        recipe = load(Recipe, folder / CONFIG)
    return History(
        recipe,
        config,
        spelled(header[0]) if header else "",
        spelled(header[1].removeprefix("commit ")) if len(header) > 1 else "",
        tuple(_metrics(folder / METRICS)),
        spelled("".join(_lines(folder / DONE)[:1]).partition("T")[0])[:LONGEST_DAY],
        tuple(_unreadable(folder / UNREADABLE)),
    )


def printable_lines(lines: Sequence[str]) -> str:
    """Lines of text as a page can hold them."""
    return "\n".join(map(spelled, lines))


def in_words(settings: Settings) -> str:
    """A component by its name and by what it does otherwise than its defaults say."""
    parts = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name == "name" or value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, Settings):
            parts.append(f"{_words(name)} ({in_words(value)})")
        elif isinstance(value, bool):
            parts.append(_words(name) if value else f"no {_words(name)}")
        else:
            parts.append(f"{_words(name)} {_value(value)}")
    named = [str(settings.name)] if hasattr(settings, "name") else []
    return ", ".join(named + parts)


def facts(history: History, findings: Findings) -> list[tuple[str, str]]:
    """What was run, as pairs of a term and what there is to say of it."""
    said: list[tuple[str, str]] = []
    recipe, train, test = history.recipe, findings.train, findings.test
    if recipe is not None:
        said += [
            ("objective", _objective(recipe)),
            ("encoder", _encoder(recipe, findings)),
            ("learned on", _images(recipe)),
            ("training", _training(recipe, history)),
        ]
    else:
        said.append(("features", _width(findings)))
    held_out = f" and {len(test):,} held out" if test is not None else ", none held out"
    kind = "grey" if train.channels == 1 else "colour"
    labels = (
        f", {plural(len(findings.classes), 'class', 'classes')}"
        if has_labels(findings.shown.labels)
        else ", without labels"
    )
    said.append(("measured on", f"{len(train):,} training images{held_out}, {kind}, {train.size} px{labels}"))
    said += [("command", history.command)] if history.command else []
    said += [("made by", history.commit)] if history.commit else []
    return [(term, spelled(text)) for term, text in said]


def warnings_of(history: History, widest: int) -> list[str]:
    """What was wrong with the run as its metrics show it: collapse and chance, in the words it was said in, and NaN.

    `widest` is the width of the features, which are what the objective gets where there is no projector.
    """
    said: list[str] = []
    recipe, metrics = history.recipe, [line for line in history.metrics if "loss" in line]
    if not metrics:
        return said
    lost = sum(not math.isfinite(line["loss"]) for line in metrics)
    if lost:
        said.append(f"the loss was not finite in {lost:,} of {plural(len(metrics), 'line')} of metrics")
    if recipe is not None:
        projector = recipe.encoder.projector
        dim = projector.dim if projector.layers else widest
        watch = Watch(min(recipe.train.batch_size, dim))
        for line in metrics:
            finite = {key: value for key, value in line.items() if math.isfinite(value)}
            said += watch.warnings(_progress(recipe, line, metrics[-1]), line.get("epoch", 0.0), finite)
    return said


def _progress(recipe: Recipe, line: dict[str, float], last: dict[str, float]) -> float:
    if recipe.train.minutes is not None and "seconds" in line:
        return min(1.0, line["seconds"] / (60 * recipe.train.minutes))
    if "epoch" in line:
        return min(1.0, line["epoch"] / recipe.train.epochs)
    return line["step"] / max(last["step"], 1)


def _objective(recipe: Recipe) -> str:
    what = "views of the same image" if recipe.ids == "images" else "images of the same label"
    return f"{in_words(recipe.objective)}; positives are {what}"


def _encoder(recipe: Recipe, findings: Findings) -> str:
    start = "pretrained" if recipe.encoder.pretrained else "from random weights"
    projector = recipe.encoder.projector
    onto = f"projected onto {projector.dim:,}" if projector.layers else "no projector"
    return f"{recipe.encoder.name}, {start}; {_width(findings)}, {onto}"


def _width(findings: Findings) -> str:
    return f"{plural(findings.width, 'feature')} per image"


def _images(recipe: Recipe) -> str:
    views = f"{plural(recipe.views.num_views, 'view')} of each image, {recipe.views.size} px"
    unseen = f"; without classes {', '.join(map(str, recipe.unseen))}" if recipe.unseen else ""
    return f"{in_words(recipe.data)}; {views}{unseen}"


def _training(recipe: Recipe, history: History) -> str:
    settings, metrics = recipe.train, history.metrics
    budget = plural(settings.minutes, "minute") if settings.minutes else plural(settings.epochs, "epoch")
    words = f"{budget}, batch {settings.batch_size:,}, {in_words(recipe.optim)}, seed {recipe.seed}"
    seconds = max((line["seconds"] for line in metrics if math.isfinite(line.get("seconds", math.nan))), default=None)
    if seconds is not None:
        words += f"; {int(metrics[-1]['step']):,} steps in {duration(seconds)}"
    return words + (f"; finished on {history.finished}" if history.finished else "; not finished")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " to ".join(map(_value, value)) if isinstance(value, tuple) else str(value)


def _metrics(file: Path) -> list[dict[str, float]]:
    found = []
    for text in _lines(file):
        try:
            line = parse_json(text, file.name)
        except ValueError:
            continue
        numbers = {key: value for key, value in line.items() if value is None or isinstance(value, int | float)}
        with suppress(OverflowError):
            values = {key: math.nan if value is None else float(value) for key, value in numbers.items()}
            if math.isfinite(values.get("step", math.nan)):
                found.append(values)
    return found


def _unreadable(file: Path) -> list[tuple[str, str]]:
    parts = [line.partition("\t") for line in _lines(file) if line]
    return [(spelled(name), spelled(reason)) for name, _, reason in parts]


def _lines(file: Path) -> list[str]:
    """The lines of a file, up to so many letters that a stranger's cannot fill the memory; none where there is none."""
    if not file.is_file():
        return []
    found, letters = [], 0
    # A line longer than any that is written ends what can be read of the file.
    with open_lines(file) as content, suppress(ValueError):
        for line in content:
            letters += len(line)
            if letters > MOST_LETTERS:
                break
            found.append(line.rstrip("\r\n"))
    return found
