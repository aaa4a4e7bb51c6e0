"""Suggestions for misspelled names, and lists of names in messages."""

import difflib
from collections.abc import Iterable, Sequence
from itertools import islice

from manyviews.system.files import shown

MOST_COMPARED = 10_000
"""Names that a wrong one is compared with, and at most a tenth as many letters: comparing is slow."""


def closest(wrong: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The names most similar to a wrong one, among the first `MOST_COMPARED`."""
    if len(wrong) > MOST_COMPARED // 10:
        return []
    return difflib.get_close_matches(wrong, list(islice(known, MOST_COMPARED)), most, cutoff)


def did_you_mean(wrong: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """Ends an error message about a wrong name with the most similar ones; may be empty."""
    near = closest(wrong, known, most, cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, with … if there are more."""
    return ", ".join(map(shown, names[:most])) + (" …" if len(names) > most else "")
