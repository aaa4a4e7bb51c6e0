"""Tables of images as people save them, and the classes of images from one: CSV with or without a header."""

import csv
import logging
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from manyviews.data.sources.paths import nearest, same_spelling
from manyviews.system.files import open_lines, shown
from manyviews.system.names import closest
from manyviews.system.path_bytes import NOT_UTF8, is_raw

logger = logging.getLogger(__name__)

DELIMITERS = (",", ";", "\t", "|")
LOOKED_AT = 50
"""Lines by which the delimiter is chosen."""


class Row(NamedTuple):
    """One row of a table."""

    line: int
    image: str | None
    """The name of the image that it names; None where there is none of that name."""
    columns: list[str]


class Table(NamedTuple):
    """The rows of a table below its header."""

    header: list[str]
    """The names of the columns; their numbers where the first line is an image's."""
    rows: Iterator[Row]
    """Empty lines are left out."""


@contextmanager
def open_table(path: Path, images: Iterable[str]) -> Iterator[Table]:
    """Opens a table whose first column names images, with commas, semicolons or tabs between the columns.

    The delimiter is the one by which most of its first lines name some. How accents are composed (NFC, NFD) does not
    matter to names that nothing else tells apart.

    Args:
        path: the file, in UTF-8.
        images: the names that there are.

    Raises:
        ValueError: if it cannot be read, or no delimiter gives the first line two columns.
    """
    known = same_spelling(images)
    try:
        with open_lines(path) as lines:
            yield _table(path, lines, lambda text: known(text) or known(text.strip()))
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _table(path: Path, lines: Iterator[str], known: Callable[[str], str | None]) -> Table:
    first = list(islice(lines, LOOKED_AT))

    def named(delimiter: str) -> tuple[int, int]:
        columns = [row for row in csv.reader(first, delimiter=delimiter) if len(row) > 1]
        return sum(known(row[0]) is not None for row in columns), len(columns)

    # Of equal ones the first: the comma.
    reader = csv.reader(chain(first, lines), delimiter=max(DELIMITERS, key=named))
    header = next(reader, [])
    if len(header) < 2:
        raise ValueError(
            f"{shown(path)}: its first line has {'one column' if header else 'no columns'}; there must be two at "
            "least, the image's name and what belongs to it, with commas, semicolons or tabs between them"
        )
    rows = (Row(reader.line_num, known(row[0]), row) for row in reader if row)
    if (image := known(header[0])) is None:
        return Table(header, rows)
    return Table([f"column {number}" for number in range(1, len(header) + 1)], chain([Row(1, image, header)], rows))


def read_labels(path: Path, names: Collection[str]) -> Mapping[str, str]:
    """The label of each image that a table names, by the image's name; an image that it leaves out has none.

    The first two columns are the name and the label, further ones are passed over, and the first line may name them.

    Args:
        path: the CSV file, in UTF-8.
        names: the images that there are.

    Raises:
        ValueError: naming the line: for a name that is no image's or stands twice, an empty label, or a missing column;
            or if there is no such file, or it labels no image.
    """
    if path.is_dir():
        raise ValueError(f"data.labels={path} is a folder; name a CSV file")
    if not path.is_file():
        raise ValueError(f"data.labels={path} does not exist; {nearest(path)}")
    lines: dict[str, int] = {}
    labels: dict[str, str] = {}
    not_utf8 = False
    with open_table(path, names) as table:
        for number, name, row in table.rows:
            line = f"{shown(path)}, line {number}"
            if len(row) < 2:
                raise ValueError(f"{line}: one column, where a name and a label should stand")
            given, label = row[0].strip(), unicodedata.normalize("NFC", row[1].strip())
            not_utf8 = not_utf8 or is_raw(given + label)
            if name in lines:
                raise ValueError(f"{line}: {shown(given)} stands in line {lines[name]} already")
            if name is None and is_raw(given):
                raise ValueError(f"{line}: {shown(repr(given))} is not among the images; {NOT_UTF8}")
            if name is None:
                near = closest(given, names, 1, 0.5)
                hint = f"did you mean {shown(near[0])}?" if near else "names are those below the folder, a/b/1.jpg"
                raise ValueError(f"{line}: {shown(repr(given))} is not among the {len(names):,} images; {hint}")
            if not label:
                raise ValueError(f"{line}: {shown(name)} has an empty label; leave the line out if it has none")
            lines[name], labels[name] = number, label
    if not_utf8:
        logger.warning("%s: %s; what is not is shown as \\xe9", shown(path), NOT_UTF8)
    if not labels:
        raise ValueError(f"{path} labels no image: below the header there must be lines of a name and a label")
    return labels
