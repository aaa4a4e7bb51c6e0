"""Whether a run may go on from its folder: the same settings, the same images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive.config import load
from contrastive.data import Images
from contrastive.progress import Teller
from contrastive.recipe import Recipe
from contrastive.run import CONFIG, Checkpoint, newest_checkpoint


def resumable(recipe: Recipe, folder: Path, images: Images, processes: int, teller: Teller) -> Checkpoint | None:
    """The newest checkpoint of a run, if what it was made with is what goes on now; None: there is none yet.

    Raises:
        ValueError: if a setting that matters, or the images, are not those that the run was begun with.
    """
    found, damaged = newest_checkpoint(folder / "checkpoints")
    for line in damaged:
        teller.warn(line)
    if not (folder / CONFIG).exists():
        return found
    differences = _differences(load(Recipe, folder / CONFIG), recipe)
    if differences:
        raise ValueError(f"a run goes on as it was begun, but {'; '.join(differences)}; start another with output=…")
    if found is not None and found.facts["images"] != images.fingerprint:
        raise ValueError(
            "the images are not those that the run was begun with (files were added, removed or changed), so that "
            "ids would mean other images; start another run with output=…"
        )
    if found is not None and found.facts["processes"] != processes:
        teller.warn(f"begun on {found.facts['processes']} processes, goes on with {processes}: the same global batch")
    return found


def _differences(before: Recipe, now: Recipe) -> list[str]:
    """What the two recipes differ in, beyond the keys that do not change what is learned."""
    free = {"output", "resume", "train.epochs", "train.minutes"}
    free |= {
        f"train.{key}" for key in ("workers", "threads", "log_every", "monitor", "save_minutes", "keep", "preview")
    }
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    keys = [key for key in {**old, **new} if key not in free and old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key)} and is {new.get(key)}" for key in keys]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
