r"""Names in pictures: in letters that a font of this machine has, the others spelled out, and nothing read as TeX."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import matplotlib
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font

from manyviews.system.files import spelled

BASE = "DejaVu Sans"
"""matplotlib's own font, which is always there."""
LAST_RESORT = "Last Resort"
"""The beginning of the name of a font that comes with matplotlib: its glyphs say what is missing."""
NAME_LENGTH = 22
PLAIN = 400
"""The weight of a font that is neither light nor bold."""


@contextmanager
def lettering(names: Iterable[str]) -> Iterator[None]:
    """While open, texts of matplotlib are drawn letter by letter, in the first fonts that have the letters of `names`.

    That is matplotlib's own, then those installed on this machine, in the order of their names; a letter that none has
    is not to be drawn: see `legible`.
    """
    families = _families(frozenset("".join(map(spelled, names))))
    with matplotlib.rc_context({"font.family": [BASE, *families], "text.parse_math": False}):
        yield


def legible(name: str) -> str:
    r"""A name with those letters spelled out, as `\u4e2d`, that no font of this machine has, or that are no text."""
    line = spelled(name)
    missing = set(map(ord, line)) - _letters(BASE)
    missing -= set().union(*map(_letters, _families(frozenset(line))))
    return "".join(ascii(letter)[1:-1] if ord(letter) in missing else letter for letter in line)


def shortened(name: str) -> str:
    """A name as `legible`, of at most 22 letters: a longer one would take the picture's place."""
    line = legible(name)
    return line if len(line) <= NAME_LENGTH else f"{line[: NAME_LENGTH - 1]}…"


@cache
def _families(letters: frozenset[str]) -> tuple[str, ...]:
    """The fonts that have what matplotlib's own lacks, as few as come first."""
    missing = set(map(ord, letters)) - _letters(BASE)
    families = []
    for family in _files() if missing else ():
        had = missing & _letters(family)
        if had:
            families.append(family)
            missing -= had
        if not missing:
            break
    return tuple(families)


@cache
def _files() -> dict[str, str]:
    """The file of each upright font of usual weight, by family, in the order of their names."""
    fonts = [font for font in fontManager.ttflist if font.style == "normal" and font.weight == PLAIN]
    return {font.name: font.fname for font in sorted(fonts, key=lambda font: (font.name, font.fname))}


@cache
def _letters(family: str) -> frozenset[int]:
    """The numbers of the letters that a font draws; none for one of coloured pictures or of stand-ins."""
    if family not in _files() or family.startswith(LAST_RESORT):
        return frozenset()
    try:
        font = FT2Font(_files()[family])
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):  # of a kind that matplotlib does not read
        return frozenset()
