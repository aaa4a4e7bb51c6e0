"""Reads lists of pairs to verify: tables `a,b,same` and LFW's pairs.txt."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from manyviews.data.sources.paths import nearest, same_spelling
from manyviews.data.tables import open_table
from manyviews.evaluators.verification import Pairs, VerificationSettings
from manyviews.system import keyed_random
from manyviews.system.files import open_lines, shown
from manyviews.system.names import closest
from manyviews.system.plural import plural

HEADER = ["a", "b", "same"]
LINES = "a,b,same or a,b,same,fold (same is 1 or 0)"
LFW = re.compile(r"(?:(\d{1,6})\s+)?(\d{1,9})\s*")
"""The first line of LFW's pairs.txt: folds, if there are several, and pairs of each kind in a fold."""
LFW_LINES = "name n1 n2 of one person, or name1 n1 name2 n2 of two"


class Row(NamedTuple):
    """One line of a list."""

    line: int
    images: tuple[str, str]
    same: bool
    fold: str
    """Empty if the list has no folds."""


def read_pairs(
    file: str, names: Sequence[str], settings: VerificationSettings | None = None, *, seed: int = 0
) -> Pairs:
    """Reads pairs of images, and whether those of a pair are of one class.

    The file is a table with the columns a, b, same (1 or 0) and, if wanted, fold, with a header of these names or none;
    or LFW's pairs.txt (Huang et al. 2007): `10 300` or `300` in the first line, and for each fold 300 lines
    `name n1 n2` of one person, then 300 lines `name1 n1 name2 n2` of two; image 7 of a name is name/name_0007, in any
    format. Without folds, the pairs of each kind are dealt at random into those of the settings. Pairs are by positions
    in `names`; of equal names the first is meant.

    Raises:
        ValueError: there is no such file; a line has an unknown name, an image twice, something else than 1 or 0, or
            contradicts another; a fold lacks pairs of a kind; or there are too few pairs for the folds.
    """
    settings, path = settings or VerificationSettings(), Path(file).expanduser()
    if path.is_dir():
        raise ValueError(f"pairs={file} is a folder; name a file with lines {LINES}, or in LFW's layout")
    if not path.is_file():
        raise ValueError(f"pairs={file} does not exist; {nearest(path)}")
    ids: dict[str, int] = {}
    for index, name in enumerate(names):
        ids.setdefault(name, index)
    try:
        with open_lines(path) as lines:
            first = LFW.fullmatch(next(lines, ""))
        rows = list(
            _table_rows(path, ids) if first is None else _lfw_rows(path, ids, int(first[1] or 1), int(first[2]))
        )
    except OSError as problem:
        raise ValueError(f"{path} cannot be read: {problem}") from problem
    if not rows:
        raise ValueError(f"{shown(path)} has no pairs; it must have lines {LINES}")
    _refuse_contradictions(path, rows)
    same = torch.tensor([row.same for row in rows])
    folds = _folds(path, rows, same, settings.folds, seed)
    return Pairs(torch.tensor([[ids[name] for name in row.images] for row in rows]), same, folds, path.name)


def _table_rows(path: Path, ids: dict[str, int]) -> Iterator[Row]:
    spelled = same_spelling(ids)
    with open_table(path, ids, repeated=True) as (header, rows):
        columns = [name.strip().lower() for name in header]
        has_header = columns[:3] == HEADER
        fold = columns.index("fold") if "fold" in columns else None
        if not has_header:
            if not columns[0].startswith("column "):
                raise _unknown(path, 1, header[0], ids, f"; a header is {','.join(HEADER)}")
            fold = 3 if len(columns) > 3 else None
        if len(columns) < 3:
            raise ValueError(f"{shown(path)}, line 1: two columns, where {LINES} should stand")
        for line, name, row in rows:
            if len(row) != len(columns):
                raise ValueError(
                    f"{shown(path)}, line {line}: {len(row)} columns, where the first line has {len(columns)}"
                )
            other = spelled(row[1]) or spelled(row[1].strip())
            for text, one in ((row[0], name), (row[1], other)):
                if one is None:
                    raise _unknown(path, line, text, ids)
            if row[2].strip() not in ("0", "1"):
                raise ValueError(
                    f"{shown(path)}, line {line}: same is {shown(repr(row[2]))}; write 1 for images of one class, 0 "
                    "for images of two"
                )
            if fold is not None and not row[fold].strip():
                raise ValueError(f"{shown(path)}, line {line}: its fold is empty; give every pair one, or none")
            assert name is not None
            assert other is not None
            yield _row(path, line, (name, other), row[2].strip() == "1", "" if fold is None else row[fold].strip())


