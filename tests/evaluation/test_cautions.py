"""What is said of the images and features that numbers are of: copies, other data, small classes, collapse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyviews.data import Folder
from manyviews.data.images import InMemory, Names, Split
from manyviews.evaluation import cautions
from manyviews.evaluators.geometry import geometry
from manyviews.evaluators.knn import KnnSettings, knn
from manyviews.evaluators.results.measurement import Evaluation
from manyviews.evaluators.splits import balanced_accuracy, uneven


def scene(seed: int, side: int = 96) -> np.ndarray:
    """A picture of soft blobs, as a photograph is at a small size."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return np.array(coarse.resize((side, side), Image.Resampling.BICUBIC))


def sizes(folder: Path, seeds: range, sides: list[int]) -> None:
    for seed in seeds:
        (folder / f"class{seed % 2}").mkdir(parents=True, exist_ok=True)
        for side in sides:
            picture = Image.fromarray(scene(seed)).resize((side, side), Image.Resampling.LANCZOS)
            picture.save(folder / f"class{seed % 2}" / f"{seed}_{side}.{'jpg' if side > 64 else 'png'}")


def test_a_picture_in_another_size_and_format_is_known_and_another_picture_is_not(tmp_path: Path) -> None:
    sizes(tmp_path / "train", range(12), [48, 96])
    sizes(tmp_path / "test", range(8, 18), [32, 64, 130])  # of which four pictures are in train
    split = Folder(path=str(tmp_path), size=32).build()
    assert split.test is not None
    (said,) = cautions.copies(split, None)
    assert said.startswith("12 of 30 held-out images show the same picture")


def test_pictures_that_differ_in_a_detail_are_two_pictures() -> None:
    train = torch.from_numpy(scene(0)).permute(2, 0, 1)[None].float() / 255
    other = train.clone()
    other[..., 20:50, 20:50] = other.flip(3)[..., 20:50, 20:50]
    small = [torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1) for images in (train, other)]
    assert len(cautions.same_pictures(small[0], small[0])) == 1
    assert len(cautions.same_pictures(small[0], small[1])) == 0


def split_of(train: torch.Tensor, test: torch.Tensor) -> Split:
    def images(labels: torch.Tensor, name: str) -> InMemory:
        pixels = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
        return InMemory(pixels, Names(f"{name}{i}" for i in range(len(labels))), labels, ("a", "b", "c", "d"), name)

    return Split(images(train, "train"), images(test, "test"))


def test_small_and_unequal_classes_are_named_with_their_counts() -> None:
    test = torch.tensor([0] * 12 + [1] * 5 + [2] * 2 + [-1] * 9)
    small, unequal = cautions.class_sizes(test, ("a", "b", "c", "d"))
    assert "1 of 3 classes have fewer than 5 test images (c: 2), and 1 class has none" in small
    assert "always predicting a is right on 63.2 %" in unequal
    assert not list(cautions.class_sizes(torch.tensor([0, 1] * 9), ("a", "b")))
    assert not list(cautions.class_sizes(torch.tensor([0] * 9), ("a", "b")))


def test_balanced_accuracy_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels = torch.tensor([0] * 12 + [2] * 5 + [3])
    guesses = labels[torch.randperm(18, generator=torch.Generator().manual_seed(0))]
    expected = metrics.balanced_accuracy_score(labels, guesses, adjusted=False)
    assert balanced_accuracy(guesses, labels) == pytest.approx(expected, abs=1e-6)
    assert uneven(labels)
    assert not uneven(torch.tensor([0, 0, 1, 1, 1, -1, -1, -1, -1]))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.ones(40, 16), "have collapsed: all images have nearly the same"),
        (torch.zeros(40, 16), "are all zero"),
        (torch.outer(torch.linspace(-1, 1, 40), torch.ones(16)), "collapsed to a line"),
        (torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), None),
    ],
)
def test_features_that_have_collapsed_are_said_to_have(rows: torch.Tensor, said: str | None) -> None:
    sentences = list(cautions.collapsed(Evaluation(geometry("learned", rows, None, seed=0))))
    assert (len(sentences) == 1 and said in sentences[0]) if said else not sentences
    assert not list(cautions.collapsed(Evaluation(geometry("random weights", rows, None, seed=0))))


def test_held_out_images_that_are_the_training_images_are_refused_in_words_of_the_command() -> None:
    rows, labels = torch.randn(12, 4), torch.arange(12) % 3
    with pytest.raises(ValueError, match=r"data\.test=FOLDER"):
        knn(rows, labels, rows, 3, KnnSettings())


def folder(path: Path, **changes: object) -> Folder:
    return Folder(path=str(path), **changes)


def test_whose_images_they_are_follows_from_path_and_content(tmp_path: Path) -> None:
    own_path, copy, other = tmp_path / "own", tmp_path / "copy", tmp_path / "other"
    for path, seeds in ((own_path, range(20)), (copy, range(20)), (other, range(16, 40))):
        sizes(path, seeds, [32])
    own = folder(own_path)
    built = {path: folder(path, size=32).build() for path in (own_path, copy, other)}
    inventory = built[own_path].inventory
    assert inventory is not None
    marks = inventory.marks()

    def said(data: Folder | None, path: Path) -> str:
        return " ".join(cautions.whose(data, own, marks, built[path]))

    assert said(None, own_path) == said(folder(own_path, size=32), own_path) == said(folder(copy), copy) == ""
    assert "Other images are held out than in the run" in said(folder(own_path, holdout=0.3), own_path)
    assert "Other images are held out" in said(folder(own_path, test=str(own_path / "class0")), own_path)
    assert said(folder(own_path, test=str(other)), own_path) == ""
    assert said(folder(other), other) == (
        "The images are of other data than the run's. Among them are 4 files of the run's own data, byte for byte."
    )


def test_of_other_images_it_is_never_said_that_the_run_has_learned_from_them(tmp_path: Path) -> None:
    for seed in range(12):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(scene(seed)).save(tmp_path / "flat" / f"{seed}.png")
    data = folder(tmp_path / "flat", size=32)
    split = data.build()
    assert list(cautions.whose(data, folder(tmp_path), {}, split)) == ["The images are of other data than the run's."]
    (said,) = cautions.whose(None, data, {}, split)
    assert said == "No images were held out: those shown are images that the run has learned from."
