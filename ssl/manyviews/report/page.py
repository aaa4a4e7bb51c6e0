"""The page: what is known of a run, put together as one file that holds all it needs."""

import base64
import hashlib
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from manyviews.evaluators.confusion import as_pixels
from manyviews.evaluators.failures import failure_messages
from manyviews.evaluators.results.measurement import label
from manyviews.evaluators.results.tables import sheets
from manyviews.report import plots
from manyviews.report.findings import Findings, has_labels
from manyviews.report.history import History, facts, read_history, warnings_of
from manyviews.report.hover_map import hover_map
from manyviews.report.look import Look, look
from manyviews.report.pictures import data_uri, png, uris
from manyviews.report.tensorboard import write_tensorboard
from manyviews.report.training_curves import is_thinned, panels
from manyviews.system.files import spelled
from manyviews.system.writing import write_atomic

REPORT = "report.html"
SIDE = 96
"""Of the pictures of neighbours and mistakes, in pixels."""
SMALL = 64
"""Images of at most so many pixels are enlarged without smoothing: their pixels are what the network saw."""
LARGEST_PICTURE = 1 << 25
"""Bytes of the picture of views; a larger one is not a run's."""
LISTED = 50
"""Unreadable files that are listed one by one."""
NO_SCORES = (
    "These images have no labels, or none are held out, so nothing is scored; what follows shows what the features "
    "find alike."
)
SECTIONS = {
    "warnings": "Warnings",
    "run": "Run",
    "scores": "Scores",
    "curves": "Curves",
    "views": "Views",
    "neighbours": "Neighbours",
    "map-section": "Map",
    "confusion": "Confusions",
    "similarities": "Similarities",
}
"""The parts of the page, by anchor, and what the links to them are called."""


def write_report(
    findings: Findings, output: Path | None = None, *, warn: Callable[[str], object] = warnings.warn
) -> Path:
    """Writes report.html into the run's folder, and the same pictures and the embeddings for TensorBoard.

    The page is one file: pictures, style and script are in it, and its security policy forbids it any network. All that
    people have named (classes, files, recipes, warnings) is escaped. The same findings make the same page. One process
    writes it.

    Args:
        findings: what it tells of.
        output: another folder than the run's to write to.
        warn: called with a sentence where TensorBoard's part could not be written.

    Returns:
        The page.

    Raises:
        ValueError: if features and images do not match in number, or the run's configuration cannot be read.
        OSError: if the page cannot be written.
    """
    _check(findings)
    history = read_history(findings.folder)
    seed = history.recipe.seed if history.recipe is not None else 0
    seen = look(findings, seed)
    shown = _run(findings, history) | _scores(findings) | _curves(history) | _pictures(findings, seen, seed)
    shown["sections"] = [(anchor, name) for anchor, name in SECTIONS.items() if _has(shown, anchor)]
    page = (output or findings.folder) / REPORT
    write_atomic(page, [_render(shown).encode()])
    try:
        write_tensorboard(findings, seen, seed, page.parent / "tensorboard")
    except Exception as problem:
        warn(f"the report's pictures for TensorBoard could not be written: {problem}")
    return page


def _has(shown: dict[str, Any], anchor: str) -> bool:
    """Whether a part of the page has anything to show; some always have."""
    told = {
        "warnings": shown["warnings"],
        "curves": shown["curves"] or shown["no_curves"],
        "views": shown["views"],
        "map-section": shown["map"],
        "confusion": shown["confusion"],
        "similarities": shown["histogram"],
    }
    return bool(told.get(anchor, True))


def _check(findings: Findings) -> None:
    for kind, (train, shown) in findings.features.items():
        for part, images, name in ((train, findings.train, "training"), (shown, findings.shown, "shown")):
            if part is not None and len(part) != len(images):
                raise ValueError(f"{kind}: {len(part)} features of {name} images, and there are {len(images)} of these")
    for method, (ids, points) in findings.points.items():
        if len(ids) != len(points):
            raise ValueError(f"the map {method} has {len(points)} points for {len(ids)} images")


def _render(shown: dict[str, Any]) -> str:
    files = resources.files("manyviews.report")
    style, script, template = (
        files.joinpath(name).read_text("utf-8") for name in ("style.css", "map.js", "template.html")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        shown, style=Markup(style), script=Markup(script), script_hash=f"sha256-{digest}"
    )


