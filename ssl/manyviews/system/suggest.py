"""The names that somebody may have meant who wrote one that does not exist."""

import difflib
from collections.abc import Iterable
from itertools import islice

MOST_COMPARED = 10_000
"""Names that a wrong one is compared with, and letters of it at most a tenth: a hint is not worth waiting for."""


def closest(wrong: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The names most like a wrong one; of very many only the first are looked at."""
    if len(wrong) > MOST_COMPARED // 10:
        return []
    return difflib.get_close_matches(wrong, list(islice(known, MOST_COMPARED)), most, cutoff)


def did_you_mean(wrong: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """The end of a sentence about a wrong name, with those most like it; empty where there are none."""
    near = closest(wrong, known, most, cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""
