"""Nearest of very many keys on a CPU: candidates by fast products, then exact values.

*Fast products*: if the CPU multiplies eight-bit integers, all products are computed so, and only those of candidates
again in float32. *A bound*: a key is skipped only if an upper bound of its product (`int8_products`) is below a floor,
and the result is proved for each query whose k-th best exact value reaches the floor. Keys and queries are centred
(`Frame`), which tightens the bound. *A floor from a sample*: the keys come in random order, so the best of those seen
so far predict, with a margin of chance, the value that k of all will reach. *One value for a pair*: the exact value
depends on its two rows alone, whatever the tiles, threads or ranks.
"""

import math
import warnings
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyviews.engine.int8_products import WIDEST, Frame, Narrow, bounds, left, multiplies_integers, right
from manyviews.engine.int8_search import LOW, Best, rank_of
from manyviews.engine.rows import slices
from manyviews.engine.threads import on_all_cores

ROWS = 8192
"""Maximum number of queries of a tile: with more of them a key's row is read more often while it is in a cache."""
COLUMN_BITS = 10
COLUMNS = 1 << COLUMN_BITS
"""Keys of a tile."""
NEAR = 256
"""Queries of a tile whose products are compared at a time: the result stays in the core's cache."""
FIRST = 256
"""Keys of the first tile whose products are computed in float32, for a first floor."""
BLOCK = 1 << 22
"""Numbers of the keys that are copied at a time: 16 MiB, and a quarter of it in eight bits."""
FEWEST_QUERIES, FEWEST_KEYS, SHARE = 1 << 10, 1 << 13, 64
"""Numbers of queries, keys, and keys per neighbour, from which on candidates are faster than all products."""
LENGTHS = (1e-12, 1e12)
"""Row lengths between which products stay in the normal range of float32."""


class Keys(NamedTuple):
    """Rows to search."""

    rows: Tensor
    ids: Tensor | None
    lengths: Tensor | None
    """Divisor of each row; None: rows are used as they are."""

    def part(self, span: slice) -> "Keys":
        """A slice of the keys."""
        ids, lengths = (None if field is None else field[span] for field in self[1:])
        return Keys(self.rows[span], ids, lengths)

    def scaled(self) -> Tensor:
        """Rows divided by their lengths."""
        return self.rows if self.lengths is None else self.rows / self.lengths[:, None]

    def to(self, device: torch.device) -> "Keys":
        """The same keys on a device."""
        rows, ids, lengths = (None if field is None else field.to(device) for field in self)
        assert rows is not None
        return Keys(rows, ids, lengths)


class _Queries(NamedTuple):
    """Some queries, with everything that does not depend on the keys' block."""

    rows: Tensor
    narrow: Narrow
    """Rows of length 1 in their frame."""
    scales: Tensor
    """Factors of their bounds."""
    shift: Tensor
    """Products with the keys' centre."""
    ids: Tensor | None
    best: Best

    @classmethod
    def of(cls, rows: Tensor, ids: Tensor | None, k: int, frame: Frame, integers: bool) -> "_Queries":
        lengths, best = rows.norm(dim=1), Best(len(rows), k)
        best.give_up(~_sound(lengths))
        framed = (frame.queries(_units(rows[part])) for part in slices(0, len(rows), COLUMNS))
        pieces = zip(*(left(part, integers=integers) for part in framed), strict=True)
        narrow = Narrow(*map(torch.cat, pieces))
        return cls(rows, narrow, narrow.scales * lengths, rows @ frame.centre, ids, best)


class _Block(NamedTuple):
    """Some keys, in random order."""

    rows: Tensor
    tiles: list[Narrow]
    """Rows in their frame."""
    indices: Tensor
    ids: Tensor | None
    length: float
    """Of the longest row, and of the longest in its frame."""
    narrow_length: float


