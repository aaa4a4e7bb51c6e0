"""Features for evaluators: read from an up-to-date cache, or computed and written there."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from manyviews.data import Images
from manyviews.features import encoding, store
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.encoding import EncodeSettings
from manyviews.features.layers import BACKBONE, OneLayer, layers_of, widths_of
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
    """Features of all images by one layer: float32 [images, width] on the CPU of every rank.

    Cached features are mapped into memory if their weights, input, fingerprint of the images and precision are these.
    Otherwise they are computed over all ranks and replace those in the cache; a cache that cannot be written, or that
    another program is writing, is not used, with a warning.

    `cache` is the folder of all cached features, such as RUN/features, and `also` another one that is only read. The
    data of `settings` are not used. `untrained`: by the backbone before its first step, a baseline.
    """
    layers, origin = layers_of(opened, (layer,), untrained=untrained)
    message = f"encoding {plural(len(images), 'image')}: {'random weights' if untrained else opened.name}"
    if cache is not None or also is not None:
        part = Part("images", images, 0)
        key = key_of(opened, origin, settings.precision, [part], widths_of(layers, opened.blank()))
        name = f"{layer}{'-untrained' * untrained}-{images.fingerprint[:16]}"
        for parent in dict.fromkeys(filter(None, (cache, also))):
            if (complete_rows := _complete(parent / name, key, layer)) is not None:
                return complete_rows
    if cache is not None:
        folder, file, root = cache / name, f"{layer}.npy", cache.parent
        try:
            with store.held(folder, key, replace=True, root=root) as complete:
                if not complete:
                    console.say(message)
                    fill(folder, layers, [part], view=opened.view, settings=settings, console=console, root=root)
                    # Read on all ranks before rank 0 moves the files.
                    with raise_on_all_ranks():
                        count = len(store.remarks(folder))
                    if count:
                        # Used now, and computed again once the files can be read.
                        unread = plural(count, "image")
                        console.warn(f"{unread} could not be read and count as grey; these features are not kept")
                        rows = store.mapped(folder / store.PARTIAL / file)
                        distributed.barrier()
                        if distributed.rank() == 0:
                            store.remove(folder, root)
                        return rows
                    with raise_on_all_ranks():
                        if distributed.rank() == 0:
                            store.finish(folder, [file], key, (), root)
                with raise_on_all_ranks():
                    return store.mapped(folder / file)
        except (OSError, ValueError) as problem:
            console.warn(f"features are not kept: {problem}")
    console.say(message)
    return encoding.extract(
        OneLayer(layers),
        images,
        view=opened.view,
        device=layers.device,
        batch_size=settings.batch_size,
        precision=settings.precision,
        workers=settings.workers,
    )


def _complete(folder: Path, key: Mapping[str, Any], layer: str) -> Tensor | None:
    """Rows of complete features with this key, or None; unlocked: the folder may be read-only."""
    rows: Tensor | None = None
    with suppress(OSError, ValueError):
        if store.state(folder, key) == "complete":
            rows = store.mapped(folder / f"{layer}.npy")
    return None if distributed.any_over_ranks(rows is None) else rows
