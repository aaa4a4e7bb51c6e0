"""Opens files of relations between images: their kind by the header, and their rows as a stream."""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from manyviews.data.sources.paths import nearest
from manyviews.data.tables import DELIMITERS, readable
from manyviews.system.files import open_lines, parse_json, shown
from manyviews.system.plural import plural

Kind = Literal["pairs", "triplets", "ranked", "sets"]

FORMS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("pairs", ("a", "b", "same")),
    ("pairs", ("a", "b", "similarity")),
    ("triplets", ("anchor", "positive", "negative")),
    ("ranked", ("query", "item", "relevance")),
    ("ranked", ("query", "items")),
    ("sets", ("name", "set")),
)
"""Columns of the files of each kind."""
JSON_LINES = (".jsonl", ".ndjson")
ALL_FORMS = (
    "a,b,same (pairs: 0, 1 or a similarity between), anchor,positive,negative (triplets), query,item,relevance or "
    "query,items (ranked lists), or name,set (similar sets)"
)

Records = Iterator[tuple[int, list[Any]]]
"""The line of each row, and its cells in the order of the columns of its form."""


@contextmanager
def open_relations(path: Path, key: str = "data.relations") -> Iterator[tuple[Kind, tuple[str, ...], Records]]:
    """Opens a file of relations; yields their kind, the columns, and the rows as a stream.

    Raises:
        ValueError: there is no such file, it cannot be read, or its first line is of no kind.
    """
    if path.is_dir():
        raise ValueError(f"{key}={shown(path)} is a folder; name a file")
    if not path.is_file():
        raise ValueError(f"{key}={shown(path)} does not exist; {nearest(path)}. {key}=null does without")
    with readable(path), open_lines(path) as lines:
        number, first = next(((number, line) for number, line in enumerate(lines, 1) if line.strip()), (1, ""))
        opened = _open_json if path.suffix.lower() in JSON_LINES else _open_table
        yield opened(path, number, first, lines)


def _open_table(path: Path, number: int, first: str, lines: Iterator[str]) -> tuple[Kind, tuple[str, ...], Records]:
    headers = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in DELIMITERS}
    split_by = {delimiter: [cell.strip().lower() for cell in header] for delimiter, header in headers.items()}
    # Spreadsheets fill lines up to the longest one with empty cells.
    split_by = {delimiter: header[: _length(header)] for delimiter, header in split_by.items()}
    for delimiter, header in split_by.items():
        for kind, columns in FORMS:
            if sorted(header) == sorted(columns):
                if columns[-1] == "items" and header[-1] != "items":
                    raise ValueError(f"{shown(path)}: items is the last column, for a line has as many as it needs")
                order = [header.index(column) for column in columns]
                return kind, columns, _rows_of(path, number, columns, order, csv.reader(lines, delimiter=delimiter))
    raise _of_no_kind(path, max(split_by.values(), key=len), "columns")


def _length(row: list[str]) -> int:
    """Number of cells up to the last that is not empty."""
    return max((index + 1 for index, cell in enumerate(row) if cell.strip()), default=0)


def _rows_of(path: Path, header: int, columns: tuple[str, ...], order: list[int], reader: Any) -> Records:
    for row in reader:
        line, length = header + reader.line_num, _length(row)
        if not length:
            continue
        where = f"{shown(path)}, line {line}"
        if columns[-1] == "items":
            cells = row[:length]
            if length < 2 or not all(cell.strip() for cell in cells):
                raise ValueError(f"{where}: a query and the names of its items should stand there, without gaps")
        else:
            if len(row) < len(columns) or length > len(columns):
                raise ValueError(f"{where}: {plural(length, 'column')}, where the header has {len(columns)}")
            cells = [row[index] for index in order]
            for column, cell in zip(columns, cells, strict=True):
                if not cell.strip():
                    raise ValueError(f"{where}: {column} is empty")
        yield line, cells


def _open_json(path: Path, number: int, first: str, lines: Iterator[str]) -> tuple[Kind, tuple[str, ...], Records]:
    keys = sorted(parse_json(first, f"{shown(path)}, line {number}")) if first else []
    for kind, columns in FORMS:
        if keys == sorted(columns):
            return kind, columns, _objects_of(path, columns, enumerate(chain([first], lines), number))
    raise _of_no_kind(path, keys, "keys")


def _objects_of(path: Path, columns: tuple[str, ...], lines: Iterable[tuple[int, str]]) -> Records:
    for line, text in lines:
        if not text.strip():
            continue
        where = f"{shown(path)}, line {line}"
        given = parse_json(text, where)
        if given.keys() != set(columns):
            raise ValueError(f"{where}: its keys are {', '.join(map(shown, given))}; they must be {', '.join(columns)}")
        cells = [given[column] for column in columns]
        if columns[-1] == "items":
            if not isinstance(cells[1], list) or not cells[1]:
                raise ValueError(f"{where}: items must be a list of names, not {shown(cells[1])}")
            cells = [cells[0], *cells[1]]
        texts = cells[:2] if columns[-1] in ("same", "similarity", "relevance") else cells
        for cell in texts:
            if not isinstance(cell, str):
                raise ValueError(f"{where}: {shown(cell)} is no text; names are texts in quotes")
        yield line, cells


def _of_no_kind(path: Path, given: list[str], what: str) -> ValueError:
    for _, columns in FORMS:
        missing, more = [name for name in columns if name not in given], [name for name in given if name not in columns]
        if len(missing) == 1 and not more:
            return ValueError(f"{shown(path)}: {missing[0]} is missing beside {', '.join(given)}")
    return ValueError(
        f"{shown(path)}: its first line has the {what} {shown(', '.join(given)) or '(none)'}, and must have those of a "
        f"kind of relations: {ALL_FORMS}"
    )
