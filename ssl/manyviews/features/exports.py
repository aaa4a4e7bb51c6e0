"""Writes features in the formats of other tools: a parquet table, and fvecs for faiss."""

import importlib.util
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

Rows = np.ndarray[Any, np.dtype[np.float32]]
ROWS_AT_ONCE = 8_192
TABLE = "features.parquet"


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
    """Writes a table with one row per image: split, id, name, label, and each layer as a list of fixed size.

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
    """Writes rows, scaled to unit length, as fvecs: inner products are then cosines; a row of zeros stays zero.

    Each vector is its dimension as int32, then its values as float32, little endian (the format of the TEXMEX
    corpora); `faiss.contrib.vecs_io.fvecs_read` reads it.
    """
    with file.open("wb") as content:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            values = rows[start : start + ROWS_AT_ONCE].astype("<f4")
            values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
            dims = np.full((len(values), 1), values.shape[1], "<i4").view("<f4")
            np.concatenate([dims, values], axis=1).tofile(content)
