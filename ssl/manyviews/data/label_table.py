"""Tables of images as people save them: commas, semicolons or tabs between the columns, with or without a header."""

import csv
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from manyviews.system.files import shown

DELIMITERS = (",", ";", "\t", "|")
LOOKED_AT = 50
"""Lines by which the delimiter is chosen."""


class Table(NamedTuple):
    """The rows of a table below its header."""

    header: list[str]
    """The names of the columns; their numbers where the first line is an image's."""
    rows: Iterator[tuple[int, list[str]]]
    """The number of each line and its columns; empty lines are left out."""


def read_table(path: Path, lines: Iterable[str], known: Callable[[str], str | None]) -> Table:
    """Reads a table whose first column names images, by the delimiter by which most of its first lines name some.

    Args:
        path: of the file, for messages.
        lines: its text.
        known: finds the image that a text names; None where there is none.

    Raises:
        ValueError: if no delimiter gives the first line two columns.
        csv.Error: while the rows are read, if a line is no CSV.
    """
    given = iter(lines)
    first = list(islice(given, LOOKED_AT))

    def named(delimiter: str) -> tuple[int, int]:
        columns = [row for row in csv.reader(first, delimiter=delimiter) if len(row) > 1]
        return sum(known(row[0].strip()) is not None for row in columns), len(columns)

    # Of equal ones the first: the comma.
    delimiter = max(DELIMITERS, key=named)
    reader = csv.reader(chain(first, given), delimiter=delimiter)
    header = next(reader, [])
    if len(header) < 2:
        raise ValueError(
            f"{shown(path)}: its first line has {'one column' if header else 'no columns'}; there must be two at "
            "least, the image's name and what belongs to it, with commas, semicolons or tabs between them"
        )
    numbered = ((reader.line_num, row) for row in reader if row)
    if known(header[0].strip()) is None:
        return Table(header, numbered)
    return Table([f"column {number}" for number in range(1, len(header) + 1)], chain([(1, header)], numbered))
