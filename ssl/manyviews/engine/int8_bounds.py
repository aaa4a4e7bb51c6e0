"""Where rows are measured from: what has to be rounded is then as small as their spread."""

from typing import NamedTuple

import torch
from torch import Tensor

WIDER = 16
"""There is at most one further column of a row for so many of its own."""


class Frame(NamedTuple):
    """The origins of queries and keys, and the columns that make up for them.

    q·x = q·c + |q| ((u − o)·(x − c) + o·(x − c)), where u = q / |q|, c is the keys' mean and o that of the u. The first
    term is a number for each query, and the last one a number for each key: it stands in further columns of the rows,
    so that it is rounded, and bounded, with the others.
    """

    centre: Tensor
    origin: Tensor
    columns: int
    """How many further columns there are."""
    weight: float
    """What each query has in a further column."""

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, centre: Tensor) -> "Frame":
        """A frame for a sample of the queries, at length 1, and one of the keys."""
        origin, keys = queries.mean(0), keys - centre
        weight = float((queries - origin).abs().amax(1).mean().clamp(min=1e-6))
        # As many columns as leave the largest number of a key where it is.
        needed = (keys @ origin).abs().max() / (weight * keys.abs().amax(1).mean())
        columns = int(needed.nan_to_num(1).ceil().clamp(1, max(1, keys.shape[1] // WIDER)))
        return cls(centre, origin, columns, weight)

    @classmethod
    def of_keys_alone(cls, centre: Tensor) -> "Frame":
        """For rows that are not rounded: the margin is next to nothing wherever queries are measured from."""
        return cls(centre, torch.zeros_like(centre), 0, 0.0)

    def queries(self, units: Tensor) -> Tensor:
        """Queries of length 1 as they are measured here."""
        return torch.cat([units - self.origin, units.new_full((len(units), self.columns), self.weight)], 1)

    def keys(self, rows: Tensor) -> Tensor:
        """Keys as they are measured here."""
        centred = rows - self.centre
        if not self.columns:
            return centred
        further = (centred @ self.origin) / (self.columns * self.weight)
        return torch.cat([centred, further[:, None].expand(-1, self.columns)], 1)
