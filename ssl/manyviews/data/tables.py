"""Reads tables whose rows name images."""

import csv
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

from manyviews.data.sources.paths import same_spelling
from manyviews.system.files import open_lines, shown
from manyviews.system.names import closest
from manyviews.system.path_bytes import NOT_UTF8, is_raw

DELIMITERS = (",", ";", "\t", "|")
COMPARED = 50
"""Lines by which the delimiter is chosen."""

Rows = Iterator[tuple[int, str | None, list[str]]]
"""Of each row its line, the image that it names, None for an unknown name, and its columns."""


def lookup(images: Iterable[str]) -> Callable[[str], str | None]:
    """Returns a lookup of image names as tables write them, with spaces around them or in NFC or NFD."""
    spelled = same_spelling(images)
    return lambda text: spelled(text) or spelled(text.strip())


@contextmanager
def open_table(path: Path, images: Iterable[str], *, repeated: bool = False) -> Iterator[tuple[list[str], Rows]]:
    """Opens a UTF-8 table whose first column names images; yields its header and rows.

    The delimiter is the one by which most of the first lines name an image. Without a header its names are numbers;
    empty lines are skipped. Names that differ only in the composition of accents (NFC, NFD) match if that is unique.
    `repeated` is whether several rows may name one image.

    Raises:
        ValueError: it cannot be read, the first line has less than two columns, or rows name one image and may not.
    """
    known = lookup(images)
    with readable(path), open_lines(path) as lines:
        first = list(islice(lines, COMPARED))

        def matches(delimiter: str) -> tuple[int, int]:
            rows = [row for row in csv.reader(first, delimiter=delimiter) if len(row) > 1]
            return sum(known(row[0]) is not None for row in rows), len(rows)

        # The first of equal ones: the comma.
        reader = csv.reader(chain(first, lines), delimiter=max(DELIMITERS, key=matches))
        header = next(reader, [])
        if len(header) < 2:
            raise ValueError(
                f"{shown(path)}: its first line has {'one column' if header else 'no columns'}; it needs at least "
                "two, the image's name and its label or numbers, with commas, semicolons or tabs between them"
            )
        numbered: Iterator[tuple[int, list[str]]] = ((reader.line_num, row) for row in reader if row)
        if known(header[0]) is not None:
            numbered = chain([(1, header)], numbered)
            header = [f"column {number}" for number in range(1, len(header) + 1)]
        yield header, _rows(path, numbered, known, repeated=repeated)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises ValueError, with the path, for a table that cannot be read."""
    try:
        yield
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def unknown_image(line: str, text: str, names: Collection[str]) -> ValueError:
    """The error of a line that names no image, with the most similar name."""
    near = closest(text, names, 1, 0.5)
    hint = f"did you mean {shown(near[0])}?" if near else "names are those below the folder, a/b/1.jpg"
    hint = NOT_UTF8 if is_raw(text) else hint
    return ValueError(f"{line}: {shown(repr(text))} is not among the {len(names):,} images; {hint}")


def number_in(text: str, line: str, column: str) -> float:
    """Reads a number of a table; raises ValueError with its line and column."""
    try:
        return float(text)
    except ValueError:
        hint = f"; write {text.replace(',', '.')}" if text.count(",") == 1 else ""
        raise ValueError(f"{line}: {shown(repr(text))} in column {shown(repr(column))} is no number{hint}") from None


def _rows(
    path: Path, numbered: Iterable[tuple[int, list[str]]], known: Callable[[str], str | None], *, repeated: bool
) -> Rows:
    lines: dict[str, int] = {}
    for line, row in numbered:
        name = known(row[0])
        if name in lines:
            raise ValueError(
                f"{shown(path)}, line {line}: {shown(row[0].strip())} stands in line {lines[name]} already"
            )
        if name is not None and not repeated:
            lines[name] = line
        yield line, name, row
