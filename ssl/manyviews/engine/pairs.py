"""All pairs of two sets of rows, in tiles, without those of equal ids.

On a CPU the rows are sorted by id, and tiles are masked only where ids may be equal. A GPU would be waited for to know
where: there the rows stay as they are, and each tile is masked as a whole.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from manyviews.engine.rows import slices
from manyviews.engine.threads import on_all_cores
from manyviews.system import distributed
from manyviews.system.hardware import has_instructions
from manyviews.system.precision import tf32

PIECES = 64
"""Maximum number of pieces that a sum over many keys is cut into."""


class Pairs:
    """Products of queries with keys, in the order `key_order`, tile by tile; on a CPU sorted by id."""

    def __init__(
        self,
        rows: Tensor,
        keys: Tensor,
        row_ids: Tensor | None,
        key_ids: Tensor | None,
        key_order: Tensor | None,
        tf32_gradient: bool,
    ) -> None:
        self.rows, self.keys, self.key_order = rows, keys, key_order
        self.on_gpu = rows.device.type != "cpu"
        self.tf32_gradient = self.on_gpu and tf32_gradient
        self.ids = None if row_ids is None or key_ids is None else (row_ids, key_ids)
        self.narrow_rows = rows.bfloat16() if as_bfloat16(rows, keys) else None

    def pieces(self) -> tuple[list[slice], list[slice]]:
        """Cuts queries and keys into enough pieces for all cores, by their numbers alone."""
        height, width = tile_shape(self.rows.device)
        a = list(slices(0, len(self.rows), height)) or [slice(0, 0)]
        if self.on_gpu:
            return a, [slice(0, len(self.keys))]
        wanted = min(PIECES // len(a), len(self.keys) // (2 * width))
        return a, cut(len(self.keys), 1 << max(wanted, 1).bit_length() - 1)

    def scores(self, a: slice, columns: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields tiles of keys and products with them, −inf where ids are equal, in a reused buffer."""
        height, width = tile_shape(self.rows.device)
        queries = max(min(_length(a), height), 1)
        # Few queries: longer tiles, of as many products.
        longest = height * width // queries
        buffer = self.rows.new_empty(queries * min(longest, _length(columns)))
        narrow = buffer.new_empty(len(buffer), dtype=torch.bfloat16) if self.narrow_rows is not None else None
        tiles = list(slices(columns.start, columns.stop, longest))
        meetings = None if self.ids is None else _meetings(*self.ids, tiles)
        for index, b in enumerate(tiles):
            tile = self.keys[b] if self.key_order is None else self.keys[self.key_order[b]]
            if narrow is not None and self.narrow_rows is not None:
                scores = _multiply(self.narrow_rows[a], tile, narrow)
                scores = buffer[: scores.numel()].view_as(scores).copy_(scores)
            else:
                with tf32(self.on_gpu and tile.element_size() == 2):
                    scores = _multiply(self.rows[a], tile.to(self.rows.dtype), buffer)
            if meetings is not None and self.ids is not None:
                _exclude(scores, a, b, meetings[index], *self.ids)
            yield b, tile, scores


