"""Parts of a set of images: which stay, under which ids, and what is refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from manyviews.data import Folder, leave_out, of_classes, sample_ids, select
from manyviews.data.decoding.files import Files
from manyviews.data.images import InMemory, Names

CLASSES = ("ant", "bee", "7")


def images(labelled: bool = True) -> InMemory:
    pixels = torch.arange(6, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    labels = torch.tensor([0, 1, 2, 1, -1, 0]) if labelled else None
    return InMemory(pixels, Names("abcdef"), labels, CLASSES if labelled else (), "mark")


def test_what_is_selected_keeps_its_pixels_names_and_labels_under_new_ids() -> None:
    found = select(images(), torch.tensor([5, 1, 4]))
    assert found.read(torch.tensor([0, 2]))[:, 0, 0, 0].tolist() == [5, 4]
    assert list(found.names) == ["f", "b", "e"]
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, -1]
    assert (found.classes, len(found), found.size, found.channels) == (CLASSES, 3, 8, 1)


def test_other_images_have_another_fingerprint_and_the_same_ones_the_same() -> None:
    first = select(images(), torch.tensor([0, 1])).fingerprint
    assert first == select(images(), torch.tensor([0, 1])).fingerprint
    assert len({first, "mark", select(images(), torch.tensor([0, 2])).fingerprint}) == 3


def test_classes_go_by_name_or_number() -> None:
    assert of_classes(images(), ["bee"]).tolist() == [1, 3]
    assert of_classes(images(), [0, "1"]).tolist() == [0, 1, 3, 5]
    assert of_classes(images(), ["7"]).tolist() == [2]
    assert list(leave_out(images(), ["ant", 2]).names) == ["b", "d", "e"]


@pytest.mark.parametrize("form", ["{}", "{:02d}"])
def test_where_classes_are_called_by_numbers_a_number_is_a_name(form: str) -> None:
    # In alphabetical order 2 comes after 10, 11 and 12.
    names = tuple(sorted(form.format(number) for number in range(1, 13)))
    pixels = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)
    whole = InMemory(pixels, Names(names), torch.arange(12), names, "mark")
    for entry in (2, "2", form.format(2)):
        assert list(select(whole, of_classes(whole, [entry])).names) == [form.format(2)]
    for entry in (0, "0", 13):
        with pytest.raises(ValueError, match="is not one of the classes"):
            of_classes(whole, [entry])


def test_a_name_that_is_a_number_wins_among_other_names() -> None:
    assert of_classes(images(), [7]).tolist() == [2]
    with pytest.raises(ValueError, match="class 8 is not one of the 3 classes"):
        of_classes(images(), [8])


def test_nothing_to_leave_out_leaves_everything_as_it_is() -> None:
    whole = images(labelled=False)
    assert leave_out(whole, ()) is whole


def test_classes_that_are_not_there_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'bea' is not one of the classes \(ant, bee, 7\); did you mean bee"):
        leave_out(images(), ["bea"])
    with pytest.raises(ValueError, match="class 3 is not one of the 3 classes"):
        leave_out(images(), [3])
    with pytest.raises(ValueError, match="these images have no labels"):
        leave_out(images(labelled=False), [0])
    with pytest.raises(ValueError, match="none of 6 images is left"):
        select(images(), torch.tensor([], dtype=torch.int64))


def test_files_are_decoded_under_their_new_ids(tmp_path: Path) -> None:
    for place, name in enumerate(("ant/0", "ant/1", "bee/2", "bee/3")):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 40 * place).save(file)
    whole = Folder(path=str(tmp_path), size=8, channels=1, holdout=0, memory=0).build().train
    assert isinstance(whole, Files)
    found = leave_out(whole, ["ant"])
    assert isinstance(found, Files)
    assert list(found.names) == ["bee/2.png", "bee/3.png"]
    assert found.read(torch.tensor([1]))[0, 0, 0, 0] == 120


def test_sampled_ids_are_some_of_a_seeds_permutation_ascending() -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    assert sample_ids(100, 9, seed=3).tolist() == sorted(order[:9].tolist())
    assert sample_ids(100, 1000, seed=3).tolist() == list(range(100))
    assert sample_ids(100, 9, seed=4).tolist() != sample_ids(100, 9, seed=3).tolist()
