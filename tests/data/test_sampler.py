"""Batch samplers: every epoch is a permutation or batches of classes, the same on any rank and after a resume."""

import itertools
import re

import pytest
import torch
from torch import Tensor

from manyviews.data import ClassOrder, Loader, Order
from manyviews.data.images import InMemory, Names
from manyviews.data.sampler import composition, order, way_out

LABELS = torch.arange(90) % 9
UNEVEN = torch.tensor([0] * 40 + [1] * 9 + [2] * 2 + [3])


def images(count: int) -> InMemory:
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return InMemory(pixels, Names(map(str, range(count))), None, (), "")


def take(loader: Loader, steps: int) -> list[tuple[int, list[int]]]:
    iterator = iter(loader)
    return [(batch.epoch, batch.ids.tolist()) for batch, _ in zip(iterator, range(steps), strict=False)]


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    first = order(100, seed=3, epoch=5)
    torch.manual_seed(1)
    assert torch.equal(first, order(100, seed=3, epoch=5))
    assert first.sort().values.equal(torch.arange(100))
    assert not torch.equal(first, order(100, seed=3, epoch=6))
    assert not torch.equal(first, order(100, seed=4, epoch=5))
    assert not torch.equal(order(100, seed=5, epoch=3), first)


def test_the_order_is_the_same_in_every_version():
    assert order(10, seed=0, epoch=0).tolist() == [2, 3, 1, 4, 7, 0, 6, 5, 8, 9]


def test_the_global_random_state_is_neither_used_nor_changed():
    before = torch.random.get_rng_state()
    Order(50, 8, 0).batch(20)
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_id_comes_twice_in_an_epoch_and_each_batch_is_full():
    batches = Order(13, 4, seed=0)
    assert batches.steps_per_epoch == 3
    for epoch in range(4):
        ids = torch.cat([batches.batch(epoch * 3 + step)[1] for step in range(3)])
        assert [batches.batch(epoch * 3 + step)[0] for step in range(3)] == [epoch] * 3
        assert len(ids.unique()) == len(ids) == 12


def test_the_dropped_rest_differs_between_epochs():
    seen = [
        set(torch.cat([Order(13, 4, 0).batch(epoch * 3 + step)[1] for step in range(3)]).tolist()) for epoch in range(9)
    ]
    assert set.union(*seen) == set(range(13))
    assert len({frozenset(ids) for ids in seen}) > 1


@pytest.mark.parametrize(("count", "sizes"), [(12, [4, 4, 4]), (13, [4, 4, 4]), (14, [4, 4, 4, 2]), (15, [4, 4, 4, 3])])
def test_the_rest_of_an_epoch_is_a_last_batch_if_it_is_large_enough(count, sizes):
    batches, steps = Order(count, 4, seed=0, smallest=2), len(sizes)
    assert batches.steps_per_epoch == steps
    for epoch in range(3):
        found = [batches.batch(epoch * steps + step) for step in range(steps)]
        assert [at for at, _ in found] == [epoch] * steps
        assert [len(ids) for _, ids in found] == sizes
        assert len(torch.cat([ids for _, ids in found]).unique()) == sum(sizes)
        assert torch.equal(torch.cat([ids for _, ids in found]), order(count, 0, epoch)[: sum(sizes)])


def test_the_images_of_the_steps_before_are_counted():
    for batches in (Order(14, 4, 0), Order(14, 4, 0, smallest=2)):
        sizes = [len(batches.batch(step)[1]) for step in range(9)]
        assert [batches.images(step) for step in range(10)] == [sum(sizes[:step]) for step in range(10)]


@pytest.mark.parametrize(("count", "size"), [(13, 2), (14, 2), (15, 2), (27, 4), (26, 4)])
def test_the_ranks_share_each_global_batch_without_gap_or_overlap(count, size):
    batches = [Order(count, 4 * size // 2, 0, smallest=size) for _ in range(size + 1)]
    whole = take(Loader(images(count), batches[-1]), 9)
    shares = [take(Loader(images(count), batches[rank], rank=rank, size=size), 9) for rank in range(size)]
    for (epoch, ids), *parts in zip(whole, *shares, strict=True):
        assert [at for at, _ in parts] == [epoch] * size
        assert [image for _, part in parts for image in part] == ids
        lengths = [len(part) for _, part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) >= 1


@pytest.mark.parametrize("smallest", [None, 1])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 6])
def test_a_run_resumed_at_any_step_sees_what_a_straight_run_sees(start, smallest):
    def batches():
        return Order(13, 4, 0, smallest=smallest)

    straight = take(Loader(images(13), batches()), 8)
    assert take(Loader(images(13), batches(), start=start), 8 - start) == straight[start:]