def _run(findings: Findings, history: History) -> dict[str, Any]:
    unreadable = history.unreadable
    said = [*findings.warnings, *failure_messages(findings.failures, list(findings.features))]
    said += [*warnings_of(history, findings.width)]
    if unreadable and not any("could not be read" in warning for warning in findings.warnings):
        one = len(unreadable) == 1
        what = "1 file that cannot be read was" if one else f"{len(unreadable):,} files that cannot be read were"
        said.append(f"{what} left out")
    return {
        "title": spelled(findings.folder.resolve().name),
        "facts": facts(history, findings),
        "config": history.config.strip(),
        "warnings": [spelled(text) for text in dict.fromkeys(said)],
        "unreadable": unreadable[:LISTED],
        "more_unreadable": max(0, len(unreadable) - LISTED),
    }


def _scores(findings: Findings) -> dict[str, Any]:
    opening, _, rest = findings.evaluation.verdict().partition(": ")
    verdict = (opening.rstrip("."), rest.rstrip(".").split("; ") if rest else []) if opening else None
    shown = sheets(findings.evaluation)
    for also in findings.also:
        shown += [sheet._replace(title=f"With {also.title}: {sheet.title}") for sheet in sheets(also.evaluation)]
    return {"verdict": verdict, "layers": findings.layers, "no_scores": NO_SCORES, "sheets": shown}


def _curves(history: History) -> dict[str, Any]:
    first, more = panels(history.metrics)
    return {
        "curves": first or more,
        "more_curves": more if first else [],
        "no_curves": "" if history.recipe is None else "The run has written no metrics.",
        "thinned": is_thinned(history.metrics),
    }


def _pictures(findings: Findings, seen: Look, seed: int) -> dict[str, Any]:
    views = findings.folder / "views.png"
    flat, place = hover_map(findings, seed), "test" if findings.test is not None else "other"
    searched = place if seen.searched.own else "training"
    histogram = still = None
    if seen.histogram is not None:
        histogram = Markup(plots.as_svg(seen.histogram, "similarities"))
    if seen.maps:
        still = data_uri(png(as_pixels(next(iter(seen.maps.values())), dpi=110)), "image/png")
    by_knn = f"knn/{findings.kind}" in findings.evaluation.hits
    shown = views.is_file() and views.stat().st_size <= LARGEST_PICTURE
    return _looked_up(findings, seen) | {
        "views": data_uri(views.read_bytes(), "image/png") if shown else None,
        "small": findings.shown.size <= SMALL,
        "labelled": has_labels(findings.shown.labels),
        "features": label(findings.kind),
        "where": f"{searched} images",
        "where_one": f"{searched} image",
        "wrong_by": "kNN" if by_knn else "retrieval",
        "map": flat,
        "still": still,
        "histogram": histogram,
        "histogram_meaning": _meaning(findings, seen),
    }


def _looked_up(findings: Findings, seen: Look) -> dict[str, Any]:
    """The sections of neighbours and of confusions, each picture read once."""
    looked_up, confusion = (*seen.random, *seen.wrong, *seen.alike), seen.confusion
    own = [query.id for query in looked_up]
    own += [example for pair in (confusion.worst if confusion else ()) for example in pair.examples]
    return {
        "random": seen.random,
        "wrong": seen.wrong,
        "alike": seen.alike,
        "confusion": confusion,
        "counts": confusion.counts.tolist() if confusion is not None and confusion.counts is not None else None,
        "class_name": findings.class_name,
        "spelled": spelled,
        "shown": uris(findings.shown, own, SIDE),
        "found": uris(seen.searched.images, [near.id for query in looked_up for near in query.near], SIDE),
        "shown_names": findings.shown.names,
        "found_names": seen.searched.images.names,
    }


def _meaning(findings: Findings, seen: Look) -> str:
    if not has_labels(findings.shown.labels):
        text = "How alike two images drawn at random are: features that have collapsed pile up at 1."
    else:
        text = (
            "How alike two images are: the further pairs of the same class lie to the right of the others, the better."
        )
    dotted = " The dotted line is where two views of one image lie on average." if seen.views_at is not None else ""
    return text + dotted
