"""Reads relations between images from files: pairs, triplets, ranked lists and similar sets."""

import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from manyviews.data.images import fingerprint
from manyviews.data.relation_files import Kind, Records, open_relations
from manyviews.data.tables import lookup, number_in, unknown_image
from manyviews.system.files import shown
from manyviews.system.names import some
from manyviews.system.plural import plural

LARGEST = 1e9
"""Largest relevance: float32 keeps the differences of smaller ones."""

Integers = np.ndarray[Any, np.dtype[np.int64]]
Numbers = np.ndarray[Any, np.dtype[np.float64]]


class RelationTable(NamedTuple):
    """Relations of a file, each once and sorted: their order in the file does not matter."""

    kind: Kind
    ids: Int64[Tensor, "relations columns"]
    """Of pairs a and b, a < b; of triplets anchor, positive and negative; of ranked lists query and item; of sets the
    image alone. Ids are indices of the names that were given."""
    numbers: Float64[Tensor, " relations"]
    """Similarity of a pair, relevance of an item, index of a set; of triplets 1."""
    notes: tuple[str, ...] = ()
    """What a person should know: relations that are left out, and those that contradict others."""
    sets: tuple[str, ...] = ()
    """Names of the sets, sorted."""

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with any relation, but not with the order of the file."""
        return fingerprint([self.kind, self.ids.numpy(), self.numbers.numpy()])

    @property
    def images(self) -> int:
        """Number of images in a relation."""
        return len(self.ids.unique())


class _Read(NamedTuple):
    """Rows of a file in its order, of images that can be used."""

    ids: Integers
    numbers: Numbers
    lines: Integers
    left_out: list[tuple[int, str]]
    """Lines, and names of images, that cannot be used."""
    sets: list[str]


def read_relations(
    path: Path, names: Sequence[str], others: Iterable[str] = (), *, key: str = "data.relations"
) -> RelationTable:
    r"""Reads the relations between images from a table or JSON lines; the first line has their kind.

    Items in order (query,items) have the relevance n, n − 1, …, 1, the first the highest. A pair, or an item of a
    query, that comes with several numbers has their mean; triplets that contradict each other are kept. `notes` counts
    both.

    Args:
        path: a table with one of the headers of `relation_files.FORMS`, its columns in any order, with commas,
            semicolons, tabs or bars; or, with the suffix .jsonl, an object with these keys on each line, "items" being
            a list.
        names: the names of the images.
        others: names of images that exist and have no id; relations with them are left out and counted.
        key: the setting that named the file, for errors.

    Raises:
        ValueError: with the line, for an unknown header or name, a missing cell, a number out of range, an image
            related to itself or in two sets; if no relation is left, or the file cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = Path(folder, "triplets.csv")
        ...     _ = table.write_text("anchor,positive,negative\nx.png,y.png,z.png\n")
        ...     read_relations(table, ["x.png", "y.png", "z.png"]).ids
        tensor([[0, 1, 2]])
    """
    with open_relations(path, key) as (kind, columns, records):
        read = _numbered(path, kind, columns, records, names, others)
    notes = list(_of_left_out(read))
    ids, numbers, lines = read.ids, read.numbers, read.lines
    if not len(ids):
        reason = "; ".join(notes) if notes else "below the header there must be a line for each"
        raise ValueError(f"{shown(path)} holds no relation of images to learn from: {reason}")
    if kind == "triplets":
        ids, first = np.unique(ids, axis=0, return_index=True)
        numbers, lines = np.ones(len(ids)), lines[first]
        notes += _of_cycles(ids, lines, names)
    else:
        ids = np.sort(ids, axis=1) if kind == "pairs" else ids
        ids, numbers, several = _merged(ids, numbers, lines)
        if kind == "sets" and several:
            image, parts = several[0]
            raise ValueError(
                f"{shown(path)}, line {parts[1][0]}: {shown(names[image[0]])} is in the set "
                f"{shown(repr(read.sets[int(parts[1][1])]))}, and by line {parts[0][0]} in "
                f"{shown(repr(read.sets[int(parts[0][1])]))}; sets must not overlap: give pairs (a,b,same) instead"
            )
        notes += _of_several(kind, several, names)
    return RelationTable(kind, torch.from_numpy(ids), torch.from_numpy(numbers), tuple(notes), tuple(read.sets))


def _numbered(
    path: Path,
    kind: Kind,
    columns: tuple[str, ...],
    records: Records,
    names: Sequence[str],
    others: Iterable[str],
) -> _Read:
    """The rows with ids and numbers, checked line by line."""
    index: dict[str, int] = {}
    for number, name in enumerate(names):
        index.setdefault(name, number)
    known, elsewhere = lookup(index), lookup(others)
    ids, numbers, lines, left_out = array("q"), array("d"), array("q"), []
    sets: dict[str, int] = {}

    def id_of(text: str, where: str) -> int:
        if (name := known(text)) is not None:
            return index[name]
        if elsewhere(text) is None:
            raise unknown_image(where, text.strip(), index)
        return -1

    queries: dict[str, int] = {}
    for line, cells in records:
        where = f"{shown(path)}, line {line}"
        images = cells if columns[-1] in ("negative", "items") else cells[: len(columns) - 1]
        row_ids = [id_of(image, where) for image in images]
        same = [known(image) or elsewhere(image) for image in images]
        if len(set(same)) < len(same):
            twice = next(image for number, image in enumerate(images) if same[number] in same[:number])
            raise ValueError(f"{where}: {shown(twice.strip())} stands twice in one relation")
        values = [1.0]
        if columns[-1] == "items":
            # Of n items the first has the relevance n.
            values = [float(number) for number in range(len(row_ids) - 1, 0, -1)]
            if (first := queries.setdefault(str(same[0]), line)) != line:
                raise ValueError(
                    f"{where}: the items of {shown(same[0])} stand in line {first}; put all of them into one line"
                )
        elif kind == "sets":
            label = unicodedata.normalize("NFC", cells[1].strip())
            values = [float(sets.setdefault(label, len(sets)))]
        elif kind != "triplets":
            values = [_number(cells[2], where, columns[2])]
        rows = [[row_ids[0], item] for item in row_ids[1:]] if columns[-1] == "items" else [row_ids]
        for row, value in zip(rows, values, strict=True):
            if -1 in row:
                gone = next(image for image, number in zip(images, row_ids, strict=True) if number == -1)
                left_out.append((line, gone.strip()))
                continue
            ids.extend(row)
            numbers.append(value)
            lines.append(line)
    width = {"triplets": 3, "sets": 1}.get(kind, 2)
    values_of, named = np.array(numbers), sorted(sets)
    if kind == "sets":
        # Numbered in the order of their names, whatever that of the lines.
        values_of = np.array([named.index(label) for label in sets], dtype=np.float64)[values_of.astype(np.int64)]
    return _Read(np.array(ids, dtype=np.int64).reshape(-1, width), values_of, np.array(lines), left_out, named)


def _number(cell: Any, where: str, column: str) -> float:
    number = number_in(str(int(cell) if isinstance(cell, bool) else cell), where, column)
    most = LARGEST if column == "relevance" else 1.0
    if not 0 <= number <= most:
        bound = f"0 or more, and at most {most:g}" if column == "relevance" else "0, 1 or a number between"
        raise ValueError(f"{where}: {column} is {shown(cell)}, and must be {bound}")
    return number


Several = list[tuple[list[int], list[tuple[int, float]]]]
"""Images of relations with several numbers, and the lines with these."""


def _merged(ids: Integers, numbers: Numbers, lines: Integers) -> tuple[Integers, Numbers, Several]:
    """Each relation once, with the mean of its numbers; and those that had several."""
    unique, inverse, counts = np.unique(ids, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.ravel()
    order = np.argsort(inverse, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    ordered = numbers[order]
    low, high = np.minimum.reduceat(ordered, starts), np.maximum.reduceat(ordered, starts)
    means = np.where(low == high, low, np.add.reduceat(ordered, starts) / counts)
    several: Several = []
    for relation in np.flatnonzero(low != high).tolist():
        own = order[starts[relation] : starts[relation] + counts[relation]]
        own = own[np.sort(np.unique(numbers[own], return_index=True)[1])]
        several.append((unique[relation].tolist(), [(int(lines[row]), float(numbers[row])) for row in own]))
    return unique, means, several


def _of_left_out(read: _Read) -> Iterator[str]:
    if read.left_out:
        line, name = read.left_out[0]
        total = plural(len(read.left_out) + len(read.ids), "relation")
        yield (
            f"left out {len(read.left_out):,} of {total}, with images that are held out, unseen or unreadable, such as "
            f"{shown(name)} in line {line}"
        )


def _of_several(kind: Kind, several: Several, names: Sequence[str]) -> Iterator[str]:
    if several:
        what = "pair" if kind == "pairs" else "item"
        images, parts = several[0]
        given = " and ".join(f"{value:g} (line {line})" for line, value in parts[:3])
        yield (
            f"several numbers for {plural(len(several), what)}, such as {some([names[image] for image in images])}: "
            f"{given}; their mean is used"
        )


def _of_cycles(ids: Integers, lines: Integers, names: Sequence[str]) -> Iterator[str]:
    """Counts triplets in cycles of preferences of one anchor: strongly connected components of positive → negative."""
    anchors = np.repeat(ids[:, :1], 2, axis=1)
    nodes = np.stack([anchors.ravel(), ids[:, 1:].ravel()], 1)
    kinds, edges = np.unique(nodes, axis=0, return_inverse=True)
    edges = edges.reshape(-1, 2)
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(len(kinds), len(kinds)))
    parts = connected_components(graph, directed=True, connection="strong")[1][edges]
    cyclic = np.flatnonzero(parts[:, 0] == parts[:, 1])
    if len(cyclic):
        own = np.sort(lines[cyclic[parts[cyclic, 0] == parts[cyclic[0], 0]]])
        listed = ", ".join(map(str, own[:4].tolist())) + (" …" if len(own) > 4 else "")
        yield (
            f"contradictions among {len(cyclic):,} of {plural(len(ids), 'triplet')}, such as those of "
            f"{shown(names[int(ids[cyclic[0], 0])])} in lines {listed}, by which an image is both nearer and farther "
            "than another; they are kept, and pull against each other"
        )
