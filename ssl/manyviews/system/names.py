"""Names in messages: those that somebody may have meant by a wrong one, and the first of many."""

import difflib
from collections.abc import Iterable, Sequence
from itertools import islice

from manyviews.system.files import shown

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


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, with a sign that there are more."""
    return ", ".join(map(shown, names[:most])) + (" …" if len(names) > most else "")
