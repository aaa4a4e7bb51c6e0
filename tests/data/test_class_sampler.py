"""Batches of P classes with K images of each: what is in them, and that they resume."""

import re

import pytest
import torch
from torch import Tensor

from manyviews.data import ClassOrder, Loader
from manyviews.data.images import InMemory, Names
from manyviews.data.sampler import way_out as classes_to_fill

LABELS = torch.arange(90) % 9


def epoch_of(order: ClassOrder, epoch: int = 0) -> list[Tensor]:
    return [order.batch(epoch * order.steps_per_epoch + step)[1] for step in range(order.steps_per_epoch)]


@pytest.mark.parametrize(("batch", "per_class"), [(12, 4), (9, 1), (18, 2), (90, 10), (10, 10)])
def test_each_batch_has_as_many_images_of_each_of_its_classes(batch: int, per_class: int) -> None:
    order = ClassOrder(LABELS, batch, per_class, seed=0)
    for epoch in range(3):
        batches = epoch_of(order, epoch)
        for ids in batches:
            found = LABELS[ids].bincount(minlength=9)
            assert sorted(found[found > 0].tolist()) == [per_class] * (batch // per_class)
        everything = torch.cat(batches)
        assert len(everything.unique()) == len(everything)


def test_classes_of_one_size_are_used_up_to_what_fills_no_group_or_batch() -> None:
    order = ClassOrder(LABELS, 9, 3, seed=0)  # 9 classes of 10 images are 27 groups of 3: nine batches
    assert (order.steps_per_epoch, order.images_per_epoch, order.images(10)) == (9, 81, 90)
    assert len(torch.cat(epoch_of(order))) == 81


def test_a_large_class_gives_no_batch_two_groups_and_small_ones_fill_as_many_batches_as_they_can() -> None:
    labels = torch.tensor([0] * 100 + [1] * 6 + [2] * 5 + [3] * 1)
    order = ClassOrder(labels, 4, 2, seed=0)
    # Groups: 50, 3, 2, 0. Each batch takes two classes, so that the five groups of the small ones bound their number.
    assert (order.steps_per_epoch, order.left_out) == (5, 1)
    for ids in epoch_of(order):
        assert sorted(labels[ids].bincount(minlength=4).tolist()) == [0, 0, 2, 2]


def test_what_is_left_over_differs_between_epochs_and_seeds() -> None:
    order = ClassOrder(LABELS, 12, 4, seed=0)
    seen = [frozenset(torch.cat(epoch_of(order, epoch)).tolist()) for epoch in range(12)]
    assert len(set(seen)) > 1
    assert frozenset.union(*seen) == set(range(90))
    assert not torch.equal(order.batch(0)[1], ClassOrder(LABELS, 12, 4, seed=1).batch(0)[1])


def test_companies_of_classes_and_of_images_change_from_epoch_to_epoch() -> None:
    order = ClassOrder(LABELS, 12, 4, seed=0)
    companies = {frozenset(LABELS[ids].tolist()) for epoch in range(4) for ids in epoch_of(order, epoch)}
    assert len(companies) > 8


def test_images_without_a_class_and_classes_too_small_never_come() -> None:
    labels = torch.tensor([-1, 0, 0, 1, 1, 2, -1])
    order = ClassOrder(labels, 4, 2, seed=0)
    assert order.left_out == 3
    assert sorted(torch.cat(epoch_of(order)).tolist()) == [1, 2, 3, 4]


def test_any_step_can_be_the_first() -> None:
    fresh, used = ClassOrder(LABELS, 12, 4, seed=3), ClassOrder(LABELS, 12, 4, seed=3)
    expected = [used.batch(step) for step in range(20)]
    epoch, ids = fresh.batch(13)
    assert epoch == expected[13][0] == 2
    assert torch.equal(ids, expected[13][1])


def test_ranks_share_its_batches_and_a_loader_resumes_in_the_middle() -> None:
    pixels = torch.arange(90, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    images = InMemory(pixels, Names(map(str, range(90))), LABELS, tuple("abcdefghi"), "")
    order = ClassOrder(LABELS, 12, 4, seed=0)
    loaders = [iter(Loader(images, order, rank=rank, size=2, start=5)) for rank in range(2)]
    for step in range(5, 9):
        together = torch.cat([next(loader).ids for loader in loaders])
        assert torch.equal(together, order.batch(step)[1])


def test_batches_that_cannot_be_are_refused_with_one_that_can() -> None:
    with pytest.raises(ValueError, match=r"batch of 10 images cannot have 4 .* use a batch of 8"):
        ClassOrder(LABELS, 10, 4, seed=0)
    with pytest.raises(
        ValueError, match=r"takes 10 classes, but 9 have as many images; use train.batch_size=36 train.images_"
    ):
        ClassOrder(LABELS, 40, 4, seed=0)


@pytest.mark.parametrize(
    ("sizes", "batch", "per_class", "way_out"),
    [
        ([44] * 4, 250, 50, "train.batch_size=176 train.images_per_class=44"),
        ([70, 44, 44], 50, 50, "train.batch_size=50 train.images_per_class=25"),
        ([120, 14, 2, 1], 250, 50, "train.batch_size=28 train.images_per_class=14"),
        ([9, 1, 1], 8, 4, "no two classes have two images each"),
        ([3], 2, 2, "no two classes have two images each"),
    ],
)
def test_the_way_out_is_a_batch_that_can_be_filled(sizes: list[int], batch: int, per_class: int, way_out: str) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    said = classes_to_fill(torch.tensor(sizes).numpy(), batch, per_class)
    assert way_out in said
    if numbers := re.findall(r"=(\d+)", said):
        order = ClassOrder(labels, int(numbers[0]), int(numbers[1]), seed=0)
        assert order.steps_per_epoch >= 1
        assert order.classes_per_batch >= 2
