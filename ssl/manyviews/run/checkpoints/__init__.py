"""Checkpoints: everything a run needs to resume, written atomically; no file can hold code.

Rank 0 writes what is replicated (`encoder.safetensors`); each rank writes its shard of the rest, such as the rows of a
memory bank (`objective-00001-of-00004.safetensors`). When reading, each rank reads its own share from the files that
hold it: a run resumes on any number of ranks, bit for bit.
"""

from manyviews.run.checkpoints.checkpoint import (
    Checkpoint,
    folder_name,
    optimiser_shards,
    restore_optimiser,
    room_needed,
    sync,
)
from manyviews.run.checkpoints.reading import newest_checkpoint, way_on
from manyviews.run.checkpoints.saving import Saver, check_finite, not_finite

__all__ = [
    "Checkpoint",
    "Saver",
    "check_finite",
    "folder_name",
    "newest_checkpoint",
    "not_finite",
    "optimiser_shards",
    "restore_optimiser",
    "room_needed",
    "sync",
    "way_on",
]
