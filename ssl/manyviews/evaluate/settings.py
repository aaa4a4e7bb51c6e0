"""What a run is measured on, and how."""

import difflib
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from manyviews.config import as_list
from manyviews.evaluators import fractions
from manyviews.evaluators.distance import Metric
from manyviews.evaluators.map import Method
from manyviews.evaluators.protocol import ProtocolSettings, Task
from manyviews.features.encoding import EncodeSettings

Look = Literal[Task, "fractions", "geometry"]


def _looks(value: object) -> object:
    words = as_list(value)
    known = [word for part in get_args(Look) for word in get_args(part) or (part,)]
    for word in words if isinstance(words, list | tuple) else ():
        if word not in known:
            near = difflib.get_close_matches(str(word), known, 1, 0.5)
            raise ValueError(f"{word!r} is none of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else ""))
    return words


class EvaluateSettings(EncodeSettings):
    """What a run is measured on, and how."""

    baselines: bool = True
    """Measure random weights and raw pixels too."""
    layer: Literal["backbone", "embedding", "both"] | None = None
    """What is measured of the run: the backbone's features, or the embedding that its objective compares (the
    projector's output, or the predictor's where there is one). Null: both, where the objective trains embeddings to be
    compared (triplet, margin, margin_softmax, …) or images are compared with each other; else the backbone. The
    verdict on retrieval, clustering and verification is then of the layer that the objective trains for it, and on kNN
    and probes of the backbone."""
    tasks: Annotated[tuple[Look, ...] | None, BeforeValidator(_looks)] = Field(None, min_length=1)
    """What is measured, one or several with commas: knn, linear, fractions (the probe from few labels), augmented (the
    probe as papers train it, on new crops in every epoch: minutes, not seconds), retrieval, clustering, verification,
    geometry; null: knn, linear, fractions and geometry, and retrieval if the run has unseen classes; without labels
    geometry."""
    classes: Annotated[tuple[int | str, ...] | None, BeforeValidator(as_list)] = Field(None, min_length=1)
    """Classes, by name or number, whose test images are looked up, clustered and verified among each other; null: those
    that the run left out of training (its unseen), or else all."""
    metric: Metric | None = None
    """The distance by which neighbours are found; null: the cosine, and for the embedding of an objective that trains
    Euclidean distances (log_ratio; triplet and contrastive with normalized=false) that one. All but
    cosine and euclidean are fitted on labelled training images, without those of the classes named or unseen, for each
    kind of features, and kept in OUTPUT/metrics."""
    protocol: ProtocolSettings = ProtocolSettings()
    few: fractions.FractionSettings = fractions.FractionSettings()
    """How many labels the probe is given where they are few."""
    output: str | None = None
    """The folder that evaluation.json, report.html, features and fitted metrics are written to; null: the run's."""
    cache: bool = True
    """Keep features in OUTPUT/features, and take them from there, or from RUN/features, while weights, images and
    transform are the same."""
    report: bool = True
    """Write report.html and its pictures for TensorBoard."""
    maps: Annotated[tuple[Method, ...], BeforeValidator(as_list)] = ("tsne", "pca")
    """Maps of the features in the report, the first shown first: pca, tsne, umap (needs umap-learn); [] for none."""
    comparison: str | None = None
    """A JSON file that the comparison of several runs is written to."""
