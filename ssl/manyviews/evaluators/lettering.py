"""Names of any script in matplotlib: in installed fonts, else escaped; never as TeX."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import matplotlib
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font

from manyviews.system.files import spelled

BASE, LAST_RESORT = "DejaVu Sans", "Last Resort"
"""Fonts that come with matplotlib: its default, and one whose glyphs stand for missing ones."""
NAME_LENGTH, REGULAR = 22, 400
"""Most letters of a shortened name, and the regular weight of a font."""


@contextmanager
def lettering(names: Iterable[str]) -> Iterator[None]:
    """Context manager: matplotlib draws each letter of `names` in the first font that has it.

    The fonts are matplotlib's own, then the installed ones by name; a letter that none has must be escaped (`legible`).
    """
    families = _families(frozenset("".join(map(spelled, names))))
    with matplotlib.rc_context({"font.family": [BASE, *families], "text.parse_math": False}):
        yield


def legible(name: str) -> str:
    r"""Escapes control characters and letters without an installed font, as `\u4e2d`."""
    line = spelled(name)
    missing = set(map(ord, line)) - _letters(BASE)
    missing -= set().union(*map(_letters, _families(frozenset(line))))
    return "".join(ascii(letter)[1:-1] if ord(letter) in missing else letter for letter in line)


def shortened(name: str) -> str:
    """Returns a legible name of at most 22 letters."""
    line = legible(name)
    return line if len(line) <= NAME_LENGTH else f"{line[: NAME_LENGTH - 1]}…"


@cache
def _families(letters: frozenset[str]) -> tuple[str, ...]:
    """The first fonts that have the letters that matplotlib's own lacks."""
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
    """The file of each upright font of regular weight, by family, sorted."""
    fonts = [font for font in fontManager.ttflist if font.style == "normal" and font.weight == REGULAR]
    return {font.name: font.fname for font in sorted(fonts, key=lambda font: (font.name, font.fname))}


@cache
def _letters(family: str) -> frozenset[int]:
    """The code points of a font; none for bitmap fonts and the last resort."""
    if family not in _files() or family.startswith(LAST_RESORT):
        return frozenset()
    try:
        font = FT2Font(_files()[family])
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):  # a format that matplotlib does not read
        return frozenset()
