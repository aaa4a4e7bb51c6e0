"""Whether a run may go on from its folder: the same settings, the same images; and what is written of a change."""

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

FREE_IN_TRAINING = (
    *("workers", "threads", "log_every", "monitor", "save_minutes", "keep", "keep_best", "keep_views", "preview"),
)
OF_A_START = {"resume", "elastic", "extend"}
"""Settings that are about one start and not about the run."""
FREE = {"output", "data.max_bad", *OF_A_START, *(f"train.{key}" for key in FREE_IN_TRAINING)}
"""Settings that may change when a run goes on."""
SCHEDULE = {"train.epochs", "train.minutes"}
"""Settings that may change where extend=true asks for it: every rate depends on them."""
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
    "channels": Annotated[int, Field(ge=1, le=64)] | None,
    "scaler": dict[str, Measured | int] | None,
}
"""What a run goes on by, of the metadata of its checkpoint; some may be missing, as in those of older versions."""
LOCATIONS = {"data.path", "data.test", "data.labels", "values"}
"""Settings that may change as long as what lies there is the same."""


def resumable(recipe: Recipe, folder: Path, images: Images, processes: int, console: Console) -> Checkpoint | None:
    """The newest checkpoint of a run, if what it was made with is what goes on now; None: there is none yet.

    All processes call it together and get the same step, each with its own part of what is spread over them: on
    another number of processes than it was written by, where `recipe.elastic` allows that, the parts are shared out
    anew, with the same content.

    Raises:
        ValueError: if a setting that matters, the images or the number of processes are not those of the checkpoint.
    """
    found, damaged = newest_checkpoint(folder / CHECKPOINTS)
    for line in damaged:
        console.warn(line)
    now = recipe.model_dump(mode="json")
    if (folder / CONFIG).exists():
        before = load(Recipe, folder / CONFIG).model_dump(mode="json")
        check_settings(before, now, FREE | SCHEDULE | moved(before, now))
        if found is None and not recipe.extend:
            check_settings(before, now, FREE | LOCATIONS, EXTEND)
    if found is None:
        return None
    metadata = check_metadata(found, METADATA)
    # The file may have been edited, or belong to another run.
    check_settings(metadata["recipe"], now, FREE | SCHEDULE | moved(metadata["recipe"], now))
    check_images(found, images)
    check_processes(found, processes, elastic=recipe.elastic, console=console)
    return found


def check_images(found: Checkpoint, images: Images) -> None:
    """Refuses other images than those of a checkpoint."""
    if check_metadata(found, {"images": str})["images"] != images.fingerprint:
        raise ValueError(
            "the images are not those that the run was begun with (files, labels or how they are read have changed); "
            f"{OTHER_IMAGES}"
        )


def check_processes(found: Checkpoint, processes: int, *, elastic: bool, console: Console) -> None:
    """Refuses another number of processes than a checkpoint was written by, unless `elastic` asks for it."""
    before = found.metadata["processes"]
    if before == processes:
        return
    if not elastic:
        raise ValueError(
            f"the checkpoint of step {found.step:,} was written by {plural(before, 'process', 'processes')} and this "
            f"is a start of {processes}, which would go on otherwise; start {before}, or add elastic=true to go on "
            "from the same sample with the same global batch, but not bit for bit"
        )
    console.warn(f"begun on {plural(before, 'process', 'processes')}, goes on with {processes}: the same global batch")


