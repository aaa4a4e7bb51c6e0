"""Recipes over classes whose batches could teach nothing are refused before the first step, with a way out."""

import pytest
import torch

from manyviews.config import load
from manyviews.data.images import InMemory, Names
from manyviews.recipe import Recipe, find
from manyviews.train.components import batches, check_classes, negatives_of


def images(*sizes: int) -> InMemory:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    names = Names(map(str, range(len(labels))))
    return InMemory(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), names, labels, ("a",) * len(sizes), "")


@pytest.mark.parametrize(
    ("recipe", "words", "sizes", "message"),
    [
        (
            "facenet",
            "train.batch_size=50",
            (60, 49),
            r"each batch holds one class alone.* use train.batch_size=50 train.",
        ),
        ("siamese", "train.batch_size=4 train.images_per_class=4", (8, 8), "images_per_class=2"),
        (
            "facenet",
            "train.batch_size=4 train.images_per_class=1",
            (8, 8, 8, 8),
            "no batch holds two images of a class",
        ),
        ("supervised", "train.batch_size=8", (64,), "all 64 images are of one class; ids=images"),
        ("arcface", "train.batch_size=8", (64,), "all 64 images are of one class; ids=images"),
        ("moco", "ids=labels train.batch_size=8", (64,), "all 64 images are of one class; ids=images"),
    ],
)
def test_batches_without_negatives_or_positives_are_refused_with_the_way_out(
    recipe: str, words: str, sizes: tuple[int, ...], message: str
) -> None:
    made, shown = load(Recipe, find(recipe), words.split()), images(*sizes)
    with pytest.raises(ValueError, match=message):
        check_classes(made, shown, batches(made, shown, 1))


@pytest.mark.parametrize(
    ("recipe", "words", "sizes", "expected"),
    [
        ("facenet", "train.batch_size=40 train.images_per_class=10", (44, 44, 44, 44), 30),
        ("supervised", "train.batch_size=8", (16, 16), 8),  # 16 embeddings, of which half are of the other class
        ("arcface", "train.batch_size=8", (16, 16, 16), 2),
        ("moco", "ids=labels objective.size=100 train.batch_size=8", (30, 10), 38),  # of each 100 rows 37.5
        ("simclr", "train.batch_size=8", (16, 16), 14),
    ],
)
def test_the_negatives_that_are_said_are_those_of_the_batches(
    recipe: str, words: str, sizes: tuple[int, ...], expected: int
) -> None:
    made, shown = load(Recipe, find(recipe), words.split()), images(*sizes)
    found = check_classes(made, shown, batches(made, shown, 1))
    most = {"arcface": 2, "moco": 100, "simclr": 14}.get(recipe, 0)
    assert negatives_of(made, shown, found, most) == pytest.approx(expected, abs=1)
