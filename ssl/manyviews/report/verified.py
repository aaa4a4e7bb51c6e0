"""Verification in the report: ROC curves, and the pairs that are judged wrongly."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from pydantic import ValidationError

from manyviews.evaluators.results.measurement import THRESHOLD, label
from manyviews.evaluators.verification import ThresholdDetails, threshold_text
from manyviews.report import plots
from manyviews.report.findings import Findings, labels_of
from manyviews.report.pictures import uris
from manyviews.system.files import spelled

Judged = tuple[int, int, float]
"""Two images, by their positions in the images shown and then the training images, and their cosine or distance."""


class Verified(NamedTuple):
    """What is shown of verification."""

    figure: Figure
    """The ROC curves of every kind of features."""
    threshold: str
    """The threshold of the leading kind, in a sentence."""
    pairs: int
    source: str
    """The name of the file that lists the pairs; empty if they were drawn."""
    wrong: tuple[tuple[str, str, tuple[Judged, ...]], ...]
    """Title, meaning and pairs: those of different classes that are most alike, and those of one that are least."""


def verified_of(findings: Findings) -> Verified | None:
    """Draws the verification of an evaluation; None if there is none, or its record is malformed."""
    measured = {own.features: own for own in findings.evaluation.of("verification", metric=THRESHOLD)}
    if not measured:
        return None
    try:
        details = {kind: ThresholdDetails.model_validate(own.details) for kind, own in measured.items()}
    except ValidationError:
        return None
    equal = {label(own.features): own.value for own in findings.evaluation.of("verification", metric="EER")}
    leading = findings.kind if findings.kind in measured else next(iter(measured))
    first, own = details[leading], measured[leading]
    curves = {
        label(kind): ([0.0, *one.curve.false_accepts], [0.0, *one.curve.true_accepts]) for kind, one in details.items()
    }
    if not curves.keys() <= equal.keys():
        return None
    figure = plots.roc(curves, equal, (f"threshold {own.value:.3g}", first.false_accepts))
    unit = "cosine" if own.distance == "cosine" else "distance"
    features = label(leading)
    wrong = (
        (
            "Wrongly accepted",
            f"Pairs of different classes that are most alike by {features} features, with their {unit}.",
            _present(findings, first.wrongly_accepted),
        ),
        (
            "Wrongly rejected",
            f"Pairs of one class that are least alike by {features} features, with their {unit}.",
            _present(findings, first.wrongly_rejected),
        ),
    )
    return Verified(figure, threshold_text(own), own.n, first.pairs, wrong)


def _present(findings: Findings, pairs: Sequence[Judged]) -> tuple[Judged, ...]:
    images = len(findings.shown) + (0 if findings.test is None else len(findings.train))
    return tuple(pair for pair in pairs if min(pair[:2]) >= 0 and max(pair[:2]) < images)


def judged_pictures(findings: Findings, verified: Verified, side: int) -> dict[int, tuple[str, str, str]]:
    """Returns the picture (data URI), name and class of each image of the pairs judged wrongly."""
    ids = sorted({image for _, _, pairs in verified.wrong for pair in pairs for image in pair[:2]})
    pictures: dict[int, tuple[str, str, str]] = {}
    begin = 0
    for images in (findings.shown, findings.train):
        own = [image - begin for image in ids if 0 <= image - begin < len(images) and image not in pictures]
        labels = labels_of(images)
        for image, uri in uris(images, own, side, findings.view).items():
            number = int(labels[image])
            name = findings.class_name(number) if number >= 0 else ""
            pictures[begin + image] = uri, spelled(images.names[image]), name
        begin += len(images)
    return pictures