def each_pair(rows: Tensor, ids: Tensor, add: Callable[[slice, slice, Tensor], None]) -> None:
    """Calls `add(a, b, 2^(row · row))` for this rank's part of all pairs of tiles, a ≤ b; on a CPU.

    The exponentials are zero where the ids are equal, and in a reused buffer. Chunks of rows are paired as in a
    round-robin tournament: in each round every chunk has one other, so the pairs of a round, spread over the cores,
    never write to the same rows; each rank computes its part of every round.
    """
    height, width = tile_shape(rows.device)
    processes = distributed.world_size()
    # Enough chunks for many cores, also of few rows, but none below what a product needs to be efficient.
    width = min(width, max(2 * height, len(rows) // (16 * processes)))
    count = 2 * processes * max(1, round(len(rows) / (2 * processes * width)))
    chunks = cut(len(rows), count)

    def tiles_of(i: int, j: int) -> list[tuple[slice, slice]]:
        first, second = chunks[min(i, j)], chunks[max(i, j)]
        if i != j:
            return [(part, second) for part in slices(first.start, first.stop, height)]
        # On the diagonal each part meets itself, where half of the work is done twice, and what comes after it.
        parts = slices(first.start, first.stop, max(1, min(height, -(-_length(first) // 2))))
        return [tile for part in parts for tile in ((part, part), (part, slice(part.stop, first.stop)))]

    def play(i: int, j: int) -> None:
        tiles = [(a, b) for a, b in tiles_of(i, j) if a.stop > a.start and b.stop > b.start]
        meetings = _meetings(ids, ids, [b for _, b in tiles])
        buffer = rows.new_empty(max((math.prod(map(_length, tile)) for tile in tiles), default=0))
        for (a, b), meeting in zip(tiles, meetings, strict=True):
            scores = _multiply(rows[a], rows[b], buffer)
            _exclude(scores, a, b, meeting, ids, ids)
            add(a, b, scores.exp2_())

    own = distributed.share(count)
    on_all_cores([partial(play, i, i) for i in range(own.start, own.stop)], rows.device)
    matches = distributed.share(count // 2)
    for turn in range(count - 1):
        # The circle method: the last chunk stays, the others move on by one from round to round.
        circle = [count - 1, *((turn + index) % (count - 1) for index in range(count - 1))]
        games = [(circle[index], circle[count - 1 - index]) for index in range(matches.start, matches.stop)]
        on_all_cores([partial(play, i, j) for i, j in games], rows.device)


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile: fits in a CPU core's cache; 256 MiB on a GPU: few launches."""
    return (256, 1536) if device.type == "cpu" else (8192, 8192)


def as_bfloat16(rows: Tensor, keys: Tensor) -> bool:
    """Whether products are taken in bfloat16, twice as fast on a CPU with instructions for it."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or keys.dtype != torch.bfloat16:
        return False
    return has_instructions("avx512_bf16", "amx_tile")


def cut(count: int, pieces: int) -> list[slice]:
    """Cuts a range into `pieces` consecutive slices whose lengths differ by at most 1."""
    return [distributed.share(count, piece, pieces) for piece in range(pieces)]


def order_of(ids: Tensor) -> tuple[Tensor | None, Tensor]:
    """Order that sorts the ids, and the sorted ids; no order if they are sorted, or on a GPU."""
    if ids.device.type != "cpu" or bool((ids[1:] >= ids[:-1]).all()):
        return None, ids
    ids, order = ids.sort(stable=True)
    return order, ids


def take(rows: Tensor, order: Tensor | None) -> Tensor:
    """Reorders rows by an order from `order_of`."""
    return rows if order is None else rows[order]


def put(rows: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of `take`."""
    if order is None:
        return rows
    restored = torch.empty_like(rows)
    restored[order] = rows
    return restored


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length


def _meetings(row_ids: Tensor, key_ids: Tensor, tiles: Sequence[slice]) -> list[list[int]]:
    """First and last row whose id may be in each tile of keys, by sorted ids; on a GPU all rows."""
    if row_ids.device.type != "cpu":
        return [[0, len(row_ids)]] * len(tiles)
    lowest, highest = key_ids[[b.start for b in tiles]], key_ids[[b.stop - 1 for b in tiles]]
    first = torch.searchsorted(row_ids, lowest)
    last = torch.searchsorted(row_ids, highest, right=True)
    meetings: list[list[int]] = torch.stack([first, last], 1).tolist()
    return meetings


def _exclude(scores: Tensor, a: slice, b: slice, meeting: list[int], row_ids: Tensor, key_ids: Tensor) -> None:
    first, last = max(meeting[0], a.start), min(meeting[1], a.stop)
    if first < last:
        equal = row_ids[first:last, None] == key_ids[b]
        scores[first - a.start : last - a.start].masked_fill_(equal, -torch.inf)


def _multiply(rows: Tensor, columns: Tensor, buffer: Tensor) -> Tensor:
    shape = len(rows), len(columns)
    return torch.mm(rows, columns.T, out=buffer[: shape[0] * shape[1]].view(shape))
