"""Features for evaluators: from a cache that is still true, or else computed and kept there."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from manyviews.data import Images
from manyviews.features import encoding, store
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.layers import BACKBONE, Layers, OneLayer, layers_of, widths_of
from manyviews.features.settings import EncodeSettings
from manyviews.features.store_rows import Part, fill, key_of
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.plural import plural


def features_of(
    opened: PretrainedBackbone,
    images: Images,
    settings: EncodeSettings,
    console: Console,
    *,
    layer: str = BACKBONE,
    untrained: bool = False,
    cache: Path | None = None,
    also: Path | None = None,
) -> Tensor:
    """The features of all images by one layer: float32 [images, width] on the CPU, the same on every process.

    They come from a sub-folder of the cache if they are there and still true: the weights, the input, the images'
    fingerprint and the precision are compared. Otherwise they are computed over all processes and kept there, in place
    of those that are true no longer; what comes from there is mapped into memory, not read. A cache that cannot be
    written to, or that another process is writing to, is done without.

    Args:
        opened: a run or a timm model.
        images: what is encoded.
        settings: how it is encoded; its data are not looked at.
        console: told how far it has come.
        layer: as in `Layers`.
        untrained: the backbone as it was before its first step, a baseline.
        cache: the folder of all cached features, RUN/features for example; None: none are kept.
        also: another such folder, which is read alone.

    Raises:
        ValueError: for an unknown layer, or features that are not finite.
    """
    layers, origin = layers_of(opened, (layer,), untrained=untrained)
    said = f"encoding {plural(len(images), 'image')}: {'random weights' if untrained else opened.name}"
    if cache is not None or also is not None:
        part = Part("images", images, 0)
        key = key_of(opened, origin, settings.precision, [part], widths_of(layers, opened.blank()))
        name = f"{layer}{'-untrained' * untrained}-{images.fingerprint[:16]}"
        for there in dict.fromkeys(filter(None, (cache, also))):
            if (rows := _complete(there / name, key, layer)) is not None:
                return rows
    if cache is not None:
        try:
            return _kept(cache / name, key, opened, layers, part, settings, console, said)
        except (OSError, ValueError) as problem:
            console.warn(f"features are not kept: {problem}")
    console.say(said)
    return encoding.extract(
        OneLayer(layers),
        images,
        prepare=opened.prepare,
        device=layers.device,
        batch_size=settings.batch_size,
        precision=settings.precision,
        workers=settings.workers,
    )


def _complete(folder: Path, key: Mapping[str, Any], layer: str) -> Tensor | None:
    """The rows of complete features of a key, without a lock, for a folder may be read that cannot be written."""
    rows: Tensor | None = None
    with suppress(OSError, ValueError):
        if store.state(folder, key) == "complete":
            rows = store.mapped(folder / f"{layer}.npy")
    return None if distributed.any_over_ranks(rows is None) else rows


def _kept(
    folder: Path,
    key: Mapping[str, Any],
    opened: PretrainedBackbone,
    layers: Layers,
    part: Part,
    settings: EncodeSettings,
    console: Console,
    said: str,
) -> Tensor:
    """The rows of a folder, computed where they are not complete; raises where they cannot be written."""
    # What lies above the cache is the run's.
    root, file = folder.parent.parent, f"{layers.layers[0]}.npy"
    with store.held(folder, key, replace=True, root=root) as complete:
        if not complete:
            console.say(said)
            fill(folder, layers, [part], prepare=opened.prepare, settings=settings, console=console, root=root)
            if count := len(store.remarks(folder)):
                # Some are those of a grey square: used now, and computed anew when the files can be read.
                console.warn(
                    f"{plural(count, 'image')} could not be read now, and stand as grey; so these features are not kept"
                )
                rows = store.mapped(folder / store.PARTIAL / file)
                distributed.barrier()
                if distributed.rank() == 0:
                    store.remove(folder, root)
                return rows
            with raise_on_all_ranks():
                if distributed.rank() == 0:
                    store.finish(folder, [file], key, (), root)
        return store.mapped(folder / file)
