"""Whether a run may go on from its folder: the same settings, the same images."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from contrastive import distributed
from contrastive.checkpoints import Checkpoint, newest_checkpoint
from contrastive.config import load
from contrastive.data import Images
from contrastive.progress import Teller
from contrastive.recipe import Recipe
from contrastive.run import CHECKPOINTS, CONFIG

FREE_IN_TRAINING = (
    *("epochs", "minutes", "workers", "threads", "log_every", "monitor", "save_minutes", "keep", "keep_best"),
    *("keep_views", "preview"),
)
FREE = {"output", "resume", "elastic", *(f"train.{key}" for key in FREE_IN_TRAINING)}
"""Settings that may change when a run goes on."""


def resumable(recipe: Recipe, folder: Path, images: Images, processes: int, teller: Teller) -> Checkpoint | None:
    """The newest checkpoint of a run, if what it was made with is what goes on now; None: there is none yet.

    All processes call it together and get the same step, each with its own part of what is spread over them: on
    another number of processes than it was written by, where `recipe.elastic` allows that, the parts are shared out
    anew, with the same content.

    Raises:
        ValueError: if a setting that matters, the images or the number of processes are not those of the checkpoint.
    """
    found, damaged = newest_checkpoint(folder / CHECKPOINTS)
    for line in damaged:
        teller.warn(line)
    now = recipe.model_dump(mode="json")
    if (folder / CONFIG).exists():
        check_settings(load(Recipe, folder / CONFIG).model_dump(mode="json"), now, FREE)
    if found is None:
        return None
    facts = check_facts(found, {"seconds": float, "images": str, "recipe": dict})
    # The file may have been edited, or belong to another run.
    check_settings(facts["recipe"], now, FREE)
    if facts["images"] != images.fingerprint:
        raise ValueError(
            "the images are not those that the run was begun with (files were added, removed or changed), so that "
            "ids would mean other images; start another run with output=…"
        )
    check_processes(found, processes, elastic=recipe.elastic, teller=teller)
    return found


def check_processes(found: Checkpoint, processes: int, *, elastic: bool, teller: Teller) -> None:
    """Refuses another number of processes than a checkpoint was written by, unless that is asked for.

    Raises:
        ValueError: naming both numbers.
    """
    before = found.facts["processes"]
    if before == processes:
        return
    if not elastic:
        raise ValueError(
            f"the checkpoint of step {found.step:,} was written by {before} processes and this is a start of "
            f"{processes}, which would go on otherwise; start {before}, or add elastic=true to go on from the same "
            "sample with the same global batch, but not bit for bit"
        )
    teller.warn(f"begun on {before} processes, goes on with {processes}: the same global batch")


def check_facts(found: Checkpoint, kinds: Mapping[str, type]) -> Mapping[str, Any]:
    """The facts of a checkpoint, if those that are needed are there and of their kind.

    Raises:
        ValueError: naming one that is not; another program, or a much older one, has written the checkpoint then.
    """
    for key, kind in kinds.items():
        value = found.facts.get(key)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ValueError(
                f"the checkpoint of step {found.step:,} does not say its {key} as it should ({kind.__name__}); "
                "start another run with output=…"
            )
    return found.facts


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


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> None:
    """Refuses to go on with other settings than a run was begun with.

    Args:
        before: those of the run, as JSON values (`Settings.model_dump(mode="json")`).
        now: those of the resumption, likewise.
        free: the dotted keys that do not change what is learned.

    Raises:
        ValueError: naming each difference.
    """
    old, new = _flat(before), _flat(now)
    keys = [key for key in {**old, **new} if key not in free and old.get(key) != new.get(key)]
    if keys:
        differences = "; ".join(f"{key} was {_as_given(old.get(key))} and is {_as_given(new.get(key))}" for key in keys)
        raise ValueError(f"a run goes on as it was begun, but {differences}; start another with output=…")


def _as_given(value: Any) -> str:
    """A value as it is written in a recipe; what would move a terminal's cursor is spelled out."""
    return json.dumps(value).strip('"')


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
