"""What is counted of batches by classes, against the pairs themselves."""

import itertools

import pytest
import torch

from manyviews.data import ClassOrder, Order
from manyviews.data.sampler import composition

LABELS = torch.tensor([0] * 40 + [1] * 9 + [2] * 2 + [3])


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("order", [Order(52, 6, 0), ClassOrder(LABELS, 8, 4, 0)], ids=["as they come", "by class"])
def test_negatives_are_those_that_each_anchor_has_in_the_batches_of_an_epoch(order: Order, views: int) -> None:
    negatives = []
    for step in range(order.steps_per_epoch):
        classes = LABELS[order.batch(step)[1]].repeat(views).tolist()
        negatives += [sum(other != own for other in classes) for own in classes]
    found = composition(order, LABELS, views=views)
    assert found.negatives == pytest.approx(sum(negatives) / len(negatives))
    assert found.batches == order.steps_per_epoch


def test_batches_of_one_class_and_of_single_images_are_counted() -> None:
    order = Order(52, 2, 0)
    batches = [LABELS[order.batch(step)[1]].tolist() for step in range(order.steps_per_epoch)]
    one_class = sum(first == second for first, second in batches)
    found = composition(order, LABELS, views=1)
    assert 0 < one_class < len(batches)
    assert (found.without_negatives, found.without_positives) == (one_class, len(batches) - one_class)
    assert composition(order, LABELS, views=2).without_positives == 0


def test_paired_off_embeddings_have_the_second_ones_of_other_classes_as_negatives() -> None:
    order, negatives = Order(52, 10, 3), []
    for step in range(order.steps_per_epoch):
        pairs = [
            own
            for own, group in itertools.groupby(sorted(LABELS[order.batch(step)[1]].tolist()))
            for _ in range(len(list(group)) // 2)
        ]
        negatives += [sum(other != own for other in pairs) for own in pairs]
    expected = sum(negatives) / len(negatives)
    assert composition(order, LABELS, views=1, paired=True).negatives == pytest.approx(expected)
