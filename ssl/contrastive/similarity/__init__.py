"""The engine: softmax sums and nearest neighbours over all pairs of embeddings, in tiles, without the N×M matrix."""

from contrastive.similarity.nearest import top_k
from contrastive.similarity.rows import normalize
from contrastive.similarity.softmax import log_sum_exp

__all__ = ["log_sum_exp", "normalize", "top_k"]
