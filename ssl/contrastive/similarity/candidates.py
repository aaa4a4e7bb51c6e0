"""The nearest of very many keys on a CPU: candidates by fast products, then their exact values.

Four ideas carry it. *Fast products*: where the CPU multiplies bfloat16 faster, all products are taken so, and only the
candidates are multiplied again in float32. *A bound*: with q̃ and x̃ the rounded rows, |q·x − q̃·x̃| ≤ |q| |x − x̃| +
|q − q̃| |x̃| (Cauchy and Schwarz); a key is passed over only if its product with this margin stays below a floor, and
the result is proved for each query whose k-th best exact value reaches the floor. Keys are centred for that, which
moves all products of a query by the same number and makes the margin as small as their spread. *A floor from a
sample*: the keys come in random order, so what was found among those seen so far tells, with a margin of chance, the
value that k of all will reach. *One value for a pair*: the exact value depends on its two rows alone, whatever the
tiles, threads or processes.
"""

import math
import warnings
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contrastive.similarity.rows import slices
from contrastive.similarity.threads import on_all_cores

ROWS = 8192
"""Queries of a tile, at most: the more of them, the more often a key's row is read while it is in a cache."""
COLUMN_BITS = 10
COLUMNS = 1 << COLUMN_BITS
"""Keys of a tile."""
GROUP = 16
"""Products of the first tile of which only the largest is looked at, for a first floor."""
BLOCK = 1 << 22
"""Numbers of the keys that are copied at once, 16 MiB, and half as much in bfloat16."""
CHANCE = 4.0
"""Standard deviations by which the number of keys above a floor may fall short."""
FEWEST_QUERIES, FEWEST_KEYS, SHARE = 1 << 9, 1 << 13, 64
"""Queries, keys, and keys per neighbour, from which on candidates are faster than a look at all products."""
LENGTHS = (1e-12, 1e12)
"""Row lengths between which no product leaves the normal range of float32."""
EMPTY = torch.iinfo(torch.int64).max
LOW = 0xFFFFFFFF


class Keys(NamedTuple):
    """The rows that are searched."""

    rows: Tensor
    ids: Tensor | None
    lengths: Tensor | None
    """By which each row is divided before it is multiplied; None: by nothing."""

    def part(self, span: slice) -> "Keys":
        """Some of them."""
        ids, lengths = (None if of_each is None else of_each[span] for of_each in self[1:])
        return Keys(self.rows[span], ids, lengths)


class Found(NamedTuple):
    """The k best keys of each query as far as they are known."""

    values: Tensor
    indices: Tensor
    proved: Tensor
    """Whether the answer to each query is certain; where it is not, the others mean nothing."""


class _Queries(NamedTuple):
    """Some queries, and what does not depend on the keys' block."""

    rows: Tensor
    narrow: Tensor
    """The rows as they are multiplied."""
    lengths: Tensor
    """Of the rows, and of their rounding errors."""
    errors: Tensor
    shift: Tensor
    """The products with the keys' centre."""
    ids: Tensor | None
    best: Tensor
    """The k best keys so far, ascending as `_encode` orders them, EMPTY where there are fewer."""
    floor: Tensor
    """No key whose value reaches it was passed over; infinite where the query is given up."""

    @classmethod
    def of(cls, rows: Tensor, ids: Tensor | None, best: Tensor, centre: Tensor, kind: torch.dtype) -> "_Queries":
        narrow, lengths = rows.to(kind), rows.norm(dim=1)
        floor = torch.full((len(rows),), -torch.inf)
        floor[~((lengths > LENGTHS[0]) & (lengths < LENGTHS[1]))] = torch.inf
        return cls(rows, narrow, lengths, (rows - narrow.float()).norm(dim=1), rows @ centre, ids, best, floor)


class _Block(NamedTuple):
    """Some keys, in random order."""

    rows: Tensor
    narrow: Tensor
    """The centred rows as they are multiplied; behind them zero rows, up to whole tiles."""
    indices: Tensor
    ids: Tensor | None
    length: float
    """Of the longest row, of the longest narrow one, and of the largest rounding error."""
    narrow_length: float
    error: float


def pays(queries: Tensor, keys: Tensor, k: int) -> bool:
    """Whether `search` is the fast way: on a CPU, in float32, with many queries and far more keys than neighbours."""
    fits = queries.device.type == "cpu" and queries.dtype == keys.dtype == torch.float32
    return fits and len(queries) >= FEWEST_QUERIES and max(FEWEST_KEYS, SHARE * k) <= len(keys) < LOW


