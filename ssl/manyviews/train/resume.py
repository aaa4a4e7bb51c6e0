"""Checks that a checkpoint matches recipe, images and world size before resuming."""

import json
import os
import time
from collections.abc import Collection, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from manyviews.config import dump_yaml, load, validate
from manyviews.data import Images
from manyviews.optim import cosine
from manyviews.recipe import Recipe, TrainSettings
from manyviews.run.checkpoints import Checkpoint, newest_checkpoint
from manyviews.run.folder import CHECKPOINTS, CONFIG
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.files import MEBIBYTE, read_text
from manyviews.system.plural import plural
from manyviews.system.writing import write_atomic
from manyviews.train.budget import share_spent
from manyviews.views import MEAN, STD

OF_A_START = {"resume", "elastic", "extend"}
"""Settings of one start and not of the run."""
FREE = {
    *(
        "output",
        "data.max_bad",
        "data.cache",
        "data.decoder",
        "data.memory",
        "train.workers",
        "train.threads",
        "train.log_every",
        "train.monitor",
        "train.preview",
    ),
    *("train.save_minutes", "train.keep", "train.keep_best", "train.keep_views", *OF_A_START),
}
"""Settings that may change when a run is resumed."""
SCHEDULE = {"train.epochs", "train.minutes"}
"""Settings that may change with extend=true: all learning rates depend on them."""
OLDER = {"mean": MEAN, "std": STD, "crop_pct": 1.0}
"""Settings of views in runs of versions that had no such settings."""
EXTEND = "add extend=true to continue with the new schedule, or start another with output=…"
OTHER_IMAGES = "ids would mean other images: put them back, or start another run with output=…"
Seconds = Annotated[float, Field(ge=0, le=1e10)]
Counted = Annotated[int, Field(ge=0, lt=10**9)]
Measured = Annotated[float, Field(allow_inf_nan=False)]
METADATA = {
    "seconds": Seconds,
    "images": str,
    "recipe": dict,
    "skipped": Counted | None,
    "cut_off": bool | None,
    "losses": dict[str, Annotated[list[float], Field(min_length=1)]] | None,
    "score": Measured | None,
    "held_out": str | None,
    "relations": str | None,
    "channels": Annotated[int, Field(ge=1, le=64)] | None,
    "scaler": dict[str, Measured | int] | None,
}
"""Checkpoint metadata that resuming needs, with their types; older versions lack some."""
LOCATIONS = {"data.path", "data.key", "data.test", "data.labels", "data.relations", "values"}
"""Settings that may change if the content of the files is the same."""


def resumable(recipe: Recipe, folder: Path, images: Images, processes: int, console: Console) -> Checkpoint | None:
    """The newest checkpoint of a run, if any, with this rank's shards; collective.

    Raises:
        ValueError: if settings, images or (without `recipe.elastic`) world size differ from those of the checkpoint.
    """
    checkpoint, damaged = newest_checkpoint(folder / CHECKPOINTS)
    for line in damaged:
        console.warn(line)
    now = recipe.model_dump(mode="json")
    if (folder / CONFIG).exists():
        before = _as_now(load(Recipe, folder / CONFIG), recipe)
        check_settings(before, now, FREE | SCHEDULE | moved(before, now))
        if checkpoint is None and not recipe.extend:
            check_settings(before, now, FREE | LOCATIONS, EXTEND)
    if checkpoint is None:
        return None
    metadata = check_metadata(checkpoint, METADATA)
    # config.yaml may have been edited, or belong to another run.
    before = _as_now(validate(Recipe, metadata["recipe"]), recipe)
    check_settings(before, now, FREE | SCHEDULE | moved(before, now))
    check_images(checkpoint, images)
    check_processes(checkpoint, processes, elastic=recipe.elastic, console=console)
    return checkpoint


def with_known_views(recipe: Recipe, folder: Path) -> Recipe:
    """A recipe whose null settings of views are those that its run was started with, if it was started."""
    if not (folder / CONFIG).is_file():
        return recipe
    known = OLDER | {name: value for name, value in load(Recipe, folder / CONFIG).views if value is not None}
    open_ones = {name: value for name, value in known.items() if getattr(recipe.views, name) is None}
    return recipe.model_copy(update={"views": recipe.views.model_copy(update=open_ones)})


def _as_now(before: Recipe, now: Recipe) -> dict[str, Any]:
    """The settings of a run as JSON values; views that an older version wrote get what it lacked."""
    views = {name: OLDER.get(name, getattr(now.views, name)) for name, value in before.views if value is None}
    completed = before.model_copy(update={"views": before.views.model_copy(update=views)})
    return completed.model_dump(mode="json")


def check_images(checkpoint: Checkpoint, images: Images) -> None:
    """Raises ValueError for other images than those of a checkpoint."""
    if check_metadata(checkpoint, {"images": str})["images"] != images.fingerprint:
        raise ValueError(
            "the images are not those that the run was started with (files, labels or how they are read, which "
            "data.size, data.memory and data.cache decide, have changed); "
            f"{OTHER_IMAGES}"
        )


def check_processes(checkpoint: Checkpoint, processes: int, *, elastic: bool, console: Console) -> None:
    """Raises ValueError for another world size than that of a checkpoint, unless `elastic`."""
    before = checkpoint.metadata["processes"]
    if before == processes:
        return
    if not elastic:
        raise ValueError(
            f"the checkpoint of step {checkpoint.step:,} was written by {plural(before, 'process', 'processes')}, and "
            f"this is a start of {processes}, which would differ; start {before}, or add elastic=true to resume from "
            "the same sample with the same global batch, but not bit for bit"
        )
    console.warn(f"started on {plural(before, 'process', 'processes')}, resumed on {processes}: the same global batch")


