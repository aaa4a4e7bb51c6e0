"""The kinds of features that are measured beside each other: what they are called, and which layer makes them."""

from collections.abc import Iterable, Mapping

from manyviews.evaluators.protocol import Task
from manyviews.features.layers import BACKBONE, EMBEDDING

LEARNED, EMBEDDED, RANDOM, PIXELS = "learned", "learned (embedding)", "random weights", "raw pixels"
LAYERS: Mapping[str, str] = {LEARNED: BACKBONE, EMBEDDED: EMBEDDING, RANDOM: BACKBONE}
GROUPING: frozenset[Task] = frozenset({"retrieval", "clustering", "verification"})
"""Tasks that compare test images with each other."""


def is_learned(kind: str) -> bool:
    """Whether features are a run's own, of one layer or another, and no baseline."""
    return kind in (LEARNED, EMBEDDED)


def label(kind: str) -> str:
    """What a table calls a kind of features: by its layer, where that is one of a run's."""
    return f"{LEARNED} ({BACKBONE})" if kind == LEARNED else kind


def leading(kinds: Iterable[str], task: str | None = None) -> str:
    """The kind by which a task is decided: the first where images are compared with each other, else the backbone's.

    A probe, and what votes, tells what a backbone is worth, and is of the backbone whichever layer comes first.
    """
    kinds = list(kinds)
    return kinds[0] if task in GROUPING or LEARNED not in kinds else LEARNED


def in_order(kinds: Iterable[str], task: str | None = None) -> list[str]:
    """All kinds, the leading one first."""
    kinds = list(kinds)
    first = leading(kinds, task)
    return [first, *(kind for kind in kinds if kind != first)]
