"""The command `extract`: writes features of images by a pretrained backbone to files."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from manyviews.config import as_list
from manyviews.data import AnyData, Split, background_of
from manyviews.features import store
from manyviews.features.backbone import PretrainedBackbone, open_model
from manyviews.features.encoding import EncodeSettings, images_of
from manyviews.features.layers import BACKBONE, layers_of, widths_of
from manyviews.features.store_rows import Part, entries, fill, key_of, labels_of
from manyviews.system import distributed
from manyviews.system.arrays import mapped_array
from manyviews.system.console import Console
from manyviews.system.disk import check_writable
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import start
from manyviews.system.versions import versions
from manyviews.system.writing import make_folder, replacing

LABELS, TABLE = "labels.npy", "features.parquet"
ROWS_AT_ONCE = 8_192
"""Rows in memory while a file is exported."""

Rows = np.ndarray[Any, np.dtype[np.float32]]


class ExtractSettings(EncodeSettings):
    """Settings of `extract`."""

    output: str
    """Output folder. Interrupted extraction is resumed there; complete features are left as they are."""
    overwrite: bool = False
    """Replace other features in the output folder."""
    split: Literal["all", "train", "test"] = "all"
    """Images to extract from; all: the training images, then the held-out ones."""
    layers: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field((BACKBONE,), min_length=1)
    """Layers, separated by commas: backbone; of a run projector and embedding, the input of its objective (the output
    of the predictor if there is one, else of the projector); or a module of the backbone by its name, whose maps are
    averaged: layer3, blocks.5."""
    pretrained: bool | None = None
    """For a timm name: true for its published weights (downloaded), false for random ones."""
    size: int | None = Field(None, ge=1, le=4096)
    """Side of the backbone's input in pixels; null: that of training."""
    parquet: bool = False
    """Write features.parquet too: split, id, name, label and a column for each layer (needs pyarrow)."""
    faiss: bool = False
    """Write LAYER.fvecs too: vectors of unit length, as faiss reads them."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of each process on the CPU; null: the cores divided among the processes."""


def extract(model: str | Path, settings: ExtractSettings) -> Path:
    """Writes features by a run's or timm model's backbone, over all ranks; returns the folder.

    LAYER.npy is float32 [images, width] for each layer, labels.npy int64 [images] with -1 for images without a label
    (absent if none has one), and manifest.json has their provenance and the split, id and name of each row. Interrupted
    extraction is resumed; complete features are left as they are.

    Raises:
        ValueError: the model, the images or a layer do not exist, the output has other files, or the disk is full;
            before anything is written.
    """
    accelerator = start(None, "fp32", settings.threads, trains=False)
    console = Console(quiet=not accelerator.is_main_process)
    output = Path(settings.output).expanduser()
    check_writable(output)
    if output.is_dir() and not store.ours(output) and any(output.iterdir()):
        raise ValueError(f"output={output} holds other files; name a folder that does not exist yet")
    if settings.parquet:
        check_parquet()
    opened = open_model(str(model), pretrained=settings.pretrained, size=settings.size)
    layers, origin = layers_of(opened, settings.layers)
    widths = widths_of(layers, opened.blank())
    split = images_of(opened, settings, console)
    parts = _parts(split, settings.split)
    key = key_of(opened, origin, settings.precision, parts, widths)
    wanted = [TABLE] * settings.parquet + [f"{name}.fvecs" for name in settings.layers] * settings.faiss
    with store.held(output, key, replace=settings.overwrite, copies=1 + settings.parquet + settings.faiss) as complete:
        if complete and all((output / name).is_file() for name in wanted):
            console.say(f"{output} is up to date")
            return output
        if not complete:
            fill(output, layers, parts, view=opened.view, settings=settings, console=console)
        with raise_on_all_ranks():
            if distributed.rank() == 0:
                _publish(output, key, opened, settings.data_of(opened), split, parts, wanted)
    for layer in key["layers"].values():
        rows, width = layer["shape"]
        console.say(f"{rows:,} × {width:,} features: {output / layer['file']}")
    return output