def test_a_batch_holds_the_pixels_of_its_ids():
    batch = next(iter(Loader(images(13), Order(13, 4, 0))))
    assert batch.images.squares[0][:, 0, 0, 0].tolist() == batch.ids.tolist()


def test_fewer_images_than_a_batch_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="7 images are fewer than a batch of 8"):
        Order(7, 8, 0)
    assert Order(8, 8, 0).steps_per_epoch == 1


@pytest.mark.parametrize(("batch", "size", "nearest"), [(10, 4, 8), (11, 4, 12), (3, 8, 8)])
def test_an_indivisible_batch_is_refused_with_the_nearest_that_divides(batch, size, nearest):
    with pytest.raises(ValueError, match=f"batch of {batch} .* {size} processes; use {nearest}$"):
        Loader(images(20), Order(20, batch, 0), size=size)


# Batches of classes


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
    order = ClassOrder(LABELS, 12, 4, seed=0)
    loaders = [iter(Loader(images(90), order, rank=rank, size=2, start=5)) for rank in range(2)]
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
    ("sizes", "batch", "per_class", "expected"),
    [
        ([44] * 4, 250, 50, "train.batch_size=176 train.images_per_class=44"),
        ([70, 44, 44], 50, 50, "train.batch_size=50 train.images_per_class=25"),
        ([120, 14, 2, 1], 250, 50, "train.batch_size=28 train.images_per_class=14"),
        ([9, 1, 1], 8, 4, "no two classes have two images each"),
        ([3], 2, 2, "no two classes have two images each"),
    ],
)
def test_the_way_out_is_a_batch_that_can_be_filled(sizes: list[int], batch: int, per_class: int, expected: str) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    said = way_out(torch.tensor(sizes).numpy(), batch, per_class)
    assert expected in said
    if numbers := re.findall(r"=(\d+)", said):
        order = ClassOrder(labels, int(numbers[0]), int(numbers[1]), seed=0)
        assert order.steps_per_epoch >= 1
        assert order.classes_per_batch >= 2


# Composition


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("order", [Order(52, 6, 0), ClassOrder(UNEVEN, 8, 4, 0)], ids=["as they come", "by class"])
def test_negatives_are_those_that_each_anchor_has_in_the_batches_of_an_epoch(order: Order, views: int) -> None:
    negatives = []
    for step in range(order.steps_per_epoch):
        classes = UNEVEN[order.batch(step)[1]].repeat(views).tolist()
        negatives += [sum(other != own for other in classes) for own in classes]
    found = composition(order, UNEVEN, views=views)
    assert found.negatives == pytest.approx(sum(negatives) / len(negatives))
    assert found.batches == order.steps_per_epoch


def test_batches_of_one_class_and_of_single_images_are_counted() -> None:
    order = Order(52, 2, 0)
    batches = [UNEVEN[order.batch(step)[1]].tolist() for step in range(order.steps_per_epoch)]
    one_class = sum(first == second for first, second in batches)
    found = composition(order, UNEVEN, views=1)
    assert 0 < one_class < len(batches)
    assert (found.without_negatives, found.without_positives) == (one_class, len(batches) - one_class)
    assert composition(order, UNEVEN, views=2).without_positives == 0


def test_paired_off_embeddings_have_the_second_ones_of_other_classes_as_negatives() -> None:
    order, negatives = Order(52, 10, 3), []
    for step in range(order.steps_per_epoch):
        pairs = [
            own
            for own, group in itertools.groupby(sorted(UNEVEN[order.batch(step)[1]].tolist()))
            for _ in range(len(list(group)) // 2)
        ]
        negatives += [sum(other != own for other in pairs) for own in pairs]
    expected = sum(negatives) / len(negatives)
    assert composition(order, UNEVEN, views=1, paired=True).negatives == pytest.approx(expected)
