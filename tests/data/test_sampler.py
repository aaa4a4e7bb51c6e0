import pytest
import torch

from manyviews.data import Loader, Order
from manyviews.data.images import InMemory, Names
from manyviews.data.sampler import order


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
    assert batch.images[:, 0, 0, 0].tolist() == batch.ids.tolist()


def test_fewer_images_than_a_batch_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="7 images are fewer than a batch of 8"):
        Order(7, 8, 0)
    assert Order(8, 8, 0).steps_per_epoch == 1


@pytest.mark.parametrize(("batch", "size", "nearest"), [(10, 4, 8), (11, 4, 12), (3, 8, 8)])
def test_an_indivisible_batch_is_refused_with_the_nearest_that_divides(batch, size, nearest):
    with pytest.raises(ValueError, match=f"batch of {batch} .* {size} processes; use {nearest}$"):
        Loader(images(20), Order(20, batch, 0), size=size)