def _parts(split: Split, chosen: str) -> list[Part]:
    """The chosen parts of a split, one after the other."""
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
    data: AnyData | None,
    split: Split,
    parts: Sequence[Part],
    wanted: Sequence[str],
) -> None:
    """Writes labels, exports and, last, the manifest of complete rows."""
    partial = output / store.PARTIAL
    make_folder(partial, output)
    before = store.read_manifest(output) or {}
    unreadable = before.get("unreadable", [list(entry) for entry in split.unreadable] + store.remarks(output))
    files = [layer["file"] for layer in key["layers"].values()]
    labels = labels_of(parts)
    if labels is not None:
        with replacing(partial / LABELS, output) as (_, file):
            np.save(file, labels)
        files.append(LABELS)
    paths = {name: [partial / layer["file"], output / layer["file"]] for name, layer in key["layers"].items()}
    rows = {name: mapped_array(next(filter(Path.exists, either))) for name, either in paths.items()}
    if TABLE in wanted:
        with replacing(partial / TABLE, output) as (path, _):
            write_parquet(path, rows, entries(parts), labels)
    for name, values in rows.items():
        if f"{name}.fvecs" in wanted:
            with replacing(partial / f"{name}.fvecs", output) as (path, _):
                write_vectors(path, values)
    files += [*wanted, *before.get("files", ())]
    manifest = {
        "model": opened.name if opened.folder is None else str(opened.folder.resolve()),
        **key,
        "background": background_of(data),
        "classes": list(split.train.classes),
        "unreadable": unreadable,
        "versions": versions(),
        "columns": ["split", "id", "name"],
    }
    store.finish(output, list(dict.fromkeys(files)), manifest, entries(parts))


def check_parquet() -> None:
    """Raises a ValueError if pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("parquet=true needs pyarrow: pip install 'manyviews[parquet]'")


def write_parquet(
    file: Path,
    layers: Mapping[str, Rows],
    entries: Iterator[tuple[str, int, str]],
    labels: np.ndarray[Any, np.dtype[np.int64]] | None,
) -> None:
    """Writes a table of split, id, name, label, and each layer as a list of fixed size.

    `layers` are [images, width] by column, `entries` the split, id and name of each image, and `labels` int64 [images],
    -1 for none; without them the column is null. A few megabytes are in memory at a time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = [pa.field(name, pa.list_(pa.float32(), rows.shape[1])) for name, rows in layers.items()]
    plain = [("split", pa.string()), ("id", pa.int64()), ("name", pa.string()), ("label", pa.int64())]
    schema = pa.schema([*(pa.field(name, kind) for name, kind in plain), *lists])
    total = len(next(iter(layers.values())))
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, total, ROWS_AT_ONCE):
            splits, ids, names = zip(*islice(entries, ROWS_AT_ONCE), strict=True)
            stop = start + len(ids)
            known = np.full(len(ids), -1) if labels is None else labels[start:stop]
            columns = [
                pa.array(splits, pa.string()),
                pa.array(ids, pa.int64()),
                # A file name need not be valid UTF-8.
                pa.array([name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]),
                pa.array(known, pa.int64(), mask=known < 0),
            ]
            for rows in layers.values():
                values = pa.array(np.ascontiguousarray(rows[start:stop]).reshape(-1))
                columns.append(pa.FixedSizeListArray.from_arrays(values, rows.shape[1]))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def write_vectors(file: Path, rows: Rows) -> None:
    """Writes rows, scaled to unit length, as fvecs; a row of zeros stays zero.

    Each vector is its dimension as int32, then its values as float32, little endian (the format of the TEXMEX
    corpora); `faiss.contrib.vecs_io.fvecs_read` reads it.
    """
    with file.open("wb") as content:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            values = rows[start : start + ROWS_AT_ONCE].astype("<f4")
            values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
            dims = np.full((len(values), 1), values.shape[1], "<i4").view("<f4")
            np.concatenate([dims, values], axis=1).tofile(content)
