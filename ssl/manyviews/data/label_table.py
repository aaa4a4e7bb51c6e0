"""CSV tables whose first column names images, with or without a header, and labels from one."""

import csv
import logging
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

from manyviews.data.sources.paths import nearest, same_spelling
from manyviews.system.files import open_lines, shown
from manyviews.system.names import closest
from manyviews.system.path_bytes import NOT_UTF8, is_raw

logger = logging.getLogger(__name__)

DELIMITERS = (",", ";", "\t", "|")
COMPARED = 50
"""Lines by which the delimiter is chosen."""


Rows = Iterator[tuple[int, str | None, list[str]]]
"""Of each row its line, the image that it names, None for an unknown name, and its columns."""


@contextmanager
def open_table(path: Path, images: Iterable[str]) -> Iterator[tuple[list[str], Rows]]:
    """Opens a UTF-8 table whose first column names images; yields the header and the rows below it.

    The delimiter is the one by which most of the first lines name an image. Without a header its names are numbers;
    empty lines are skipped. Names that differ only in the composition of accents (NFC, NFD) match if that is unique.

    Raises:
        ValueError: it cannot be read, the first line has less than two columns, or two rows name one image.
    """
    spelled = same_spelling(images)

    def known(text: str) -> str | None:
        return spelled(text) or spelled(text.strip())

    try:
        with open_lines(path) as lines:
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
            numbered = ((reader.line_num, row) for row in reader if row)
            if known(header[0]) is not None:
                numbered = chain([(1, header)], numbered)
                header = [f"column {number}" for number in range(1, len(header) + 1)]
            yield header, _rows(path, numbered, known)
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _rows(path: Path, numbered: Iterable[tuple[int, list[str]]], known: Callable[[str], str | None]) -> Rows:
    lines: dict[str, int] = {}
    for line, row in numbered:
        name = known(row[0])
        if name in lines:
            raise ValueError(
                f"{shown(path)}, line {line}: {shown(row[0].strip())} stands in line {lines[name]} already"
            )
        if name is not None:
            lines[name] = line
        yield line, name, row


def read_labels(path: Path, names: Collection[str]) -> Mapping[str, str]:
    """Reads labels by the names of images; the first two columns of the table are the name and the label.

    Raises:
        ValueError: there is no such file, it labels no image, or a line has an unknown or repeated name, an empty label
            or one column.
    """
    if path.is_dir():
        raise ValueError(f"data.labels={path} is a folder; name a CSV file")
    if not path.is_file():
        raise ValueError(f"data.labels={path} does not exist; {nearest(path)}")
    labels: dict[str, str] = {}
    not_utf8 = False
    with open_table(path, names) as (_, rows):
        for number, name, row in rows:
            line = f"{shown(path)}, line {number}"
            if len(row) < 2:
                raise ValueError(f"{line}: one column, where a name and a label should stand")
            text, label = row[0].strip(), unicodedata.normalize("NFC", row[1].strip())
            not_utf8 = not_utf8 or is_raw(text + label)
            if name is None:
                near = closest(text, names, 1, 0.5)
                hint = f"did you mean {shown(near[0])}?" if near else "names are those below the folder, a/b/1.jpg"
                hint = NOT_UTF8 if is_raw(text) else hint
                raise ValueError(f"{line}: {shown(repr(text))} is not among the {len(names):,} images; {hint}")
            if not label:
                raise ValueError(f"{line}: {shown(name)} has an empty label; leave the line out if it has none")
            labels[name] = label
    if not_utf8:
        logger.warning("%s: %s; what is not is shown as \\xe9", shown(path), NOT_UTF8)
    if not labels:
        raise ValueError(f"{path} labels no image: below the header there must be lines of a name and a label")
    return labels
