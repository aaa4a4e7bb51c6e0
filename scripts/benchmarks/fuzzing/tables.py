"""Tables about images: sound samples, and what reads a damaged one."""

import json
from pathlib import Path

import torch

from manyviews.data import InMemory, read_relations
from manyviews.data.labels import read_labels, values_of

NAMES = [f"{number}.png" for number in range(6)]


def labels() -> list[bytes]:
    """Returns sound tables of labels."""
    return [b"name,label\n" + "".join(f"{name},{'ab'[index % 2]}\n" for index, name in enumerate(NAMES)).encode()]


def check_labels(folder: Path, content: bytes) -> None:
    """Reads a table of labels."""
    read_labels(written(folder / "x.csv", content), NAMES)


def values() -> list[bytes]:
    """Returns sound tables of continuous labels."""
    return [b"name,x,y\n" + "".join(f"{name},{index},{index / 2}\n" for index, name in enumerate(NAMES)).encode()]


def check_values(folder: Path, content: bytes) -> None:
    """Reads a table of continuous labels."""
    images = InMemory(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), NAMES, None, (), "0" * 64)
    values_of(images, str(written(folder / "x.csv", content)))


def relations() -> list[bytes]:
    """Returns sound files of every kind of relations."""
    a, b, c, d, *_ = NAMES
    tables = {
        "a,b,same": [(a, b, "1"), (c, a, "0.5"), (b, a, "0")],
        "anchor,positive,negative": [(a, b, c), (a, c, b), (d, a, b)],
        "query,item,relevance": [(a, b, "2.5"), (a, c, "0"), (b, d, "1e3")],
        "query,items": [(a, b, c, d), (b, a)],
        "name,set": [(a, "x"), (b, "y"), (c, "x")],
    }
    texts = ["\n".join([header, *(",".join(line) for line in lines)]) for header, lines in tables.items()]
    objects = [{"a": a, "b": b, "same": True}, {"a": a, "b": c, "same": 0.25}], [{"query": a, "items": [b, c]}]
    return [text.encode() for text in [*texts, *("\n".join(map(json.dumps, lines)) for lines in objects)]]


def check_relations(folder: Path, content: bytes) -> None:
    """Reads a file of relations."""
    read_relations(written(folder / f"x.{'jsonl' if content[:1] == b'{' else 'csv'}", content), NAMES)


def written(file: Path, content: bytes) -> Path:
    """Writes a file and returns its path."""
    file.write_bytes(content)
    return file