def check_metadata(checkpoint: Checkpoint, kinds: Mapping[str, Any]) -> Mapping[str, Any]:
    """Validates and returns a checkpoint's metadata; raises ValueError."""
    for key, kind in kinds.items():
        try:
            TypeAdapter(kind).validate_python(checkpoint.metadata.get(key), strict=True)
        except ValidationError as problem:
            first = problem.errors(include_url=False, include_input=False, include_context=False)[0]
            raise ValueError(
                f"the checkpoint of step {checkpoint.step:,} has no valid {key} "
                f"({first['msg'].removeprefix('Input ')}); start another run with output=…"
            ) from None
    return checkpoint.metadata


def check_lengths(checkpoint: Checkpoint, lengths: Mapping[str, int]) -> None:
    """Raises ValueError if the objective's shards have other lengths than the checkpoint's.

    The length of a queue with per_process=true depends on the world size.
    """
    writers = checkpoint.metadata["processes"]
    for name, length in lengths.items():
        before = checkpoint.shards.get(f"objective.{name}", length)
        if before != length:
            raise ValueError(
                f"objective.{name} has {before:,} rows in the checkpoint, which {writers} processes wrote, and has "
                f"{length:,} on the {distributed.world_size()} of now: a queue with objective.per_process=true grows "
                f"with them and cannot be redistributed; resume on {writers} processes, or start another run with "
                "output=…"
            )


def check_schedule(checkpoint: Checkpoint, recipe: Recipe, steps_per_epoch: int) -> str | None:
    """Compares the schedule with that of the checkpoint; returns a message if it is extended.

    A run at the end of its schedule that is not marked as finished is extended without extend=true.

    Raises:
        ValueError: if the schedule differs without extend=true, or the new budget is spent already.
    """
    before, now = checkpoint.metadata["recipe"], recipe.model_dump(mode="json")
    changed = differences(before, now, FREE | LOCATIONS)
    if not SCHEDULE & changed.keys():
        return None
    old, new = validate(TrainSettings, before["train"]), recipe.train
    step, seconds = checkpoint.step, checkpoint.metadata["seconds"]
    progress = [partial(share_spent, steps=one.steps(steps_per_epoch), minutes=one.minutes) for one in (old, new)]
    if not recipe.extend and progress[0](step, seconds) < 1:
        check_settings(before, now, FREE | LOCATIONS, EXTEND)
    if progress[1](step, seconds) >= 1:
        had = f"{seconds / 60:.3g} minutes" if new.minutes else f"{step / steps_per_epoch:.3g} epochs"
        raise ValueError(f"{_in_words(changed)}, but the run has had {had} already; name more, or leave it out")
    peak, warmup = recipe.optim.peak_rate(new.batch_size), recipe.optim.warmup
    rates = [peak * cosine(spent(step + 0.5, seconds), warmup) for spent in progress]
    whole = f"{new.minutes:g} minutes" if new.minutes else f"{new.steps(steps_per_epoch):,}"
    return (
        f"extended: {_in_words(changed)}; step {step + 1:,} of {whole} has a rate of {rates[1]:.3g}, not {rates[0]:.3g}"
    )


def record_settings(folder: Path, recipe: Recipe, checkpoint: Checkpoint | None, console: Console) -> None:
    """Writes changed settings of a resumed run to config.yaml, on rank 0, with a message."""
    file = folder / CONFIG
    before = load(Recipe, file)
    changed = differences(before.model_dump(mode="json"), recipe.model_dump(mode="json"), OF_A_START)
    if distributed.rank() or not changed:
        return
    step = checkpoint.step if checkpoint else 0
    lines = list(takewhile(lambda line: line.startswith("#"), read_text(file, MEBIBYTE).splitlines()))
    lines.append(f"# from step {step:,} on ({time.strftime('%Y-%m-%d')}): {_in_words(changed)}")
    kept = recipe.model_copy(update={"resume": before.resume, "elastic": before.elastic, "extend": False})
    write_atomic(file, ["\n".join([*lines, dump_yaml(kept)]).encode()])
    console.say(f"changed    {_in_words(changed)}; {file} says so")


def check_settings(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    free: Collection[str],
    way_out: str = "start another with output=…",
) -> None:
    """Raises ValueError if settings differ beyond `free` keys, with the way out."""
    if changed := differences(before, now, free):
        raise ValueError(f"a run is resumed with its own settings, but {_in_words(changed)}; {way_out}")


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Old and new values of changed settings by dotted key, without those in `free`."""
    old, new = _flat(before), _flat(now)
    keys = [key for key in {**old, **new} if key not in free and old.get(key) != new.get(key)]
    return {key: (old.get(key), new.get(key)) for key in keys}


def moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """The keys of `LOCATIONS` that hold a location in both trees."""
    sources = {key: (_flat(before).get(key), _flat(now).get(key)) for key in ("values", "data.relations")}
    others = {
        key
        for key, values in sources.items()
        if not all(isinstance(value, str) and os.path.isabs(value) for value in values)
    }
    return LOCATIONS - others


def _in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} was {_as_given(old)} and is {_as_given(new)}" for key, (old, new) in changed.items())


def _as_given(value: Any) -> str:
    return json.dumps(value).strip('"')


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
