"""What the settings of all sources of images have in common."""

from manyviews.config import Settings
from manyviews.data.sources.paths import FilePath


class Source(Settings):
    """Settings of a source of images."""

    relations: FilePath | None = None
    """Relations between the images, to learn from: a table, or JSON lines, with the columns a,b,same (pairs: 0, 1 or a
    similarity between), anchor,positive,negative (triplets), query,item,relevance or query,items (ranked lists), or
    name,set (similar sets, which are the classes then)."""
