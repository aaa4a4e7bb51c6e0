"""Renders report.html: one file with its pictures, style and script."""

import base64
import hashlib
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from manyviews.evaluators.failures import failure_messages
from manyviews.evaluators.results.measurement import label
from manyviews.evaluators.results.tables import sheets
from manyviews.report import plots
from manyviews.report.clusters import clusters_of
from manyviews.report.contents import Contents, contents_of, references
from manyviews.report.findings import Findings, has_labels, labels_of
from manyviews.report.history import History, facts, read_history, warnings_of
from manyviews.report.pictures import data_uri, hover_map, picture_uri, uris
from manyviews.report.sampling import sampling_section
from manyviews.report.tensorboard import write_tensorboard
from manyviews.report.verified import judged_pictures
from manyviews.system.files import spelled
from manyviews.system.writing import write_atomic

REPORT = "report.html"
SIDE = 96
"""Side of the pictures of neighbours and mistakes, in pixels."""
SMALL = 64
"""Side of images, in pixels, up to which they are enlarged without smoothing: their pixels are what the network saw."""
LARGEST_PICTURE = 1 << 25
"""Most bytes of the picture of views; a larger one was not written by a run."""
LISTED = 50
"""Most unreadable files that are listed."""
NO_SCORES = (
    "These images have no labels, or none are held out, so there are no scores; what follows shows which images have "
    "similar features."
)


def write_report(
    findings: Findings, output: Path | None = None, *, warn: Callable[[str], object] = warnings.warn
) -> Path:
    """Writes report.html, and its pictures for TensorBoard; returns the page's path.

    The page is one file, and its security policy forbids it any network. All text from users (names of classes, files
    and recipes, warnings) is escaped. The same findings make the same page. `output` is a folder other than the run's;
    `warn` gets a message if the files for TensorBoard could not be written. Called on one rank.

    Raises:
        ValueError: if features and images differ in number, or the run's configuration cannot be read.
        OSError: if the page cannot be written.
    """
    _check(findings)
    history = read_history(findings.folder)
    seed = history.recipe.seed if history.recipe is not None else 0
    contents = contents_of(findings, seed)
    values = _run(findings, history) | _scores(findings) | _curves(history) | _pictures(findings, contents, seed)
    values |= sampling_section(findings.folder, history.metrics)
    sections = {
        ("warnings", "Warnings"): values["warnings"],
        ("run", "Run"): True,
        ("scores", "Scores"): True,
        ("curves", "Curves"): values["curves"] or values["no_curves"],
        ("sampling", "Sampling"): values["sampling"],
        ("views", "Views"): values["views"],
        ("neighbours", "Neighbours"): True,
        ("ranking", "Rankings"): values["ranked"],
        ("clusters", "Clusters"): values["clusters"],
        ("map-section", "Map"): values["map"],
        ("confusion", "Confusions"): contents.confusions,
        ("similarities", "Similarities"): values["histogram"],
        ("verification", "Verification"): contents.verified,
    }
    values["sections"] = [anchor_and_name for anchor_and_name, content in sections.items() if content]
    page = (output or findings.folder) / REPORT
    write_atomic(page, [_render(values).encode()])
    try:
        write_tensorboard(findings, contents, seed, page.parent / "tensorboard")
    except Exception as problem:
        warn(f"the report's pictures for TensorBoard could not be written: {problem}")
    return page


def _check(findings: Findings) -> None:
    for kind, (train, shown) in findings.features.items():
        for part, images, name in ((train, findings.train, "training"), (shown, findings.shown, "shown")):
            if part is not None and len(part) != len(images):
                raise ValueError(f"{kind}: {len(part)} features of {name} images, and there are {len(images)} of these")
    for method, (ids, points) in findings.points.items():
        if len(ids) != len(points):
            raise ValueError(f"the map {method} has {len(points)} points for {len(ids)} images")


def _render(values: dict[str, Any]) -> str:
    files = resources.files("manyviews.report")
    style, script, template = (
        files.joinpath(name).read_text("utf-8") for name in ("style.css", "map.js", "template.html")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        values, style=Markup(style), script=Markup(script), script_hash=f"sha256-{digest}"
    )