def _lfw_rows(path: Path, ids: dict[str, int], folds: int, each: int) -> Iterator[Row]:
    stems: dict[str, str] = {}
    for name in ids:
        stems.setdefault(name.rpartition(".")[0] or name, name)
    spelled = same_spelling(stems)

    def image(line: int, person: str, number: str) -> str:
        if not number.isascii() or not number.isdigit():
            raise ValueError(
                f"{shown(path)}, line {line}: {shown(repr(number))} is no number of an image; it must have {LFW_LINES}"
            )
        stem = f"{person}/{person}_{int(number):04d}"
        if (known := spelled(stem)) is None:
            raise _unknown(path, line, stem, stems)
        return stems[known]

    count = 0
    with open_lines(path) as lines:
        for line, text in enumerate(lines, 1):
            words = [word.strip() for word in (text.strip().split("\t") if "\t" in text.strip() else text.split())]
            if line == 1 or not text.strip():
                continue
            if len(words) not in (3, 4):
                raise ValueError(
                    f"{shown(path)}, line {line}: {plural(len(words), 'column')}; it must have {LFW_LINES}"
                )
            person, number, *second = words
            other = (person, second[0]) if len(words) == 3 else (second[0], second[1])
            images = image(line, person, number), image(line, *other)
            fold = str(count // (2 * each) + 1) if folds > 1 and each else ""
            yield _row(path, line, images, len(words) == 3, fold)
            count += 1
    if count != 2 * folds * each:
        raise ValueError(
            f"{shown(path)} has {count:,} pairs, where its first line names {folds} × 2 × {each:,}; the file is cut "
            "off, or its first line is wrong"
        )


def _row(path: Path, line: int, images: tuple[str, str], same: bool, fold: str) -> Row:
    if images[0] == images[1]:
        raise ValueError(f"{shown(path)}, line {line}: {shown(images[0])} is paired with itself; leave the line out")
    return Row(line, images, same, fold)


def _unknown(path: Path, line: int, text: str, known: dict[str, int] | dict[str, str], more: str = "") -> ValueError:
    text = text.strip()
    near = closest(text, known, 1, 0.5)
    hint = f"did you mean {shown(near[0])}?" if near else "names are those below the folder, a/b/1.jpg"
    return ValueError(
        f"{shown(path)}, line {line}: {shown(repr(text))} is not among the {len(known):,} images; {hint}{more}"
    )


def _refuse_contradictions(path: Path, rows: Sequence[Row]) -> None:
    first: dict[tuple[str, ...], Row] = {}
    for row in rows:
        before = first.setdefault(tuple(sorted(row.images)), row)
        if before.same != row.same:
            raise ValueError(
                f"{shown(path)}, line {row.line}: {' and '.join(map(shown, row.images))} are "
                f"{'the same' if row.same else 'different'}, and in line {before.line} they are not; keep one line"
            )


def _folds(
    path: Path, rows: Sequence[Row], same: Bool[Tensor, " pairs"], wanted: int, seed: int
) -> Int64[Tensor, " pairs"]:
    """The fold of each pair, in the order of their first lines, or dealt at random."""
    kinds = {"of one class": same, "of different classes": ~same}
    for kind, chosen in kinds.items():
        if not chosen.any():
            raise ValueError(f"{shown(path)} has no pairs {kind}; a threshold takes pairs of both kinds")
    if rows[0].fold:
        numbers: dict[str, int] = {}
        folds = torch.tensor([numbers.setdefault(row.fold, len(numbers)) for row in rows])
        if len(numbers) < 2:
            raise ValueError(
                f"{shown(path)} has one fold, {shown(rows[0].fold)}; give 2 or more, or leave the column out"
            )
        for kind, chosen in kinds.items():
            lacking = set(range(len(numbers))) - set(folds[chosen].tolist())
            if lacking:
                fold = list(numbers)[min(lacking)]
                raise ValueError(
                    f"{shown(path)}: fold {shown(fold)} has no pairs {kind}, and each takes pairs of both kinds; leave "
                    "the folds out, or divide the pairs otherwise"
                )
        return folds
    folds = torch.empty(len(rows), dtype=torch.int64)
    for kind, chosen in kinds.items():
        own = chosen.nonzero().squeeze(1)
        if len(own) < wanted:
            raise ValueError(
                f"{shown(path)} has {plural(len(own), 'pair')} {kind}, fewer than the {wanted} folds; give more"
                + (f", or set protocol.verification.folds={len(own)}" if len(own) > 1 else "; 2 are the fewest")
            )
        folds[own[keyed_random.uniform(own, seed, 11).argsort(stable=True)]] = torch.arange(len(own)) % wanted
    return folds
