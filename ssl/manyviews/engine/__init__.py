"""Sums and nearest neighbours over all pairs of embeddings, in tiles, without N×M matrices."""

from manyviews.engine.nearest import top_k
from manyviews.engine.rows import directions, normalize, squared_distance_rows
from manyviews.engine.softmax import log_sum_exp
from manyviews.engine.tiles import sum_over_tiles

__all__ = [
    "directions",
    "log_sum_exp",
    "normalize",
    "squared_distance_rows",
    "sum_over_tiles",
    "top_k",
]