def _run(findings: Findings, history: History) -> dict[str, Any]:
    unreadable = history.unreadable
    messages = [*findings.warnings, *failure_messages(findings.failures, list(findings.features))]
    messages += warnings_of(history, findings.width)
    if unreadable and not any("could not be read" in warning for warning in findings.warnings):
        one = len(unreadable) == 1
        what = "1 file that cannot be read was" if one else f"{len(unreadable):,} files that cannot be read were"
        messages.append(f"{what} left out")
    return {
        "title": spelled(findings.folder.resolve().name),
        "facts": facts(history, findings),
        "config": history.config.strip(),
        "warnings": [spelled(text) for text in dict.fromkeys(messages)],
        "unreadable": unreadable[:LISTED],
        "more_unreadable": max(0, len(unreadable) - LISTED),
    }


def _scores(findings: Findings) -> dict[str, Any]:
    opening, _, rest = findings.evaluation.verdict().partition(": ")
    verdict = (opening.rstrip("."), rest.rstrip(".").split("; ") if rest else []) if opening else None
    shown = sheets(findings.evaluation)
    for settings, evaluation in findings.also:
        shown += [sheet._replace(title=f"With {settings}: {sheet.title}") for sheet in sheets(evaluation)]
    return {"verdict": verdict, "layers": findings.layers, "no_scores": NO_SCORES, "sheets": shown}


def _curves(history: History) -> dict[str, Any]:
    first, more = plots.panels(history.metrics)
    return {
        "curves": first or more,
        "more_curves": more if first else [],
        "no_curves": "" if history.recipe is None else "The run has written no metrics.",
        "thinned": plots.is_thinned(history.metrics),
    }


def _pictures(findings: Findings, contents: Contents, seed: int) -> dict[str, Any]:
    images, _, is_shown = references(findings)
    searched = "training" if not is_shown else "test" if findings.test is not None else "other"
    queries, confusions = (*contents.random, *contents.wrong, *contents.alike), contents.confusions
    own = [query.id for query in queries]
    own += [example for pair in (confusions.worst if confusions else ()) for example in pair.examples]
    ranked, clusters = findings.evaluation.ranked.get(findings.kind), clusters_of(findings)
    for query in (*ranked.worst, *ranked.best) if ranked is not None else ():
        own += [query.query, *(item for item, _ in (*query.ranked, *query.ideal))]
    own += [image for _, group in (clusters.groups if clusters else ()) for one in group for image in one.images]
    views = findings.folder / "views.png"
    has_views = views.is_file() and views.stat().st_size <= LARGEST_PICTURE
    first_map = next(iter(contents.maps.values()), None)
    labelled = has_labels(findings.shown.labels)
    meaning = (
        "Similarities of pairs: the further those of the same class lie to the right of the others, the better."
        if labelled
        else "Similarities of random pairs of images: features that have collapsed pile up at 1."
    )
    if contents.views_at is not None:
        meaning += " The dotted line is the mean of two views of one image."
    return {
        "findings": findings,
        "contents": contents,
        "spelled": spelled,
        "shown": uris(findings.shown, own, SIDE, findings.view),
        "neighbour_uris": uris(images, [near.id for query in queries for near in query.near], SIDE, findings.view),
        "neighbour_names": images.names,
        "views": data_uri(views.read_bytes(), "image/png") if has_views else None,
        "small": findings.shown.size <= SMALL,
        "labelled": labelled,
        "features": label(findings.kind),
        "where": f"{searched} images",
        "where_one": f"{searched} image",
        "wrong_by": "kNN" if f"knn/{findings.kind}" in findings.evaluation.hits else "retrieval",
        "ranked": ranked,
        "clusters": clusters,
        "shown_labels": labels_of(findings.shown).tolist(),
        "map": hover_map(findings, seed),
        "still": None if first_map is None else picture_uri(first_map, "png"),
        "histogram": Markup(plots.as_svg(contents.histogram, "similarities")) if contents.histogram else None,
        "histogram_meaning": meaning,
        "roc": Markup(plots.as_svg(contents.verified.figure, "ROC curves")) if contents.verified else None,
        "judged": judged_pictures(findings, contents.verified, SIDE) if contents.verified else {},
    }