def search(queries: Tensor, keys: Keys, k: int, query_ids: Tensor | None) -> Found:
    """The k keys with the largest products, in float32, equal values by index; where it is proved, see `top_k`."""
    _silence()
    kind = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    count, dim = keys.rows.shape
    centre = keys.rows.mean(0) if keys.lengths is None else keys.rows.T @ (1 / (count * keys.lengths))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    height = math.ceil(len(queries) / (threads * math.ceil(len(queries) / (threads * ROWS))))
    best = torch.full((len(queries), k), EMPTY)
    parts = [
        _Queries.of(queries[rows], query_ids[rows] if query_ids is not None else None, best[rows], centre, kind)
        for rows in slices(0, len(queries), height)
    ]
    width = min(max(BLOCK // max(dim, 1) // COLUMNS, 1), math.ceil(count / COLUMNS)) * COLUMNS
    copies = keys.rows.new_empty(width, dim), keys.rows.new_empty(width, dim, dtype=kind)
    for span in slices(0, count, width):
        block = _block(keys, order[span], centre, copies)
        if not LENGTHS[0] < block.length < LENGTHS[1]:
            for part in parts:
                part.floor.fill_(torch.inf)
            break
        on_all_cores([partial(_look, part, block, span.start, count) for part in parts], queries.device)
    values = queries.new_empty(len(queries), k)
    for rows in slices(0, len(queries), COLUMNS):
        values[rows] = _decode(best[rows])
    proved = values[:, -1] >= torch.cat([part.floor for part in parts])
    return Found(values, best.bitwise_and_(LOW), proved)


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16, which are twice as fast as those of float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _block(keys: Keys, indices: Tensor, centre: Tensor, copies: tuple[Tensor, Tensor]) -> _Block:
    rows, narrow = copies[0][: len(indices)], copies[1]

    def fill(part: slice) -> Tensor:
        torch.index_select(keys.rows, 0, indices[part], out=rows[part])
        if keys.lengths is not None:
            rows[part] /= keys.lengths[indices[part], None]
        centred = rows[part] - centre
        narrow[part] = centred
        rounded = narrow[part].float()
        lengths = [rows[part].norm(dim=1).max(), rounded.norm(dim=1).max(), centred.sub_(rounded).norm(dim=1).max()]
        return torch.stack(lengths)

    parts = [partial(fill, part) for part in slices(0, len(indices), COLUMNS)]
    lengths = torch.stack(on_all_cores(parts, rows.device)).amax(0).tolist()
    narrow[len(indices) :] = 0
    return _Block(rows, narrow, indices, keys.ids[indices] if keys.ids is not None else None, *lengths)


def _look(queries: _Queries, keys: _Block, seen: int, count: int) -> None:
    """Looks some queries up in a block of keys; `seen` of all `count` keys were looked at before."""
    margin = queries.lengths * keys.error + queries.errors * keys.narrow_length
    # What the sums of both products, that with the centre and the lengths may lose in float32 at most, and more.
    margin += (keys.rows.shape[1] + 8) * 2.0**-23 * queries.lengths * (keys.length + keys.narrow_length)
    best = _Best(queries.best, queries.floor)
    buffer = queries.narrow.new_empty(len(queries.rows), COLUMNS)
    reached = np.empty(buffer.shape, bool)
    for span in slices(0, len(keys.indices), COLUMNS):
        if best.given_up():
            return
        products = torch.mm(queries.narrow, keys.narrow[span.start : span.start + COLUMNS].T, out=buffer)
        done = seen + span.stop
        place = _place(best.k, done / count)
        if seen + span.start == 0:
            maxima = products.view(len(products), GROUP, -1).amax(1).float()
            best.raise_floor(maxima.topk(min(place, maxima.shape[1]), dim=1).values[:, -1] + queries.shift)
        threshold = best.floor - queries.shift - margin
        best.give_up(~(threshold > 0))
        # Rounding keeps the order: a product that reaches the threshold does so when both are rounded.
        places = _at_least(products, threshold.to(products.dtype), reached)
        rows, columns, counts = best.without_crowded(places >> COLUMN_BITS, places & (COLUMNS - 1))
        values = _products(queries.rows, keys.rows[span], counts, columns)
        kept = values >= best.floor.index_select(0, rows)
        if queries.ids is not None and keys.ids is not None:
            kept &= queries.ids.index_select(0, rows) != keys.ids[span].index_select(0, columns)
        kept = kept.nonzero().squeeze(1)
        rows, columns, values = (part.index_select(0, kept) for part in (rows, columns, values))
        best.add(rows, values, keys.indices[span].index_select(0, columns), place)
        tiles = span.stop // COLUMNS
        if span.stop == len(keys.indices) or (seen == 0 and tiles & (tiles - 1) == 0):
            best.settle(place)
    queries.best.copy_(best.store[:, : best.k])


class _Best:
    """The best keys of some queries so far, with room for more than k."""

    def __init__(self, kept: Tensor, floor: Tensor) -> None:
        self.floor = floor
        height, self.k = kept.shape
        self.filled = (kept != EMPTY).sum(1)
        self.store = torch.full((height, 2 * self.k + 128), EMPTY)
        self.store[:, : self.k] = kept

    def raise_floor(self, values: Tensor) -> None:
        torch.maximum(self.floor, values, out=self.floor)

    def give_up(self, chosen: Tensor) -> None:
        self.floor.masked_fill_(chosen, torch.inf)

    def given_up(self) -> bool:
        return bool((self.floor == torch.inf).all())

    def without_crowded(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs without those of queries that have very many in a tile, and how many each query has."""
        counts = torch.bincount(rows, minlength=len(self.floor))
        crowded = counts > COLUMNS // 4
        if crowded.any():
            self.give_up(crowded)
            kept = ~crowded[rows]
            rows, columns = rows[kept], columns[kept]
            counts[crowded] = 0
        return rows, columns, counts

    def add(self, rows: Tensor, values: Tensor, indices: Tensor, place: int) -> None:
        """Adds what was found, ordered by row; `place` is for `settle`, where there is no room."""
        height, room = self.store.shape
        counts = torch.bincount(rows, minlength=height)
        if bool((self.filled + counts > room).any()):
            self.settle(place)
            full = self.filled + counts > room
            self.give_up(full)
            kept = ~full[rows]
            rows, values, indices = rows[kept], values[kept], indices[kept]
            counts[full] = 0
        first = torch.arange(height) * room + self.filled - counts.cumsum(0) + counts
        places = first.index_select(0, rows) + torch.arange(len(rows))
        self.store.view(-1).scatter_(0, places, _encode(values, indices))
        self.filled += counts

    def settle(self, place: int) -> None:
        """Keeps the k best of each query, and raises the floor to the value of the one at a place."""
        widest = int(self.filled.max())
        # NumPy sorts short rows ten times as fast as torch does.
        self.store[:, :widest].numpy().sort(axis=1)
        self.store[:, self.k : max(widest, self.k)] = EMPTY
        self.filled.clamp_(max=self.k)
        reached = self.filled >= place
        self.raise_floor(_decode(self.store[:, place - 1]).masked_fill_(~reached, -torch.inf))


def _place(k: int, share: float) -> int:
    """How many keys of a random share are at least to be above a value, so that k of all are, nearly always."""
    expected, deviation = k * share, math.sqrt(k * share * (1 - share))
    # The last term is for the skewness of the binomial distribution (Cornish and Fisher).
    return min(k, math.ceil(expected + CHANCE * deviation + (CHANCE**2 - 1) / 6 * max(0.0, 1 - 2 * share)))


def _at_least(products: Tensor, threshold: Tensor, reached: "np.ndarray[Any, np.dtype[np.bool_]]") -> Tensor:
    """The places, row by row, of the products that reach the threshold of their row, which is above zero."""
    # Positive numbers are ordered as their bits are, and NumPy has integers of 16 bits.
    kind = torch.int16 if products.dtype == torch.bfloat16 else products.dtype
    # NumPy compares, and finds what is true, with vector instructions: ten times as fast as torch on one core.
    np.greater_equal(products.view(kind).numpy(), threshold.view(kind)[:, None].numpy(), out=reached)
    return torch.from_numpy(np.flatnonzero(reached))


def _products(queries: Tensor, keys: Tensor, counts: Tensor, columns: Tensor) -> Tensor:
    """The products of chosen pairs, each summed in the same order whatever the others: `counts` of each query."""
    ends = torch.zeros(len(counts) + 1, dtype=columns.dtype)
    ends[1:] = counts.cumsum(0)
    size = len(queries), len(keys)
    pattern = torch.sparse_csr_tensor(ends, columns, torch.zeros(len(columns)), size=size, check_invariants=False)
    found: Tensor = torch.sparse.sampled_addmm(pattern, queries, keys.T, beta=0.0).values()
    return found


def _encode(values: Tensor, indices: Tensor) -> Tensor:
    """One integer for a value and an index, ascending: falling values, and rising indices where they are equal."""
    bits = (values + 0.0).view(torch.int32)  # −0 becomes 0
    return torch.where(bits >= 0, ~bits, bits & 0x7FFFFFFF).long() << 32 | indices


def _decode(codes: Tensor) -> Tensor:
    """The values in integers that `_encode` made; not a number for EMPTY."""
    high = (codes >> 32).int()
    return torch.where(high < 0, ~high, high | -(1 << 31)).view(torch.float32)


@cache
def _silence() -> None:
    """Brings about the warning that torch gives once, of sparse tensors as unfinished, where nobody is in its way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1))
