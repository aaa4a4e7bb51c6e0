"""From views to embeddings: a timm backbone, its heads, and the momentum encoder."""
