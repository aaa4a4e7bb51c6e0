"""Compares two images by a run, and judges them by the threshold of its verification."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from manyviews.config import Settings
from manyviews.data.decoding.decode import UnreadableImageError
from manyviews.data.sources.paths import nearest
from manyviews.evaluation.record import EVALUATION, records_in, stored
from manyviews.evaluation.settings import EvaluateSettings, measured_layers, recipe_of
from manyviews.evaluators.distance import Nearness, distance_of, similarity_of_pairs
from manyviews.evaluators.results.measurement import EMBEDDED, LAYERS, THRESHOLD, Measurement
from manyviews.evaluators.verification import ThresholdDetails
from manyviews.features.backbone import PretrainedBackbone, open_run
from manyviews.features.encoding import extract
from manyviews.features.transformer import Features, images_from
from manyviews.system.files import read_json, shown


class VerifySettings(Settings):
    """How two images are compared."""

    layer: Literal["backbone", "embedding"] | None = None
    """The layer whose features are compared: the backbone's, or the embedding; null: the one that the objective trains
    to compare images."""
    evaluation: str | None = None
    """The folder of the evaluation.json with the threshold; null: the run's."""


class Threshold(NamedTuple):
    """The threshold of a verification, in the unit of the verdict's value."""

    value: float
    low: float
    """Lower end of its 95 % interval."""
    high: float
    pairs: int
    source: str
    """The name of the file that listed the pairs; empty if they were drawn."""


class Verdict(NamedTuple):
    """Two images compared; true if they are judged to be of one class."""

    same: bool | None
    """Whether the images are judged to be of one class; None without a threshold."""
    value: float
    """Their cosine, or their Euclidean distance."""
    distance: Nearness
    """Which of both it is: cosine or euclidean."""
    layer: str
    threshold: Threshold | None = None
    false_accepts: float | None = None
    """Share of the verification's pairs of different classes that are at least as alike."""
    true_accepts: float | None = None
    """Share of its pairs of one class that are."""
    missing: str = ""
    """Why there is no threshold, and the command that makes one."""

    def __bool__(self) -> bool:
        return self.same is True

    def __str__(self) -> str:
        unit = "cosine" if self.distance == "cosine" else "distance"
        lines = [f"{unit:<12}{self.value:.4f}, of their features ({self.layer})"]
        if self.threshold is None or self.false_accepts is None or self.true_accepts is None:
            return lines[0]
        value, low, high, pairs, source = self.threshold
        of = f"{pairs:,} pairs{f' of {source}' if source else ''}"
        lines += [
            f"{'threshold':<12}{value:.4f} (95 % {low:.4f} to {high:.4f}), of {shown(of)}",
            f"{'verdict':<12}{'same' if self.same else 'different'}",
        ]
        alike = (
            f"{100 * self.false_accepts:.3g} % of the pairs of different classes are at least as alike, and "
            f"{100 * self.true_accepts:.3g} % of those of one class"
        )
        return "\n".join([*lines, alike])


def verify_images(folder: Path, first: Any, second: Any, settings: VerifySettings | None = None) -> Verdict:
    """Compares two images, paths or anything that `Features` takes, by a run.

    They are compared as verification compares images: by the layer and the distance that the objective trains. The
    threshold is that of the newest verification of the same weights, layer and distance.

    Raises:
        ValueError: the run has no weights or not this layer, an image cannot be read, or the folder that is named has
            no such threshold.
    """
    settings, pretrained = settings or VerifySettings(), open_run(folder)
    chosen = EvaluateSettings(layer=settings.layer)
    layers = measured_layers(pretrained, chosen, ("verification",))
    kind = layers.kinds[0]
    euclidean = kind == EMBEDDED and recipe_of(pretrained).objective.traits.distance == "euclidean"
    nearness: Nearness = "euclidean" if euclidean else "cosine"
    similarity = _similarity(folder, LAYERS[kind], nearness, first, second)
    value = distance_of(similarity, nearness)
    own, missing = _threshold(pretrained, kind, nearness, settings)
    if own is None or own.low is None or own.high is None:
        if settings.evaluation is not None:
            raise ValueError(missing)
        return Verdict(None, value, nearness, LAYERS[kind], missing=missing)
    details = ThresholdDetails.model_validate(own.details)
    curve, sign = details.curve, -1 if nearness == "cosine" else 1
    points = sign * np.asarray(curve.at)
    false, true = (
        float(np.interp(sign * value, points, rates, left=0.0, right=1.0))
        for rates in (curve.false_accepts, curve.true_accepts)
    )
    return Verdict(
        sign * value < sign * own.value,
        value,
        nearness,
        LAYERS[kind],
        Threshold(own.value, own.low, own.high, own.n, details.pairs),
        false,
        true,
    )


def _similarity(folder: Path, layer: str, nearness: Nearness, first: Any, second: Any) -> float:
    """The similarity of two images' features, as verification computes it."""
    features = Features(folder, layer=layer).fit()
    for image in (first, second):
        if isinstance(image, str | Path):
            path = Path(image).expanduser()
            if not path.exists():
                raise ValueError(f"{shown(image)} does not exist; {nearest(path)}")
            if path.is_dir():
                raise ValueError(f"{shown(image)} is a folder; name an image in it")
            try:
                features.decoding_.read(path)
            except UnreadableImageError as problem:
                raise ValueError(f"{shown(image)} cannot be read as an image: {problem.reason}") from problem
    pair = [
        picture if isinstance(picture, str | Path | Image.Image) else np.asarray(picture) for picture in (first, second)
    ]
    images, view = images_from(pair, features.decoding_, features.opened_.view)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    rows = extract(features.module_.to(device), images, view=view, device=device)
    return similarity_of_pairs(rows, torch.tensor([[0, 1]]), nearness).item()


def _threshold(
    pretrained: PretrainedBackbone, kind: str, nearness: Nearness, settings: VerifySettings
) -> tuple[Measurement | None, str]:
    """The newest threshold that fits, or else the reason why there is none."""
    run = pretrained.name
    file = Path(run if settings.evaluation is None else settings.evaluation).expanduser() / EVALUATION
    layer = "" if settings.layer is None else f" layer={settings.layer}"
    way_out = f"manyviews evaluate {shown(run)} tasks=verification{layer} makes one"
    if not file.is_file():
        return None, f"{shown(file)} does not exist, so there is no threshold; {way_out}"
    others: dict[str, None] = {}
    for weights, own in _thresholds(file):
        if weights != dict(pretrained.origin):
            others["of other weights, as of an earlier step"] = None
        elif own.features != kind:
            others[f"of {own.features} features"] = None
        elif own.distance != nearness:
            others[f"by the distance {own.distance}"] = None
        else:
            return own, ""
    if not others:
        return None, f"{shown(file)} has no threshold of verification; {way_out}"
    return None, (
        f"the thresholds in {shown(file)} do not fit {kind} features by the {nearness} distance of these weights: they "
        f"are {' and '.join(others)}; {way_out}"
    )


def _thresholds(file: Path) -> Iterator[tuple[Any, Measurement]]:
    """The weights and the threshold of each verification, newest first."""
    try:
        records = [record for record, _ in records_in(read_json(file))]
    except OSError as problem:
        raise ValueError(f"{shown(file)} cannot be read: {problem}") from problem
    for record in records:
        for own in stored(record).measurements:
            if own.task == "verification" and own.metric == THRESHOLD:
                yield record.get("weights"), own
