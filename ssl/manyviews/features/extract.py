"""Features of images, computed once by a backbone that has learned something, and kept as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from manyviews.config import as_list
from manyviews.data import Data, Split, background_of
from manyviews.features import exports, store
from manyviews.features.backbone import PretrainedBackbone, open_model
from manyviews.features.layers import BACKBONE, layers_of, widths_of
from manyviews.features.settings import EncodeSettings, images_of
from manyviews.features.store_rows import Part, entries, fill, key_of, labels_of
from manyviews.system import distributed
from manyviews.system.arrays import mapped_array
from manyviews.system.console import Console
from manyviews.system.disk import check_writable
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import start
from manyviews.system.versions import versions
from manyviews.system.writing import make_folder, replacing

LABELS = "labels.npy"


class ExtractSettings(EncodeSettings):
    """What features are extracted from, and where they go."""

    output: str
    """The folder that is written. Where the same features were begun they go on, and where they are complete nothing is
    done."""
    overwrite: bool = False
    """Replace what other features the output folder holds."""
    split: Literal["all", "train", "test"] = "all"
    """Which of the images; all: the training images, then the held-out ones."""
    layers: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field((BACKBONE,), min_length=1)
    """What is kept, one or several with commas: backbone; of a run projector and embedding, which its objective
    compares (the predictor's output where there is a predictor, else the projector's); or a module of the backbone by
    its name, whose maps are averaged: layer3, blocks.5."""
    pretrained: bool | None = None
    """For a timm name: true for its published weights (downloaded), false for random ones."""
    size: int | None = Field(None, ge=1, le=4096)
    """Side of the square that the backbone sees, in pixels; null: what it was trained on."""
    parquet: bool = False
    """Write features.parquet too: split, id, name, label and a column for each layer (needs pyarrow)."""
    faiss: bool = False
    """Write LAYER.fvecs too: vectors of unit length, as faiss reads them."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of each process on the CPU; null: the cores divided among the processes."""


def extract(given: str | Path, settings: ExtractSettings) -> Path:
    """Writes features of images by a run's or a timm model's backbone, over all processes; returns the folder.

    LAYER.npy is float32 [images, width] for each layer, labels.npy int64 [images] with -1 where an image has none
    (absent where none has one), and manifest.json tells where they come from, and of each row its split, id and name.
    What was interrupted goes on where it was, what is complete and still true is left as it is.

    Raises:
        ValueError: if the model, the images or a layer cannot be had, the output holds other things, or the disk is
            full; before anything is written.
    """
    accelerator = start(None, "fp32", settings.threads, trains=False)
    console = Console(quiet=not accelerator.is_main_process)
    output = Path(settings.output).expanduser()
    check_place(output)
    if settings.parquet:
        exports.check_parquet()
    opened = open_model(str(given), pretrained=settings.pretrained, size=settings.size)
    layers, origin = layers_of(opened, settings.layers)
    widths = widths_of(layers, opened.blank())
    split = images_of(opened, settings, console)
    parts = _parts(split, settings.split)
    key = key_of(opened, origin, settings.precision, parts, widths)
    wanted = [exports.TABLE] * settings.parquet + [f"{name}.fvecs" for name in settings.layers] * settings.faiss
    with store.held(output, key, replace=settings.overwrite, copies=1 + settings.parquet + settings.faiss) as complete:
        if complete and all((output / name).is_file() for name in wanted):
            console.say(f"{output} is up to date")
            return output
        if not complete:
            fill(output, layers, parts, prepare=opened.prepare, settings=settings, console=console)
        with raise_on_all_ranks():
            if distributed.rank() == 0:
                _publish(output, key, opened, settings.data_of(opened), split, parts, wanted)
    for layer in key["layers"].values():
        rows, width = layer["shape"]
        console.say(f"{rows:,} × {width:,} features: {output / layer['file']}")
    return output


def check_place(output: Path) -> None:
    """Checks that features may be written to a folder, before anything is done.

    Raises:
        ValueError: if it is a file, holds other things than features, or may not be written to.
    """
    check_writable(output)
    if output.is_dir() and not store.ours(output) and any(output.iterdir()):
        raise ValueError(f"output={output} holds other files; name a folder that does not exist yet")


def _parts(split: Split, chosen: str) -> list[Part]:
    """The parts of a split that were chosen, one after the other."""
    parts: list[Part] = []
    for name, images in (("train", split.train), ("test", split.test)):
        if images is not None and chosen in ("all", name):
            first = parts[-1].first + len(parts[-1].images) if parts else 0
            parts.append(Part(name, images, first))
    if not parts:
        raise ValueError(f"split={chosen}: these images have no held-out part; use split=all")
    return parts


def _publish(
    output: Path,
    key: Mapping[str, Any],
    opened: PretrainedBackbone,
    data: Data | None,
    split: Split,
    parts: Sequence[Part],
    wanted: Sequence[str],
) -> None:
    """Writes what stands beside complete rows: labels, exports and, last, the manifest."""
    place = output / store.PARTIAL
    make_folder(place, output)
    unreadable = [list(entry) for entry in split.unreadable] + store.remarks(output)
    before = store.described(output)
    if before is not None:
        unreadable = before["unreadable"]
    files = [layer["file"] for layer in key["layers"].values()]
    labels = labels_of(parts)
    if labels is not None:
        with replacing(place / LABELS, output) as (_, file):
            np.save(file, labels)
        files.append(LABELS)
    there = {name: [place / layer["file"], output / layer["file"]] for name, layer in key["layers"].items()}
    rows = {name: mapped_array(next(filter(Path.exists, files))) for name, files in there.items()}
    if exports.TABLE in wanted:
        with replacing(place / exports.TABLE, output) as (path, _):
            exports.write_parquet(path, rows, entries(parts), labels)
    for name, values in rows.items():
        if f"{name}.fvecs" in wanted:
            with replacing(place / f"{name}.fvecs", output) as (path, _):
                exports.write_vectors(path, values)
    files += dict.fromkeys([*wanted, *((before or {}).get("files", ()))])
    manifest = {
        "model": opened.name if opened.folder is None else str(opened.folder.resolve()),
        **key,
        # Files are decoded to squares first, which "input" tells what is made of.
        "decoded": {"size": split.train.size, "interpolation": "bicubic", "background": background_of(data)},
        "classes": list(split.train.classes),
        "unreadable": unreadable,
        "versions": versions(),
        "columns": ["split", "id", "name"],
    }
    store.finish(output, list(dict.fromkeys(files)), manifest, entries(parts))
