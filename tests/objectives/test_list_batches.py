"""Lists of relations in a batch: what is looked up, and what is summed."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from manyviews.objectives.relations import Lists, Measure, Relations, list_batch
from manyviews.system import distributed
from processes import start

PAIRS = Relations("pairs", torch.tensor([[0, 1], [0, 2], [5, 3]]), torch.tensor([[1.0], [0.25], [0.5]]), size=3)
TRIPLETS = Relations(
    "triplets", torch.tensor([[0, 1, 2], [0, 2, 3], [1, 2, 0]]), torch.tensor([[1.0, 0.0]] * 3), size=3
)


def weigh(lists: slice, products: Tensor, relevances: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Gives each item another weight, by its relevance."""
    total = (products.square() * (1 + relevances)).where(there, 0).sum()
    return total, torch.stack([there.sum(), relevances.sum()])


def of_pair(measure: Measure, first: Tensor, second: Tensor) -> Tensor:
    if measure == "squared_distance":
        return (first - second).square().sum()
    product = torch.dot(first, second)
    return product / (first.norm() * second.norm()) if measure == "cosine" else product


def by_loops(
    embeddings: Tensor, ids: list[int], relations: Relations, measure: Measure, keys: int | None = None
) -> Tensor:
    """The sum of `weigh` over all lists of the whole batch."""
    known = {
        (row[0], *row[1:]): values for row, values in zip(relations.rows.tolist(), relations.relevances, strict=True)
    }
    pairs = {frozenset((row[0], item)) for row in relations.rows.tolist() for item in row[1:]}
    compared = embeddings[:keys]
    width, total = relations.rows.shape[1] - 1, torch.zeros((), dtype=embeddings.dtype)
    for number, view in enumerate(embeddings):
        own = compared[number % len(compared)]
        for first in range(0, len(ids), relations.size):
            query, items = ids[first], list(range(first + 1, first + relations.size))
            for group in range(0, len(items), width):
                seats = items[group : group + width]
                for seat, relevance in zip(seats, known.get((query, *(ids[seat] for seat in seats)), ()), strict=False):
                    total = total + of_pair(measure, view[first], own[seat]) ** 2 * (1 + relevance)
            for other in compared if relations.others else ():
                for seat, image in enumerate(ids):
                    if image != query and frozenset((query, image)) not in pairs:
                        total = total + of_pair(measure, view[first], other[seat]) ** 2
    return total


IDS = [0, 1, 2, 5, 3, 5, 0, 2, 3, 4, 1, 0]


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("relations", [PAIRS, TRIPLETS], ids=lambda relations: str(relations.kind))
@pytest.mark.parametrize("measure", ["cosine", "product", "squared_distance"])
def test_the_sum_and_its_gradient_are_those_of_loops_over_lists(
    measure: Measure, relations: Relations, others: bool
) -> None:
    embeddings = drawn().requires_grad_()
    relations = relations._replace(others=others)
    expected = by_loops(embeddings, IDS, relations, measure)
    total, _ = list_batch(embeddings, torch.tensor(IDS), Lists(relations), measure).sum(weigh)
    torch.testing.assert_close(total, expected)
    gradients = (torch.autograd.grad(value, embeddings)[0] for value in (total, expected))
    torch.testing.assert_close(*gradients)


def test_a_query_in_the_place_of_an_item_is_none() -> None:
    relevances, there = Lists(PAIRS).relevances(torch.tensor([[5, 3, 5], [0, 0, 2], [9, 1, 9]]))
    assert there.tolist() == [[True, False], [False, True], [False, False]]
    assert relevances.tolist() == [[0.5, 0.0], [0.0, 0.25], [0.0, 0.0]]


@pytest.mark.parametrize("others", [False, True])
def test_a_local_view_is_a_query_but_nobodys_item(others: bool) -> None:
    embeddings, relations = torch.cat([drawn(), drawn() + 1]), PAIRS._replace(others=others)
    total, _ = list_batch(embeddings, torch.tensor(IDS), Lists(relations), "cosine", keys=2).sum(weigh)
    torch.testing.assert_close(total, by_loops(embeddings, IDS, relations, "cosine", keys=2))


def test_images_without_a_relation_are_those_that_no_row_has_with_the_query() -> None:
    unrelated = Lists(TRIPLETS).unrelated(torch.tensor([0, 3]), torch.arange(6))
    assert unrelated.tolist() == [[False, False, False, False, True, True], [False, True, True, False, True, True]]


def test_the_similarity_of_positives_is_weighted_by_relevance() -> None:
    similarity = list_batch(drawn(), torch.tensor(IDS), Lists(PAIRS), "product").positive_similarity
    weights = {(0, 1): 1.0, (0, 2): 0.25, (5, 3): 0.5}
    known = [(first, item) for first in range(0, len(IDS), 3) for item in (first + 1, first + 2)]
    shares = [weights.get((IDS[query], IDS[item]), 0.0) for query, item in known]
    cosines = [[of_pair("cosine", view[query], view[item]) for query, item in known] for view in drawn()]
    expected = sum(torch.dot(torch.stack(row), torch.tensor(shares).double()) for row in cosines) / (2 * sum(shares))
    torch.testing.assert_close(similarity, expected)


def test_a_batch_is_of_whole_lists() -> None:
    with pytest.raises(ValueError, match="11 images are no whole number of lists of 3"):
        list_batch(drawn()[:, 1:], torch.tensor(IDS)[1:], Lists(PAIRS), "cosine")


def test_lists_of_triplets_are_of_three_images() -> None:
    with pytest.raises(ValueError, match="a triplet is a list of 3 images, and size is 5"):
        Lists(TRIPLETS._replace(size=5))


def drawn() -> Tensor:
    """Embeddings of a whole batch."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, len(IDS), 5, dtype=torch.float64, generator=generator)


def sums(embeddings: Tensor, ids: Tensor, others: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Total, figures and gradient."""
    embeddings = embeddings.detach().requires_grad_()
    total, figures = list_batch(embeddings, ids, Lists(PAIRS._replace(others=others)), "cosine").sum(weigh)
    return total.detach(), figures, torch.autograd.grad(total, embeddings)[0]


def _on_a_rank(rank: int, folder: str, others: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = distributed.share(len(IDS))
    torch.save(sums(drawn()[:, own], torch.tensor(IDS)[own], others), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("others", [False, True])
def test_two_processes_sum_the_lists_of_one(others: bool, tmp_path: Path) -> None:
    start(_on_a_rank, (str(tmp_path), others), count=2)
    totals, figures, gradients = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    total, whole_figures, gradient = sums(drawn(), torch.tensor(IDS), others)
    torch.testing.assert_close(sum(totals), total)
    torch.testing.assert_close(sum(figures), whole_figures)
    torch.testing.assert_close(torch.cat(gradients, 1), gradient)
