"""Which layers of a run are measured: the backbone's features, the embedding that its objective compares, or both."""

from collections.abc import Collection
from typing import NamedTuple

from manyviews.evaluate.settings import EvaluateSettings
from manyviews.evaluators.distance import Euclidean, Metric
from manyviews.evaluators.results.kinds import EMBEDDED, GROUPING, LEARNED
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.layers import BACKBONE, EMBEDDING

KINDS = {BACKBONE: LEARNED, EMBEDDING: EMBEDDED}


class Chosen(NamedTuple):
    """The kinds of a run's features that are measured."""

    kinds: tuple[str, ...]
    """The one first by which images are compared with each other."""
    reason: str
    """Why that one, in a sentence; empty where only one was asked for, or could be."""
    missing: str = ""
    """Why the embedding is not measured though it was to be."""


def chosen(opened: PretrainedBackbone, settings: EvaluateSettings, looks: Collection[str]) -> Chosen:
    """The layers that were asked for, or those that what is measured is about; collective.

    Without a word both are measured where the objective trains embeddings to be compared, or where images are compared
    with each other, and where the embedding can be had; else the backbone alone.

    Raises:
        ValueError: if the embedding was asked for and cannot be had.
    """
    assert opened.recipe is not None
    objective = opened.recipe.objective
    if settings.layer in KINDS:
        if settings.layer == EMBEDDING:
            opened.head(EMBEDDING)
        return Chosen((KINDS[settings.layer],), "")
    if settings.layer is None:
        if not objective.compares_embeddings and not GROUPING & set(looks):
            return Chosen((LEARNED,), "")
        try:
            opened.head(EMBEDDING)
        except ValueError as problem:
            return Chosen((LEARNED,), "", f"only the backbone is measured, and not the embedding: {problem}")
    else:
        opened.head(EMBEDDING)
    if objective.compares_embeddings:
        return Chosen(
            (EMBEDDED, LEARNED),
            f"Images are compared by the embedding, for objective={objective.name} trains it to be compared; the "
            "backbone stands beside it. kNN and probes are of the backbone.",
        )
    return Chosen(
        (LEARNED, EMBEDDED),
        f"Images are compared by the backbone, for what objective={objective.name} trains is a backbone; the "
        "embedding stands beside it.",
    )


def distances_of(opened: PretrainedBackbone, settings: EvaluateSettings) -> dict[str, Metric]:
    """The distances that differ from the cosine where none was asked for: that of the embedding, by its objective."""
    assert opened.recipe is not None
    own = settings.metric is None and opened.recipe.objective.distance == "euclidean"
    return {EMBEDDED: Euclidean()} if own else {}
