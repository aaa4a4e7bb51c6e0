"""Batches of whole lists of relations: each relation once in an epoch, the same on any number of processes."""

import re
from collections import Counter

import pytest
import torch
from torch import Tensor

from manyviews.data import InMemory, Loader, RelationOrder, RelationTable
from manyviews.data.images import Names
from manyviews.data.relation_order import list_size

PAIRS = RelationTable("pairs", torch.tensor([[0, 1], [0, 2], [3, 4], [5, 6], [2, 7]]), torch.tensor([1, 0, 1, 0.5, 0]))
TRIPLETS = RelationTable("triplets", torch.arange(21).view(7, 3), torch.ones(7))
# Query 9 has six items, two of the highest relevance; query 2 has two, query 5 one.
RANKED = RelationTable(
    "ranked",
    torch.tensor([[2, 0], [2, 1], [5, 3], *([9, item] for item in (0, 1, 3, 4, 6, 7))]),
    torch.tensor([1.0, 2, 3, 0, 1, 4, 2, 4, 0]),
)


def epochs(order: RelationOrder, count: int) -> list[list[list[int]]]:
    """The lists of each epoch."""
    steps = order.steps_per_epoch
    return [
        torch.cat([order.batch(epoch * steps + step)[1] for step in range(steps)]).view(-1, order.size).tolist()
        for epoch in range(count)
    ]


def test_each_triplet_comes_once_in_an_epoch_and_in_another_order_in_the_next() -> None:
    first, second = epochs(RelationOrder(TRIPLETS, 3, 3, seed=0), 2)
    assert sorted(first) == sorted(second) == TRIPLETS.ids.tolist()
    assert first != second


def test_the_rest_that_fills_no_batch_differs_between_epochs() -> None:
    order = RelationOrder(TRIPLETS, 3, 9, seed=0)
    assert order.steps_per_epoch == 2
    assert [order.images(step) for step in range(4)] == [0, 9, 18, 27]
    left_out = {frozenset(range(21)) - {image for triplet in lists for image in triplet} for lists in epochs(order, 9)}
    assert len(left_out) > 1


def test_either_image_of_a_pair_is_the_query_about_half_of_the_time() -> None:
    order = RelationOrder(PAIRS, 2, 2, seed=0)
    seen = Counter(tuple(pair) for lists in epochs(order, 200) for pair in lists)
    assert {tuple(sorted(pair)) for pair in seen} == {tuple(pair) for pair in PAIRS.ids.tolist()}
    for a, b in PAIRS.ids.tolist():
        assert seen[a, b] + seen[b, a] == 200
        assert 70 < seen[a, b] < 130


def test_ranked_lists_are_filled_up_with_their_query() -> None:
    assert list_size(RANKED) == 7
    lists = {row[0]: row[1:] for row in epochs(RelationOrder(RANKED, 7, 21, seed=0), 1)[0]}
    assert sorted(lists[9]) == [0, 1, 3, 4, 6, 7]
    assert sorted(lists[2]) == [0, 1, 2, 2, 2, 2]
    assert lists[5] == [3, 5, 5, 5, 5, 5]


def test_a_longer_list_has_other_items_in_each_epoch_a_best_one_and_a_lesser_one_among_them() -> None:
    size = list_size(RANKED, 2)
    drawn = [
        sorted(row[1:]) for lists in epochs(RelationOrder(RANKED, size, 9, seed=0), 60) for row in lists if row[0] == 9
    ]
    assert all(len({3, 6} & {*items}) == 1 for items in drawn)
    assert {item for items in drawn for item in items} == {0, 1, 3, 4, 6, 7}
    assert len({tuple(items) for items in drawn}) == 8
    assert {
        tuple(row) for lists in epochs(RelationOrder(RANKED, 2, 6, seed=0), 20) for row in lists if row[0] == 9
    } == {
        (9, 3),
        (9, 6),
    }


