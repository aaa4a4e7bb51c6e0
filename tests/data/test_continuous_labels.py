"""Continuous labels: what they are made of, how files say them, and what is refused with a way out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from manyviews.config import load
from manyviews.data import InMemory
from manyviews.data.images import array_split
from manyviews.data.labels import ValuesSource, thumbnails, values_of
from manyviews.recipe import Recipe
from manyviews.train.pretrain import pretrain

CLASSES = 3
NAMES = [f"train/{index:05d}" for index in range(12)]


def images(channels: int = 1, size: int = 28, labels: Tensor | None = None) -> InMemory:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (12, channels, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(12) % CLASSES if labels is None else labels
    return array_split("train", pixels, labels, [str(number) for number in range(CLASSES)])


def write(file: Path, lines: list[str]) -> str:
    file.write_text("\n".join(["name,x,y", *lines]) + "\n")
    return str(file)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (1, 5)])
def test_pixels_are_the_mean_brightness_of_seven_by_seven_fields(channels: int, size: int) -> None:
    found = values_of(images(channels, size), "pixels")
    assert found.shape == (12, channels * 49)
    assert found.dtype == torch.float32
    assert 0 <= found.min() < found.max() <= 1
    if size == 28:
        fields = images().pixels.double().div(255).view(12, 7, 4, 7, 4).mean((2, 4)).flatten(1)
        torch.testing.assert_close(found.double(), fields, rtol=1e-6, atol=0)


def test_classes_stand_beside_the_pixels_and_set_images_apart() -> None:
    whole = images()
    found, plain = values_of(whole, "labels"), thumbnails(whole)
    assert found.shape == (12, 49 + CLASSES)
    distances, pixel_distances = torch.cdist(found, found), torch.cdist(plain, plain)
    same = whole.labels[:, None] == whole.labels
    torch.testing.assert_close(distances[same], pixel_distances[same], rtol=1e-4, atol=1e-4)
    typical = pixel_distances.square().mean().sqrt()
    expected = (pixel_distances[~same].square() + 2 * typical**2).sqrt()
    torch.testing.assert_close(distances[~same], expected, rtol=1e-4, atol=1e-4)
    assert distances[~same].min() > distances[same].max()


def test_unused_classes_and_equal_thumbnails_are_no_trouble() -> None:
    whole = images(labels=torch.arange(12) // 6 * 2)
    assert values_of(whole, "labels").shape == (12, 49 + 2)
    black = InMemory(torch.zeros_like(whole.pixels), whole.names, whole.labels, whole.classes, "")
    assert torch.cdist(values_of(black, "labels"), values_of(black, "labels")).unique().tolist() == pytest.approx(
        [0, 2**0.5]
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "bool"])
def test_an_array_gives_the_images_their_numbers_in_order(dtype: str, tmp_path: Path) -> None:
    numbers = (np.arange(24).reshape(12, 2) % 7).astype(dtype)
    np.save(tmp_path / "values.npy", numbers)
    found = values_of(images(), str(tmp_path / "values.npy"))
    expected = torch.from_numpy(numbers.astype(np.float64))
    torch.testing.assert_close(found, (expected - expected.mean(0)).float())
    np.save(tmp_path / "one.npy", numbers[:, 0])
    assert values_of(images(), str(tmp_path / "one.npy")).shape == (12, 1)


def test_a_table_names_the_images_in_any_order_and_may_name_others(tmp_path: Path) -> None:
    lines = [f"{name},{index},{index**2 / 8}" for index, name in reversed(list(enumerate(NAMES)))]
    file = write(tmp_path / "values.csv", [*lines, "", "test/00001,nothing,4"])
    expected = torch.stack([torch.arange(12.0), torch.arange(12.0) ** 2 / 8], 1)
    torch.testing.assert_close(values_of(images(), file), expected - expected.mean(0))
    Path(file).write_bytes("\ufeff".encode() + Path(file).read_bytes().replace(b"\n", b"\r\n"))
    torch.testing.assert_close(values_of(images(), file), expected - expected.mean(0))


def test_differences_of_large_numbers_outlive_the_number_format(tmp_path: Path) -> None:
    np.save(tmp_path / "dates.npy", 1.7e9 + np.arange(12.0))
    found = values_of(images(), str(tmp_path / "dates.npy"))
    assert found.diff(dim=0).flatten().tolist() == [1.0] * 11


def test_a_path_is_made_absolute_and_other_words_are_refused() -> None:
    source = TypeAdapter(ValuesSource).validate_python
    assert source("pixels") == "pixels"
    assert source("labels") == "labels"
    assert source("ages.csv") == str(Path.cwd() / "ages.csv")
    assert source("~/ages.npy") == str(Path.home() / "ages.npy")
    with pytest.raises(ValueError, match="values=pixel is neither pixels nor labels nor the path"):
        source("pixel")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([f"{name},1,{i}" for i, name in enumerate(NAMES[:-2])], r"no line for 2 of 12 images, .* train/00010"),
        (
            [f"{name},1,{i}" for i, name in enumerate([*NAMES, NAMES[3]])],
            "line 14: train/00003 stands in line 5 already",
        ),
        (["train/00000,1"], "line 2: 2 columns, where the header has 3"),
        (["train/00000,1,tall"], "line 2: 'tall' in column 'y' is no number"),
        ([f"{name},{'inf' if i == 4 else i},1" for i, name in enumerate(NAMES)], r"train/00004 \(image 4\) are \[inf,"),
        ([f"{name},3,4" for name in NAMES], "all 12 images have the same numbers"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        values_of(images(), write(tmp_path / "values.csv", lines))


def test_numbers_between_semicolons_without_a_header_are_read_and_a_decimal_comma_is_told_of(tmp_path: Path) -> None:
    lines = [f"{name};{number}.5;1" for number, name in enumerate(NAMES)]
    (tmp_path / "values.csv").write_text("\n".join(lines))
    plain = write(tmp_path / "plain.csv", [line.replace(";", ",") for line in lines])
    assert torch.equal(values_of(images(), str(tmp_path / "values.csv")), values_of(images(), str(plain)))
    (tmp_path / "values.csv").write_text("\n".join(lines).replace(".5", ",5"))
    with pytest.raises(ValueError, match=r"line 1: '0,5' in column 'column 2' is no number; write 0\.5"):
        values_of(images(), str(tmp_path / "values.csv"))


def test_what_is_wrong_with_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "values.npy"
    with pytest.raises(ValueError, match=r"values\.npy does not exist; .* does"):
        values_of(images(), str(file))
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is no \.npy file; write it with numpy\.save"):
        values_of(images(), str(file))
    for numbers, message in (
        (np.zeros((11, 2)), r"holds \[11, 2\] numbers, but there are 12"),
        (np.zeros((12, 2, 2)), r"holds \[12, 2, 2\]"),
        (np.zeros((12, 0)), r"holds \[12, 0\]"),
        (np.array(["a"] * 12), "holds <U1, and no real numbers"),
        (np.array([{}] * 12), "is damaged, or no array of numbers"),
        (np.arange(12.0) ** 2 * 1e300, r"train/00011 \(image 11\) differ by 7.88333e\+301 .* use a larger unit"),
    ):
        np.save(file, numbers, allow_pickle=True)
        with pytest.raises(ValueError, match=message):
            values_of(images(), str(file))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="its first line has no columns"):
        values_of(images(), str(tmp_path / "empty.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        values_of(images(), str(tmp_path / "folder.csv"))


def test_an_image_without_a_class_is_named() -> None:
    with pytest.raises(ValueError, match="train/00001 has none"):
        values_of(images(labels=torch.tensor([0, -1] * 6)), "labels")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=log_ratio"], "set values=pixels, values=labels, or values=FILE"),
        (["objective=log_ratio", "values=labels", "ids=labels"], "values=labels to have classes among the values"),
        (["objective=ranking", "values=pixels", "ids=labels"], "use ids=images"),
        (["objective=bank", "values=pixels"], "leave it out, or use objective=log_ratio or objective=ranking"),
        (["objective=ranking", "views.num_views=1"], "at least 2 views"),
        (["objective=n_pair", "views.num_views=1"], "at least 2 views"),
        (["objective=log_ratio", "values=nothing"], "neither pixels nor labels nor the path"),
    ],
)
def test_recipes_that_cannot_work_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(Recipe, None, words)


@pytest.mark.parametrize(
    "words",
    [
        ["objective=log_ratio", "values=pixels", "views.num_views=1"],
        ["objective=ranking", "values=labels", "views.num_views=1"],
        ["objective=ranking", "ids=labels", "views.num_views=1"],
        ["objective=n_pair", "ids=labels", "views.num_views=1", "train.images_per_class=2"],
    ],
)
def test_recipes_whose_positives_are_no_views_need_one_view_only(words: list[str]) -> None:
    assert load(Recipe, None, words).views.num_views == 1


def test_a_run_goes_on_with_the_values_it_was_begun_with_only(tmp_path: Path) -> None:
    file, numbers = tmp_path / "values.npy", np.random.default_rng(0).normal(size=(10_000, 2)).round(3)
    np.save(file, numbers)
    words = ["objective=log_ratio", "views.num_views=1", "views.size=16", "train.preview=0", "train.monitor=0"]
    words += ["train.batch_size=16", "train.threads=1", "train.precision=fp32", f"output={tmp_path / 'run'}"]
    words += ["encoder.projector.hidden=16"]
    pretrain(load(Recipe, None, [*words, f"values={file}", "train.epochs=0.0032"]))
    (tmp_path / "run" / "done").unlink()
    longer = [*words, "train.epochs=0.0064", "resume=true"]
    with pytest.raises(ValueError, match=r"values was .* and is pixels"):
        pretrain(load(Recipe, None, [*longer, "values=pixels"]))
    numbers[7] += 1
    np.save(file, numbers)
    with pytest.raises(ValueError, match="values differ from those at the start of the run"):
        pretrain(load(Recipe, None, [*longer, f"values={file}"]))
    numbers[7] -= 1
    np.save(file, numbers)
    pretrain(load(Recipe, None, [*longer, f"values={file}"]))
