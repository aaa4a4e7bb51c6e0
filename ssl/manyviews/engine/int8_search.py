"""Best keys of each query, updated while blocks of keys are searched."""

import math

import torch
from torch import Tensor

from manyviews.engine.rows import slices

CHANCE = 3.5
"""Standard deviations by which the number of keys above a floor may be below its expectation."""
CROWD = 256
"""Candidates of a query in a tile above which it is given up."""
AT_ONCE = 1 << 10
"""Queries whose values are read at a time."""
EMPTY = torch.iinfo(torch.int64).max
LOW = 0xFFFFFFFF
"""Mask of the index in the code of a value and an index; the index is less."""


class Best:
    """Best keys of some queries so far, with capacity for more than k."""

    def __init__(self, height: int, k: int) -> None:
        self.k = k
        self.floor = torch.full((height,), -torch.inf, dtype=torch.float32)
        """No key whose value reaches it was skipped; infinite for queries that are given up."""
        self.store = torch.full((height, k + k // 2 + 128), EMPTY)
        """Codes of the candidates of each row, in order once settled, then EMPTY."""
        self.filled = torch.zeros(height, dtype=torch.int64)

    def read(self, values: Tensor, indices: Tensor) -> None:
        """Writes the k best of each query, once they are settled."""
        for rows in slices(0, len(values), AT_ONCE):
            codes = self.store[rows, : self.k]
            values[rows] = _decode(codes)
            torch.bitwise_and(codes, LOW, out=indices[rows])

    def raise_floor(self, values: Tensor) -> None:
        """Raises the floors to these values where they are higher."""
        torch.maximum(self.floor, values, out=self.floor)

    def give_up(self, chosen: Tensor) -> None:
        """Stops the search for some queries, whose answers are not proved then."""
        self.floor.masked_fill_(chosen, torch.inf)

    def given_up(self) -> bool:
        """Whether all queries are given up."""
        return bool((self.floor == torch.inf).all())

    def without_crowded(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gives up on queries with too many pairs; returns the other pairs and counts per query."""
        counts = torch.bincount(rows, minlength=len(self.floor))
        crowded = counts > CROWD
        if crowded.any():
            self.give_up(crowded)
            kept = ~crowded[rows]
            rows, columns = rows[kept], columns[kept]
            counts[crowded] = 0
        return rows, columns, counts

    def add(self, rows: Tensor, values: Tensor, indices: Tensor, rank: int) -> None:
        """Adds candidates, ordered by row; calls `settle` with `rank` if there is no room."""
        height, room = self.store.shape
        counts = torch.bincount(rows, minlength=height)
        if bool((self.filled + counts > room).any()):
            self.settle(rank)
            full = self.filled + counts > room
            self.give_up(full)
            kept = ~full[rows]
            rows, values, indices = rows[kept], values[kept], indices[kept]
            counts[full] = 0
        first = torch.arange(height) * room + self.filled - counts.cumsum(0) + counts
        slots = first.index_select(0, rows) + torch.arange(len(rows))
        self.store.view(-1).scatter_(0, slots, _encode(values, indices))
        self.filled += counts

    def settle(self, rank: int) -> None:
        """Keeps the k best of each query, and raises the floor to the value of the `rank`-th."""
        widest = int(self.filled.max())
        # NumPy sorts short rows ten times as fast as torch does.
        self.store[:, :widest].numpy().sort(axis=1)
        self.store[:, self.k : max(widest, self.k)] = EMPTY
        self.filled.clamp_(max=self.k)
        reached = self.filled >= rank
        self.raise_floor(_decode(self.store[:, rank - 1]).masked_fill_(~reached, -torch.inf))


def rank_of(k: int, share: float) -> int:
    """Number of keys of a random share that reach a value if k of all do, nearly always."""
    expected, deviation = k * share, math.sqrt(k * share * (1 - share))
    # The last term is for the skewness of the binomial distribution (Cornish and Fisher).
    return min(k, math.ceil(expected + CHANCE * deviation + (CHANCE**2 - 1) / 6 * max(0.0, 1 - 2 * share)))


def _encode(values: Tensor, indices: Tensor) -> Tensor:
    """Code of a value and an index, whose order is by falling values, then rising indices."""
    bits = (values + 0.0).view(torch.int32)  # −0 becomes 0
    return torch.where(bits >= 0, ~bits, bits & 0x7FFFFFFF).long() << 32 | indices


def _decode(codes: Tensor) -> Tensor:
    """Values of codes from `_encode`; NaN for EMPTY."""
    high = (codes >> 32).int()
    return torch.where(high < 0, ~high, high | -(1 << 31)).view(torch.float32)
