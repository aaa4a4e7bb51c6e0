"""Features in the formats of other tools: a parquet table, and vectors that faiss reads."""

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
    """Raises a ValueError where pyarrow is missing, which writes the table."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("parquet=true needs pyarrow: pip install 'manyviews[parquet]'")


def write_parquet(
    file: Path,
    layers: Mapping[str, Rows],
    entries: Iterator[tuple[str, int, str]],
    labels: np.ndarray[Any, np.dtype[np.int64]] | None,
) -> None:
    """Writes a table with one row per image: split, id, name, label, and each layer as a list of fixed size.

    Rows of a few megabytes are held at a time.

    Args:
        file: is replaced if it exists.
        layers: [images, width] by the name of the column.
        entries: for each image its split, id and name.
        labels: int64 [images], -1 where an image has none; without, the column is null.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = [pa.field(name, pa.list_(pa.float32(), rows.shape[1])) for name, rows in layers.items()]
    plain = [("split", pa.string()), ("id", pa.int64()), ("name", pa.string()), ("label", pa.int64())]
    schema = pa.schema([*(pa.field(name, kind) for name, kind in plain), *lists])
    total = len(next(iter(layers.values())))
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, total, ROWS_AT_ONCE):
            taken = list(islice(entries, ROWS_AT_ONCE))
            stop = start + len(taken)
            known = np.full(len(taken), -1) if labels is None else labels[start:stop]
            columns = [
                pa.array([split for split, _, _ in taken], pa.string()),
                pa.array([number for _, number, _ in taken], pa.int64()),
                pa.array([_valid(name) for _, _, name in taken], pa.string()),
                pa.array(known, pa.int64(), mask=known < 0),
            ]
            for rows in layers.values():
                values = pa.array(np.ascontiguousarray(rows[start:stop]).reshape(-1))
                columns.append(pa.FixedSizeListArray.from_arrays(values, rows.shape[1]))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def write_vectors(file: Path, rows: Rows) -> None:
    """Writes rows of unit length in the format fvecs, for an index of inner products, which are then cosines.

    Each vector is its dimension as int32, then its values as float32, little endian (the format of the TEXMEX
    corpora); `faiss.contrib.vecs_io.fvecs_read` reads it. A row of zeros stays one.
    """
    with file.open("wb") as content:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            values = rows[start : start + ROWS_AT_ONCE].astype("<f4")
            values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
            dims = np.full((len(values), 1), values.shape[1], "<i4").view("<f4")
            np.concatenate([dims, values], axis=1).tofile(content)


def _valid(name: str) -> str:
    """A name that is valid UTF-8, as a file name need not be."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
