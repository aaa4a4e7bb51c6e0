from pathlib import Path

import numpy as np
import pytest

from manyviews.features import extract as exports

ROWS = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
ROWS[7] = 0


def unit() -> np.ndarray:
    norms = np.linalg.norm(ROWS, axis=1, keepdims=True)
    return ROWS / np.where(norms == 0, 1, norms)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "ROWS_AT_ONCE", 10)


def test_vectors_are_written_in_unit_length_and_read_back(tmp_path: Path) -> None:
    before = ROWS.copy()
    exports.write_vectors(tmp_path / "x.fvecs", ROWS)
    assert (before == ROWS).all()
    content = np.fromfile(tmp_path / "x.fvecs", "<i4").reshape(23, 6)
    assert (content[:, 0] == 5).all()
    np.testing.assert_allclose(content[:, 1:].copy().view("<f4"), unit(), atol=1e-6)


def test_faiss_finds_by_the_vectors_what_cosines_say(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    reader = pytest.importorskip("faiss.contrib.vecs_io")
    exports.write_vectors(tmp_path / "x.fvecs", ROWS)
    vectors = reader.fvecs_read(str(tmp_path / "x.fvecs"))
    index = faiss.IndexFlatIP(5)
    index.add(np.ascontiguousarray(vectors))
    cosines, found = index.search(np.ascontiguousarray(vectors), 3)
    expected = unit() @ unit().T
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :3], atol=1e-6)
    assert all(found[row, 0] == row for row in range(23) if row != 7)


def test_the_table_is_read_back_row_by_row(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    entries = [("train", index, f"bild \udcfc {index}.png") for index in range(23)]
    labels = np.arange(23) % 4 - 1
    layers = {"backbone": ROWS, "layer3": ROWS[:, :2]}
    exports.write_parquet(tmp_path / "x.parquet", layers, iter(entries), labels)
    table = pq.read_table(tmp_path / "x.parquet").to_pydict()
    assert list(table) == ["split", "id", "name", "label", "backbone", "layer3"]
    np.testing.assert_array_equal(np.array(table["backbone"], np.float32), ROWS)
    np.testing.assert_array_equal(np.array(table["layer3"], np.float32), ROWS[:, :2])
    assert table["id"] == list(range(23))
    assert table["label"] == [None if label < 0 else label for label in labels]
    assert table["name"][3] == "bild � 3.png"
    assert pq.ParquetFile(tmp_path / "x.parquet").schema_arrow.field("backbone").type.list_size == 5
    exports.write_parquet(tmp_path / "y.parquet", {"backbone": ROWS}, iter(entries), None)
    assert pq.read_table(tmp_path / "y.parquet").column("label").null_count == 23


def test_a_missing_pyarrow_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'manyviews\[parquet\]'"):
        exports.check_parquet()