def test_a_list_has_as_many_items_as_the_longest_and_at_most_fifteen() -> None:
    rows = torch.tensor([[0, item] for item in range(1, 31)])
    assert list_size(RelationTable("ranked", rows, torch.ones(30))) == 16
    assert list_size(RelationTable("ranked", rows, torch.ones(30)), 20) == 21
    assert (list_size(PAIRS), list_size(TRIPLETS)) == (2, 3)


def test_the_batches_depend_on_seed_and_step_alone() -> None:
    table, later = RANKED, RelationOrder(RANKED, 4, 4, seed=3)
    batches = [RelationOrder(table, 4, 4, seed=3).batch(step)[1] for step in range(12)]
    assert all(torch.equal(later.batch(step)[1], batches[step]) for step in reversed(range(12)))
    assert not all(torch.equal(RelationOrder(table, 4, 4, seed=4).batch(step)[1], batches[step]) for step in range(12))


def test_ranks_share_whole_lists_and_together_have_the_batch_of_one() -> None:
    pixels = torch.zeros(21, 1, 2, 2, dtype=torch.uint8)
    images = InMemory(pixels, Names(map(str, range(21))), None, (), "")
    order = RelationOrder(TRIPLETS, 3, 6, seed=0, processes=2)

    def taken(rank: int, size: int, start: int = 0) -> list[Tensor]:
        loader = iter(Loader(images, order, rank=rank, size=size, start=start))
        return [next(loader).ids for _ in range(8 - start)]

    whole, parts = taken(0, 1), [taken(rank, 2) for rank in range(2)]
    assert all(torch.equal(torch.cat(both), one) for one, *both in zip(whole, *parts, strict=True))
    assert all(torch.equal(one, again) for one, again in zip(whole[5:], taken(0, 1, start=5), strict=True))


def test_images_of_no_relation_stand_in_whole_groups_between_the_lists() -> None:
    others = torch.arange(21, 34)
    order = RelationOrder(TRIPLETS, 3, 15, seed=0, processes=1, others=others, unrelated=6)
    assert (order.steps_per_epoch, order.images(2)) == (2, 30)
    seen = []
    for step in range(4):
        groups = order.batch(step)[1].view(5, 3)
        drawn = groups.min(1).values >= 21
        assert int(drawn.sum()) == 2
        assert groups[~drawn].tolist() == [row for row in groups.tolist() if row in TRIPLETS.ids.tolist()]
        # Either half of the batch has one.
        assert int(drawn[:2].sum()) == int(drawn[2:].sum()) == 1
        assert len(groups[drawn].unique()) == 6
        seen.append(groups[drawn].flatten())
    assert len(torch.cat(seen[:2]).unique()) == 12
    with pytest.raises(ValueError, match=r"train.unrelated=4 must .* a multiple of 3, as they are; use 3"):
        RelationOrder(TRIPLETS, 3, 15, seed=0, others=others, unrelated=4)
    with pytest.raises(ValueError, match=r"train.unrelated=15 must leave room .* use 12"):
        RelationOrder(TRIPLETS, 3, 15, seed=0, others=others, unrelated=15)
    with pytest.raises(ValueError, match=r"train.unrelated=15, and 13 images of all are in no relation; use 12"):
        RelationOrder(TRIPLETS, 3, 30, seed=0, others=others, unrelated=15)


@pytest.mark.parametrize(
    ("batch", "processes", "message"),
    [
        (256, 1, "train.batch_size=256 does not hold whole lists of 3 images, which a triplet takes; use 255"),
        (9, 2, "whole lists of 3 images, which a triplet takes, on each of 2 processes; use 12"),
        (2, 1, "use 3"),
        (24, 1, "7 triplets are fewer than the 8 in a batch of 24 images; use train.batch_size=21, or give more"),
        (24, 4, "7 triplets are fewer than the 8 in a batch of 24 images; use train.batch_size=12, or give more"),
        (
            24,
            8,
            "7 triplets are fewer than the 8 in a batch of 24 images; give more relations, or start fewer processes",
        ),
    ],
)
def test_a_batch_that_cannot_be_filled_is_an_error_with_the_way_out(batch: int, processes: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RelationOrder(TRIPLETS, 3, batch, seed=0, processes=processes)
