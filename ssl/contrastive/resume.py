"""Whether a run may go on from its folder: the same settings, the same images."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from contrastive import distributed
from contrastive.checkpoints import Checkpoint, newest_checkpoint
from contrastive.config import Settings, load
from contrastive.data import Images
from contrastive.progress import Teller
from contrastive.recipe import Recipe
from contrastive.run import CHECKPOINTS, CONFIG

FREE_IN_TRAINING = (
    *("epochs", "minutes", "workers", "threads", "log_every", "monitor", "save_minutes", "keep", "keep_views"),
    "preview",
)


def resumable(recipe: Recipe, folder: Path, images: Images, processes: int, teller: Teller) -> Checkpoint | None:
    """The newest checkpoint of a run, if what it was made with is what goes on now; None: there is none yet.

    All processes call it together and get the same step, each with its own part of what is spread over them: on
    another number of processes than it was written by, the parts are shared out anew, with the same content.

    Raises:
        ValueError: if a setting that matters, or the images, are not those that the run was begun with.
    """
    found, damaged = newest_checkpoint(folder / CHECKPOINTS)
    for line in damaged:
        teller.warn(line)
    if not (folder / CONFIG).exists():
        return found
    free = {"output", "resume", *(f"train.{key}" for key in FREE_IN_TRAINING)}
    check_settings(load(Recipe, folder / CONFIG), recipe, free)
    if found is not None and found.facts["images"] != images.fingerprint:
        raise ValueError(
            "the images are not those that the run was begun with (files were added, removed or changed), so that "
            "ids would mean other images; start another run with output=…"
        )
    if found is not None and found.facts["processes"] != processes:
        teller.warn(f"begun on {found.facts['processes']} processes, goes on with {processes}: the same global batch")
    return found


def check_lengths(found: Checkpoint, lengths: Mapping[str, int]) -> None:
    """Refuses a checkpoint of an objective whose memory has another length on this number of processes.

    Rows can be shared out anew; rows that are not there cannot be made up, and there is no rule by which some should
    go. That is so for a queue with per_process=true: its length follows the number of processes.

    Args:
        found: the checkpoint.
        lengths: those of the objective that is to go on, over all processes, by name (`Objective.shards`).

    Raises:
        ValueError: naming both lengths.
    """
    for name, length in lengths.items():
        before = found.shards.get(f"objective.{name}", length)
        if before != length:
            raise ValueError(
                f"objective.{name} has {before:,} rows in the checkpoint, which {found.facts['processes']} processes "
                f"wrote, and has {length:,} on the {distributed.size()} of now: a queue with "
                "objective.per_process=true grows with them and cannot be shared out anew; go on with "
                f"{found.facts['processes']} processes, or start another run with output=…"
            )


def check_settings(before: Settings, now: Settings, free: Collection[str]) -> None:
    """Refuses to go on with other settings than a run was begun with.

    Args:
        before: those of the run.
        now: those of the resumption.
        free: the dotted keys that do not change what is learned.

    Raises:
        ValueError: naming each difference.
    """
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    keys = [key for key in {**old, **new} if key not in free and old.get(key) != new.get(key)]
    if keys:
        differences = "; ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in keys)
        raise ValueError(f"a run goes on as it was begun, but {differences}; start another with output=…")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
