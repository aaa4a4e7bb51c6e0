"""Classes from a CSV file in place of sub-folders."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyviews.config import load
from manyviews.data import Folder, Split
from manyviews.data.labels import read_labels
from manyviews.recipe import Recipe

NAMES = [f"{number}.png" for number in range(12)]


def images(folder: Path, names: list[str]) -> Path:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * index, np.uint8)).save(folder / name)
    return folder


def table(path: Path, *lines: str, header: str = "name,label") -> Path:
    path.write_text("".join(f"{line}\n" for line in (header, *lines)))
    return path


def build(folder: Path, labels: Path | None, **settings: object) -> Split:
    return Folder(path=str(folder), labels=labels and str(labels), size=8, **settings).build()


def named(split: Split) -> dict[str, str]:
    """The class of each labelled image by name, over both parts."""
    parts = [part for part in (split.train, split.test) if part is not None]
    pairs = [(name, part, label) for part in parts for name, label in zip(part.names, part.labels, strict=True)]
    return {name: part.classes[label] for name, part, label in pairs if label >= 0}


def test_a_table_names_the_classes_of_a_flat_folder_and_the_hold_out_goes_by_them(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", NAMES)
    given = {name: "cat" if index % 2 else "a dog, old" for index, name in enumerate(NAMES[:10])}
    labels = table(tmp_path / "l.csv", *(f'{name},"{label}",ignored' for name, label in reversed(given.items())), "")
    split = build(folder, labels, holdout=0.4)
    assert split.train.classes == ("a dog, old", "cat")
    assert split.test is not None
    assert split.test.classes == split.train.classes
    assert named(split) == given
    assert split.test.labels.bincount().tolist() == [2, 2]
    assert split.train.labels.tolist().count(-1) == 2
    again = build(folder, labels, holdout=0.4)
    assert list(again.test.names) == list(split.test.names)


def test_a_table_rules_over_sub_folders(tmp_path: Path) -> None:
    folder = images(tmp_path, [f"{place}/{number}.png" for place in ("x", "y") for number in range(4)])
    labels = table(
        tmp_path / "labels.csv", *(f"{place}/{number}.png,{number % 2}" for place in "xy" for number in (0, 1))
    )
    split = build(folder, labels, holdout=0)
    assert split.train.classes == ("0", "1")
    assert split.train.labels.tolist() == [0, 1, -1, -1, 0, 1, -1, -1]
    assert build(folder, None).train.classes == ("x", "y")


def test_a_table_labels_train_and_the_held_out_folder_beside_it(tmp_path: Path) -> None:
    folder = images(tmp_path, [f"{place}/{number}.png" for place in ("train", "val") for number in range(4)])
    lines = [
        f"{place}/{number}.png,{'even' if number % 2 == 0 else 'odd'}"
        for place in ("train", "val")
        for number in (0, 1)
    ]
    split = build(folder, table(tmp_path / "labels.csv", *lines))
    assert split.train.labels.tolist() == [0, 1, -1, -1]
    assert split.test.labels.tolist() == [0, 1, -1, -1]
    only_train = build(folder, table(tmp_path / "train.csv", *lines[:2], "train/2.png,even"), holdout=0.5)
    assert all(name.startswith("train/") for name in only_train.test.names)


def test_a_held_out_folder_elsewhere_keeps_its_sub_folders_as_classes(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", NAMES[:4])
    test = images(tmp_path / "test", ["odd/1.png", "even/2.png"])
    lines = [f"{name},{'even' if index % 2 == 0 else 'odd'}" for index, name in enumerate(NAMES[:3])]
    split = build(folder, table(tmp_path / "labels.csv", *lines), test=str(test))
    assert split.train.labels.tolist() == [0, 1, 0, -1]
    assert [split.test.classes[label] for label in split.test.labels] == ["even", "odd"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0.png,a", "00.png,b"], r"line 3: '00.png' is not among the 12 images; did you mean 0.png"),
        (["0.png,a", "", "0.png,b"], r"line 4: 0.png stands in line 2 already"),
        (["0.png,a", "1.png, "], r"line 3: 1.png has an empty label"),
        (["0.png"], r"line 2: one column"),
        ([], r"labels no image"),
    ],
)
def test_a_mistake_in_the_table_is_named_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    folder = images(tmp_path / "images", NAMES)
    with pytest.raises(ValueError, match=message):
        build(folder, table(tmp_path / "labels.csv", *lines))


@pytest.mark.parametrize("header", ["name{}label\n", "file{}class name\n", ""])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_commas_semicolons_and_tabs_with_a_header_or_without_are_read_alike(
    tmp_path: Path, delimiter: str, mark: str, header: str
) -> None:
    names = ["a,b/1;2.png", "a,b/3.png", "4.png"]
    file = tmp_path / "labels.csv"
    with file.open("w", encoding="utf-8", newline="") as content:
        content.write(mark + header.format(delimiter))
        csv.writer(content, delimiter=delimiter).writerows(zip(names, ["x, y", "z", "x, y"], strict=True))
    assert read_labels(file, names) == {names[0]: "x, y", names[1]: "z", names[2]: "x, y"}


def test_a_table_of_one_column_or_without_a_file_is_refused(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", NAMES)
    with pytest.raises(ValueError, match=r"first line has one column.*commas, semicolons or tabs"):
        build(folder, table(tmp_path / "labels.csv", header="names"))
    with pytest.raises(ValueError, match=r"lables.csv does not exist.*holds.*labels.csv"):
        build(folder, tmp_path / "lables.csv")


def test_the_fingerprint_tells_another_labelling_from_the_first(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", NAMES)
    marks = []
    for label in ("b", "b", "c"):
        labels = table(tmp_path / "labels.csv", "0.png,a", f"1.png,{label}", "2.png,b")
        marks.append(build(folder, labels, holdout=0).train.fingerprint)
    assert marks[0] == marks[1] != marks[2]
    assert build(folder, None).train.fingerprint not in marks


def test_the_words_of_a_command_line_name_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = images(tmp_path / "images", NAMES)
    table(tmp_path / "labels.csv", "0.png,a", "1.png,b")
    monkeypatch.chdir(tmp_path)
    found = load(Recipe, None, [f"data={folder}", "data.labels=labels.csv"]).data
    assert isinstance(found, Folder)
    assert found.labels == str(tmp_path / "labels.csv")
    assert torch.equal(found.build().train.labels[:2], torch.tensor([0, 1]))


def test_a_table_without_line_breaks_or_of_no_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("name,label\n" + "a" * (1 << 21))
    with pytest.raises(ValueError, match="line 2: it is longer than 1,048,576 letters"):
        read_labels(tmp_path / "long.csv", ["1.png"])
    (tmp_path / "name.csv").write_text("name,label\n" + "a" * 100_000 + ",b\n")
    with pytest.raises(ValueError, match=r"line 2: 'a+…? is not among the 20,000 images"):
        read_labels(tmp_path / "name.csv", [f"{number}.png" for number in range(20_000)])
    (tmp_path / "mac.csv").write_bytes(b"\xef\xbb\xbfname,label\r1.png,a\r")
    assert read_labels(tmp_path / "mac.csv", ["1.png"]) == {"1.png": "a"}