def check_metadata(found: Checkpoint, kinds: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata of a checkpoint, if each of those that are needed is of its type, with its bounds.

    Raises:
        ValueError: naming one that is not; another program, or a much older one, has written the checkpoint then.
    """
    for key, kind in kinds.items():
        try:
            TypeAdapter(kind).validate_python(found.metadata.get(key), strict=True)
        except ValidationError as problem:
            first = problem.errors(include_url=False, include_input=False, include_context=False)[0]
            raise ValueError(
                f"the checkpoint of step {found.step:,} does not say its {key} as it should "
                f"({first['msg'].removeprefix('Input ')}); start another run with output=…"
            ) from None
    return found.metadata


def check_lengths(found: Checkpoint, lengths: Mapping[str, int]) -> None:
    """Refuses a checkpoint whose objective has another number of rows than `lengths` (`Objective.shards`) says.

    Rows can be shared out anew, but neither made up nor left out: a queue with per_process=true is as long as there are
    processes.
    """
    writers = found.metadata["processes"]
    for name, length in lengths.items():
        before = found.shards.get(f"objective.{name}", length)
        if before != length:
            raise ValueError(
                f"objective.{name} has {before:,} rows in the checkpoint, which {writers} processes wrote, and has "
                f"{length:,} on the {distributed.world_size()} of now: a queue with objective.per_process=true grows "
                f"with them and cannot be shared out anew; go on with {writers} processes, or start another run with "
                "output=…"
            )


def check_schedule(found: Checkpoint, recipe: Recipe, steps_per_epoch: int) -> str | None:
    """What to say of a schedule that is not the one of the checkpoint; None where it is.

    A run whose schedule had come to its end, but that is not marked as finished, is extended without being asked to.

    Raises:
        ValueError: naming the difference, unless extend=true asks for it; if nothing is left to do in the new budget.
    """
    before, now = found.metadata["recipe"], recipe.model_dump(mode="json")
    changed = differences(before, now, FREE | LOCATIONS)
    if not SCHEDULE & changed.keys():
        return None
    old, new = validate(TrainSettings, before["train"]), recipe.train
    step, seconds = found.step, found.metadata["seconds"]
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


def record_settings(folder: Path, recipe: Recipe, step: int) -> str | None:
    """Writes into config.yaml the recipe that is resumed at a step, with what has changed, which it returns if any."""
    file = folder / CONFIG
    before = load(Recipe, file)
    changed = differences(before.model_dump(mode="json"), recipe.model_dump(mode="json"), OF_A_START)
    if not changed:
        return None
    lines = list(takewhile(lambda line: line.startswith("#"), read_text(file, MEBIBYTE).splitlines()))
    lines.append(f"# from step {step:,} on ({time.strftime('%Y-%m-%d')}): {_in_words(changed)}")
    kept = recipe.model_copy(update={"resume": before.resume, "elastic": before.elastic, "extend": False})
    write_atomic(file, ["\n".join([*lines, dump_yaml(kept)]).encode()])
    return _in_words(changed)


EXTEND = "add extend=true to go on with the new schedule, or start another with output=…"


def check_settings(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    free: Collection[str],
    way_out: str = "start another with output=…",
) -> None:
    """Refuses to resume with other settings, as JSON values, than before, but for the dotted keys in `free`.

    Raises:
        ValueError: naming each difference, and as the `way_out` what to do instead.
    """
    if changed := differences(before, now, free):
        raise ValueError(f"a run goes on as it was begun, but {_in_words(changed)}; {way_out}")


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The settings that are not equal, by their dotted keys, as they were and as they are; without those in `free`."""
    old, new = _flat(before), _flat(now)
    keys = [key for key in {**old, **new} if key not in free and old.get(key) != new.get(key)]
    return {key: (old.get(key), new.get(key)) for key in keys}


def moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """The keys of `LOCATIONS` under which there is a location in both trees, so that its content tells."""
    sources = [tree.get("values") for tree in (before, now)]
    files = all(isinstance(source, str) and os.path.isabs(source) for source in sources)
    return LOCATIONS if files else LOCATIONS - {"values"}


def _in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} was {_as_given(old)} and is {_as_given(new)}" for key, (old, new) in changed.items())


def _as_given(value: Any) -> str:
    """A value as it is written in a recipe; what would move a terminal's cursor is spelled out."""
    return json.dumps(value).strip('"')


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