def pays(queries: Tensor, keys: Tensor, k: int) -> bool:
    """Whether `search` is faster: on a CPU, in float32, for many queries and very many keys."""
    fits = queries.device.type == "cpu" and queries.dtype == keys.dtype == torch.float32
    return fits and len(queries) >= FEWEST_QUERIES and max(FEWEST_KEYS, SHARE * k) <= len(keys) < LOW


def search(queries: Tensor, keys: Keys, k: int, query_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the k keys with the largest products, in float32, equal values by index.

    Returns:
        Values and indices, [queries, k], and whether each query's answer is proved; it means nothing where it is not.
    """
    _silence()
    count, dim = keys.rows.shape
    order = _shuffled(count)
    integers = multiplies_integers() and dim < WIDEST
    frame = _frame(queries, keys, order[:COLUMNS], integers)
    threads = torch.get_num_threads()
    height = math.ceil(len(queries) / (threads * math.ceil(len(queries) / (threads * ROWS))))
    spans = list(slices(0, len(queries), height))
    ids = [query_ids[rows] if query_ids is not None else None for rows in spans]
    works = [partial(_Queries.of, queries[rows], own, k, frame, integers) for rows, own in zip(spans, ids, strict=True)]
    parts = on_all_cores(works, queries.device)
    width = min(max(BLOCK // max(dim, 1) // COLUMNS, 1), math.ceil(count / COLUMNS)) * COLUMNS
    copy = keys.rows.new_empty(width, dim)
    for span in slices(0, count, width):
        block = _block(keys, order[span], frame, copy, integers, height)
        if not LENGTHS[0] < block.length < LENGTHS[1]:
            for part in parts:
                part.best.floor.fill_(torch.inf)
            break
        on_all_cores([partial(_look, part, block, frame, span.start, count) for part in parts], queries.device)
    values, indices = queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    for rows, part in zip(spans, parts, strict=True):
        part.best.read(values[rows], indices[rows])
    return values, indices, values[:, -1] >= torch.cat([part.best.floor for part in parts])


def _frame(queries: Tensor, keys: Keys, sample: Tensor, integers: bool) -> Frame:
    count = len(keys.rows)
    centre = keys.rows.mean(0) if keys.lengths is None else keys.rows.T @ (1 / (count * keys.lengths))
    if not integers:
        return Frame.of_keys_alone(centre)
    rows = keys.rows[sample] if keys.lengths is None else keys.rows[sample] / keys.lengths[sample, None]
    return Frame.of(_units(queries[_shuffled(len(queries))[:COLUMNS]]), rows, centre)


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _sound(lengths: Tensor) -> Tensor:
    """Mask of the lengths of rows for which bounds hold."""
    return (lengths > LENGTHS[0]) & (lengths < LENGTHS[1])


def _units(rows: Tensor) -> Tensor:
    """Rows scaled to length 1; zero where no bounds hold for them."""
    lengths = rows.norm(dim=1)
    units: Tensor = rows / lengths[:, None]
    return units.masked_fill_(~_sound(lengths)[:, None], 0)


def _block(keys: Keys, indices: Tensor, frame: Frame, copy: Tensor, integers: bool, height: int) -> _Block:
    rows = copy[: len(indices)]

    def fill(part: slice) -> tuple[Narrow, Tensor]:
        torch.index_select(keys.rows, 0, indices[part], out=rows[part])
        if keys.lengths is not None:
            rows[part] /= keys.lengths[indices[part], None]
        tile = right(frame.keys(rows[part]), COLUMNS, height, integers=integers)
        return tile, torch.stack([rows[part].norm(dim=1).max(), tile.lengths.max()])

    parts = [partial(fill, part) for part in slices(0, len(indices), COLUMNS)]
    tiles, lengths = zip(*on_all_cores(parts, rows.device), strict=True)
    ids = keys.ids[indices] if keys.ids is not None else None
    return _Block(rows, list(tiles), indices, ids, *torch.stack(lengths).amax(0).tolist())


def _look(queries: _Queries, keys: _Block, frame: Frame, seen: int, count: int) -> None:
    """Searches a block of keys for some queries, after `seen` of all `count` keys."""
    # Upper bound of the rounding of sums of products in float32, in units of the bounds: products of the rows, with the
    # keys' centre (at most as long as both lengths of a key), with the queries' origin, and, if it is a sum, the bound.
    sums = 2 * keys.length + (1 + frame.origin.norm() + queries.narrow.lengths) * keys.narrow_length
    margin = (keys.rows.shape[1] + 8) * 2.0**-24 * sums / queries.narrow.scales
    best = queries.best
    buffer = queries.rows.new_empty(0 if queries.narrow.numbers.dtype == torch.uint8 else len(queries.rows), COLUMNS)
    if not seen:
        first = queries.rows @ keys.rows[:FIRST].T
        best.raise_floor(first.topk(rank_of(best.k, FIRST / count), dim=1).values[:, -1])
    for tile, span in zip(keys.tiles, slices(0, len(keys.indices), COLUMNS), strict=True):
        if best.given_up():
            return
        upper = bounds(queries.narrow, tile, buffer)
        rank = rank_of(best.k, (seen + span.stop) / count)
        threshold = (best.floor - queries.shift) / queries.scales - margin
        best.give_up(~(threshold > 0))
        # Rounding keeps the order: a bound that reaches the threshold does so when both are rounded.
        reached = _at_least(upper, threshold.to(upper.dtype))
        del upper
        rows, columns, counts = best.without_crowded(reached >> COLUMN_BITS, reached & (COLUMNS - 1))
        values = _products(queries.rows, keys.rows[span], counts, columns)
        kept = values >= best.floor.index_select(0, rows)
        if queries.ids is not None and keys.ids is not None:
            kept &= queries.ids.index_select(0, rows) != keys.ids[span].index_select(0, columns)
        kept = kept.nonzero().squeeze(1)
        rows, columns, values = (part.index_select(0, kept) for part in (rows, columns, values))
        best.add(rows, values, keys.indices[span].index_select(0, columns), rank)
        tiles = span.stop // COLUMNS
        if span.stop == len(keys.indices) or (seen == 0 and tiles & (tiles - 1) == 0):
            best.settle(rank)


def _at_least(products: Tensor, threshold: Tensor) -> Tensor:
    """Flat indices, row by row, of the products that reach their row's positive threshold."""
    # Positive numbers are ordered as their bits are, and NumPy has integers of 16 bits.
    kind = torch.int16 if products.dtype == torch.bfloat16 else products.dtype
    numbers, limits = products.view(kind).numpy(), threshold.view(kind)[:, None].numpy()
    buffer = np.empty((NEAR, products.shape[1]), bool)
    indices = []
    for rows in slices(0, len(numbers), NEAR):
        # NumPy's comparison and flatnonzero use vector instructions: ten times as fast as torch on one core.
        reached = buffer[: rows.stop - rows.start]
        np.greater_equal(numbers[rows], limits[rows], out=reached)
        indices.append(np.flatnonzero(reached) + rows.start * products.shape[1])
    return torch.from_numpy(np.concatenate(indices))


def _products(queries: Tensor, keys: Tensor, counts: Tensor, columns: Tensor) -> Tensor:
    """Products of `counts` keys of each query, each in the same order whatever the others."""
    ends = torch.zeros(len(counts) + 1, dtype=columns.dtype)
    ends[1:] = counts.cumsum(0)
    size = len(queries), len(keys)
    values = queries.new_zeros(len(columns))
    pattern = torch.sparse_csr_tensor(ends, columns, values, size=size, check_invariants=False)
    products: Tensor = torch.sparse.sampled_addmm(pattern, queries, keys.T, beta=0.0).values()
    return products


@cache
def _silence() -> None:
    """Triggers torch's one-time warning that sparse tensors are in beta, and ignores it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1))
