"""Which folders are splits and which are classes, what is left out, and that all of it is said."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from manyviews.data import Folder, Split
from manyviews.data.listing.walk import RUN_CONFIG, RUN_PARTS
from manyviews.run.folder import CHECKPOINTS, CLASSIFIER, CONFIG, DONE, METRICS

SERIAL: Iterator[int] = count()


def tree(root: Path, **folders: int) -> Path:
    """Different images in folders, with __ for / in the keywords: train__a=3."""
    for name, number in folders.items():
        for index in range(number):
            picture(root / name.replace("__", "/") / f"{index}.png")
    return root


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(next(SERIAL)).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def build(path: Path, **settings) -> Split:
    return Folder(path=str(path), size=8, **settings).build()


def tops(images) -> set[str]:
    return {name.partition("/")[0] for name in images.names}


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("held_out", ["test", "TESTING", "val", "Valid", "validation", "dev", "Eval"])
def test_folders_called_as_splits_are_splits_and_no_classes(tmp_path, train, held_out):
    tree(tmp_path, **{f"{train}__ape": 3, f"{train}__bee": 2, f"{train}__cat": 2})
    tree(tmp_path, **{f"{held_out}__bee": 1, f"{held_out}__cat": 1})
    split = build(tmp_path)
    assert tops(split.train) == {train}
    assert list(split.test.names) == [f"{held_out}/bee/0.png", f"{held_out}/cat/0.png"]
    assert split.test.labels.tolist() == [1, 2]
    assert split.test.classes == split.train.classes == ("ape", "bee", "cat")
    assert f"{train}: 7 images in 3 classes (ape: 3, bee: 2, cat: 2); held out, {tmp_path / held_out}" in split.layout


def test_a_lone_train_folder_is_the_images_and_its_sub_folders_are_the_classes(tmp_path):
    split = build(tree(tmp_path, train__ape=3, train__bee=3), holdout=0)
    assert split.train.classes == ("ape", "bee")
    assert split.train.names[0] == "train/ape/0.png"


@pytest.mark.parametrize(
    ("folders", "ways"),
    [
        ({"train__a": 1, "training__a": 1}, ["train/ and training/", "data.path={}/train data.test="]),
        ({"train__a": 2, "test__a": 1, "Testing__a": 1}, ["Testing/ and test/", "data.test={}/Testing"]),
        ({"train__a": 2, "cat": 2}, ["train/ beside cat/", "data.path={}/train"]),
        ({"train": 2, "": 2}, ["train/ beside images in no sub-folder", "data.path={}/train"]),
        ({"cat": 2, "dog": 2, "test": 1}, ["test/, cat/ and dog/", "data.test={}/test"]),
        ({"cat__x": 2, "val__x": 1}, ["val/ and cat/", "data.test={}/val"]),
        ({"test__a": 1, "val__a": 1}, ["test/ and val/", "data.path={}/test"]),
        ({"archive__train": 2, "archive__val": 1}, ["data.path={}/archive"]),
        ({"cup__train": 2, "cup__test": 1, "jug__train": 2, "jug__test": 1}, ["data.path={}/cup"]),
    ],
)
def test_what_can_be_read_in_several_ways_is_asked_for_with_the_keys_that_say_it(tmp_path, folders, ways):
    tree(tmp_path, **folders)
    with pytest.raises(ValueError, match=r"data\.splits=false") as refused:
        build(tmp_path)
    for way in ways:
        assert way.format(tmp_path) in str(refused.value)
    assert len(build(tmp_path, splits=False, holdout=0).train) == sum(folders.values())


def test_splits_false_makes_a_class_of_a_folder_called_test(tmp_path):
    assert build(tree(tmp_path, cat=2, test=2), splits=False).train.classes == ("cat", "test")


@pytest.mark.parametrize("inside", ["test", "hold/out"])
def test_a_test_folder_within_the_data_is_never_learned_from(tmp_path, inside):
    tree(tmp_path, cat=3, dog=3)
    tree(tmp_path / inside, cat=2, dog=1)
    split = build(tmp_path, test=str(tmp_path / inside))
    assert tops(split.train) == {"cat", "dog"}
    assert split.test.labels.tolist() == [0, 0, 1]
    assert f"passed over: 1 folder that is read as another split: {inside}" in split.layout


def test_a_test_folder_that_is_reached_through_a_link_is_not_learned_from_either(tmp_path):
    root = tree(tmp_path / "data", cat=3, dog=3)
    tree(tmp_path / "apart", cat=2, dog=1)
    (root / "more").symlink_to(tmp_path / "apart")
    split = build(root, test=str(tmp_path / "apart"), follow_links=True)
    assert tops(split.train) == {"cat", "dog"}


def test_data_within_the_test_folder_is_not_held_out_and_one_folder_for_both_is_refused(tmp_path):
    tree(tmp_path, cat=2, dog=2)
    tree(tmp_path / "new", cat=3, dog=3)
    split = build(tmp_path / "new", test=str(tmp_path))
    assert (len(split.train), len(split.test), tops(split.test)) == (6, 4, {"cat", "dog"})
    with pytest.raises(ValueError, match=r"data\.path and data\.test are one folder"):
        build(tmp_path, test=str(tmp_path / "cat" / ".."))


def test_beside_a_named_test_folder_a_folder_of_such_a_name_is_no_class(tmp_path, caplog):
    tree(tmp_path, cat=2, dog=2, val__cat=1, apart__cat=1)
    split = build(tmp_path, test=str(tmp_path / "apart"))
    assert tops(split.train) == {"cat", "dog"}
    assert "1 image in val/, a name of held-out images" in caplog.text


def test_a_named_test_folder_must_have_known_classes(tmp_path):
    train = tree(tmp_path / "a", ape=3, bee=2)
    assert build(train, test=str(tree(tmp_path / "b", bee=2, ape=1))).test.labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="lacks: cow"):
        build(train, test=str(tree(tmp_path / "c", bee=2, cow=1)))
    with pytest.raises(ValueError, match=r"no sub-folder per class.*data\.labels=none"):
        build(train, test=str(tree(tmp_path / "d", **{"": 1})))
    assert len(build(train, test=str(tmp_path / "d"), labels="none").test) == 1


def test_held_out_images_of_one_class_are_measured_on(tmp_path):
    split = build(tree(tmp_path, train__ape=3, train__bee=2, val__bee=2))
    assert split.test.labels.tolist() == [1, 1]


def test_held_out_images_without_classes_are_passed_over_where_there_are_labels_and_that_is_said(tmp_path, caplog):
    tree(tmp_path, train__ape=20, train__bee=20, val=3)
    split = build(tmp_path)
    assert tops(split.test) == {"train"}
    assert "3 images in" in split.layout
    assert "without one sub-folder per class nothing can be measured on them" in caplog.text


def test_held_out_images_without_classes_are_held_out_where_there_are_no_labels(tmp_path):
    split = build(tree(tmp_path, train=5, val=3))
    assert (len(split.train), len(split.test), split.train.labels, split.test.labels) == (5, 3, None, None)


@pytest.mark.parametrize(("unlabelled", "chosen"), [(False, "test"), (True, "val")])
def test_of_test_and_val_one_is_held_out_and_the_other_is_named(tmp_path, caplog, unlabelled, chosen):
    tree(tmp_path, train__ape=3, train__bee=2, val__ape=1, val__bee=1)
    tree(tmp_path, **({"test": 2} if unlabelled else {"test__ape": 1, "test__bee": 1}))
    split = build(tmp_path)
    assert tops(split.test) == {chosen}
    other = tmp_path / ("test" if unlabelled else "val")
    assert f"2 images in {other} not used" in caplog.text
    assert unlabelled or f"data.test={other}" in split.layout


def test_images_that_belong_to_no_split_are_counted_and_warned_of(tmp_path, caplog):
    tree(tmp_path, train__a=2, train__b=2, test__a=1, extra__deep=3, **{"": 1})
    assert len(build(tmp_path).train) == 4
    assert "3 images in extra/" in caplog.text
    assert "1 image in no sub-folder" in caplog.text


def test_one_image_beside_class_folders_has_no_label_and_the_others_keep_theirs(tmp_path, caplog):
    split = build(tree(tmp_path, ape=2, bee=2, **{"": 1}), holdout=0)
    assert split.train.classes == ("ape", "bee")
    assert split.train.labels.tolist() == [-1, 0, 0, 1, 1]
    assert "1 image beside the class folders, without a label" in caplog.text
    assert "5 images in 2 classes (ape: 2, bee: 2), 1 without a label" in split.layout


def test_folders_among_more_images_without_one_are_no_classes_unless_that_is_said(tmp_path, caplog):
    tree(tmp_path, deep=1, stamps=1, **{"": 3})
    assert build(tmp_path).train.labels is None
    assert "most images (3 of 5) lie beside sub-folders; data.labels=folders" in caplog.text
    assert build(tmp_path, labels="folders", holdout=0).train.labels.tolist() == [-1, -1, -1, 0, 1]


def test_labels_none_gives_none_and_folders_without_folders_is_refused(tmp_path):
    split = build(tree(tmp_path, deep=2, stamps=2), labels="none")
    assert (split.train.labels, split.train.classes, split.test) == (None, (), None)
    with pytest.raises(ValueError, match=r"data\.labels=folders takes at least two sub-folders with images.* has 1"):
        build(tmp_path / "deep" / "..", labels="folders", splits=True, test=str(tmp_path / "deep"))
    with pytest.raises(ValueError, match="is neither none nor folders nor a CSV file; did you mean folders"):
        Folder(path=".", labels="folder")
    assert Folder(path=".", labels="none").labels == "none"
    assert Folder(path=".", labels="./none").labels == os.path.abspath("none")


def test_a_table_labels_a_test_folder_within_the_data(tmp_path):
    tree(tmp_path, a=2, hold=2)
    table = tmp_path / "labels.csv"
    table.write_text("name,label\na/0.png,x\na/1.png,y\nhold/0.png,y\nhold/1.png,x\n")
    split = build(tmp_path, labels=str(table), test=str(tmp_path / "hold"))
    assert (split.train.labels.tolist(), split.test.labels.tolist()) == ([0, 1], [1, 0])


def test_names_that_begin_with_underscores_are_images_and_classes(tmp_path):
    tree(tmp_path, dog=1)
    for name in ("__background__/1.png", "dog/__dog__.png", "__/__.png"):
        picture(tmp_path / name)
    split = build(tmp_path, holdout=0)
    assert (len(split.train), split.train.classes) == (4, ("__", "__background__", "dog"))


def test_what_is_passed_over_is_counted_and_pictures_among_it_are_warned_of(tmp_path, caplog):
    tree(tmp_path, a=2, b=2)
    for name in ("a/1.PSD", "a/2.psd", "b/raw.cr2", "notes.txt", "film.mp4", "README", ".hidden.png", "b/._1.png"):
        (tmp_path / name).write_bytes(b"nothing")
    picture(tmp_path / "__MACOSX/a/1.png")
    os.mkfifo(tmp_path / "pipe.png")
    layout = build(tmp_path).layout
    for said in ("2 .psd", "1 .cr2", "1 .txt", "1 .mp4", "1 without an ending", "3 hidden", "1 pipe or device"):
        assert said in layout
    assert "pictures of kinds that are not read were passed over: 1 .cr2, 2 .psd" in caplog.text
    assert ".txt" not in caplog.text


@pytest.mark.parametrize("fails_at", ["scandir", "stat"])
def test_a_folder_below_that_may_not_be_read_is_passed_over_and_warned_of(tmp_path, monkeypatch, caplog, fails_at):
    tree(tmp_path, a=2, b=2, **{"lost+found": 1})
    owner, wrapped = (os, os.scandir) if fails_at == "scandir" else (Path, Path.stat)

    def forbid(path, *arguments, **options):
        if str(path).rstrip("/").endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return wrapped(path, *arguments, **options)

    monkeypatch.setattr(owner, fails_at, forbid)
    split = build(tmp_path, holdout=0)
    assert (len(split.train), split.train.classes) == (4, ("a", "b"))
    assert "1 unreadable folder was passed over: lost+found" in caplog.text
    assert "1 unreadable folder: lost+found" in split.layout


def run_folder(path: Path, *parts: str) -> None:
    picture(path / "views.png")
    for name in ("config.yaml", *parts):
        (path / name).touch()


def test_run_folders_among_the_images_are_passed_over_and_counted(tmp_path):
    tree(tmp_path, a=2, b=2)
    before = build(tmp_path).train.fingerprint
    run_folder(tmp_path / "runs/first", "metrics.jsonl")
    run_folder(tmp_path / "a/tried", "done")
    split = build(tmp_path)
    assert split.train.fingerprint == before
    assert split.train.classes == ("a", "b")
    assert "2 run folders: runs/first, a/tried" in split.layout or "2 run folders: a/tried, runs/first" in split.layout
    with pytest.raises(ValueError, match="is a run folder, not a folder of images"):
        build(tmp_path / "runs/first")


def test_a_folder_with_a_configuration_alone_is_no_run(tmp_path):
    run_folder(tmp_path / "a")
    assert len(build(tmp_path).train) == 1


def test_what_makes_a_run_folder_is_what_runs_write() -> None:
    assert RUN_CONFIG == CONFIG
    assert {METRICS, CHECKPOINTS, DONE, CLASSIFIER} < RUN_PARTS


@pytest.mark.parametrize("linked", [("train", "val"), ("val",)])
def test_linked_splits_name_the_key_that_follows_them(tmp_path, caplog, linked):
    apart = tree(tmp_path / "apart", train__a=3, train__b=3, val__a=1, val__b=1)
    root = tree(tmp_path / "root", **({} if "train" in linked else {"train__a": 3, "train__b": 3}))
    root.mkdir(exist_ok=True)
    for name in linked:
        (root / name).symlink_to(apart / name)
    if "train" in linked:
        with pytest.raises(ValueError, match=r"holds no images .*data\.follow_links=true follows them\): train, val"):
            build(root)
    else:
        assert "data.follow_links=true follows them): val" in build(root).layout
        assert "data.follow_links=true" in caplog.text
    split = build(root, follow_links=True)
    assert (tops(split.train), tops(split.test)) == ({"train"}, {"val"})


def test_links_that_lead_nowhere_are_named_when_links_are_followed(tmp_path, caplog):
    tree(tmp_path, a=2)
    (tmp_path / "a/9.png").symlink_to("gone.png")
    build(tmp_path, follow_links=True)
    assert "1 broken symbolic link was passed over: a/9.png" in caplog.text


def test_copies_across_the_splits_are_counted(tmp_path, caplog):
    tree(tmp_path, train__a=3, train__b=3, test__a=2, test__b=2)
    (tmp_path / "test/a/copy.png").write_bytes((tmp_path / "train/b/0.png").read_bytes())
    build(tmp_path)
    assert "1 of 5 held-out images are also training images, byte for byte" in caplog.text
