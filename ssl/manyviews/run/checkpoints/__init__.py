"""Checkpoints: everything a run needs to go on, whole or not there at all, with each process's own part of it.

What is equal on all processes is written by the first one, `encoder.safetensors` and the like. What is spread over
them, such as the rows of a memory bank, each writes itself, `objective-00001-of-00004.safetensors`: at a billion rows
no process could hold it all. Reading shares it out anew: every process reads its own part from the files that hold it,
so that a run goes on with any number of processes, with the same content, bit for bit. No file can hold code.
"""

from manyviews.run.checkpoints.checkpoint import Checkpoint, optimiser_shards, restore_optimiser, room_needed, sync
from manyviews.run.checkpoints.manifest import folder_name
from manyviews.run.checkpoints.reading import newest_checkpoint, way_on
from manyviews.run.checkpoints.saving import Saver, check_finite, not_finite, save_checkpoint

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
    "save_checkpoint",
    "sync",
    "way_on",
]
