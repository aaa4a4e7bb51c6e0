"""Losses over given relations, against loops over lists in float64."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from manyviews.objectives import (
    OBJECTIVES,
    Contrastive,
    LogRatio,
    Margin,
    NoiseContrastive,
    NPair,
    Population,
    Ranking,
    Triplet,
)
from manyviews.objectives.log_ratio import Squared
from manyviews.objectives.noise_contrastive import draw
from manyviews.objectives.relations import Lists, Relations
from manyviews.objectives.settings import ObjectiveSettings

PAIRS = Relations(
    "pairs", torch.tensor([[0, 1], [0, 2], [1, 2], [5, 3]]), torch.tensor([[1.0], [0.25], [0.0], [0.5]]), size=3
)
TRIPLETS = Relations(
    "triplets", torch.tensor([[0, 1, 2], [0, 2, 3], [1, 2, 0], [4, 5, 1]]), torch.tensor([[1.0, 0.0]] * 4), size=3
)
RANKED = Relations(
    "ranked",
    torch.tensor([[0, 1], [0, 2], [0, 3], [1, 4], [1, 5], [2, 0]]),
    torch.tensor([[4.0], [1.0], [1.0], [0.0], [2.0], [3.0]]),
    size=4,
)
BATCHES = {
    # The second list of each has a query as an item; of ranked lists the last has one item.
    "pairs": [0, 1, 2, 5, 3, 5, 1, 2, 6, 0, 2, 1],
    "triplets": [0, 1, 2, 1, 2, 0, 4, 5, 1, 0, 2, 3],
    "ranked": [0, 3, 1, 2, 1, 5, 4, 1, 2, 0, 2, 2],
}
IMAGES, DIM = 7, 4


class Item(NamedTuple):
    """An item of a list, with its query."""

    query: Tensor
    item: Tensor
    relevance: float
    images: tuple[int, int]

    @property
    def cosine(self) -> Tensor:
        return torch.dot(self.query, self.item) / (self.query.norm() * self.item.norm())

    @property
    def square(self) -> Tensor:
        return 2 - 2 * self.cosine

    @property
    def distance(self) -> Tensor:
        return self.square.sqrt()

    @property
    def euclidean(self) -> Tensor:
        return (self.query - self.item).norm()

    @property
    def product(self) -> Tensor:
        return torch.dot(self.query, self.item)


def lists_of(z: Tensor, relations: Relations) -> list[list[Item]]:
    """The lists of a batch, of both views."""
    ids, size = BATCHES[relations.kind], relations.size
    rows = [tuple(row) for row in relations.rows.tolist()]
    known = dict(zip(rows, relations.relevances.tolist(), strict=True))
    related = {pair for row in rows for item in row[1:] for pair in ((row[0], item), (item, row[0]))}
    width, lists = len(rows[0]) - 1, []
    for view in z:
        for first in range(0, len(ids), size):
            query, items = ids[first], []
            for start in range(first + 1, first + size, width):
                seats = range(start, start + width)
                relevances = known.get((query, *(ids[seat] for seat in seats)), ())
                for seat, relevance in zip(seats, relevances, strict=False):
                    items.append(Item(view[first], view[seat], relevance, (query, ids[seat])))
            for other in z if relations.others else ():
                for seat, image in enumerate(ids):
                    if image != query and (query, image) not in related:
                        items.append(Item(view[first], other[seat], 0.0, (query, image)))
            lists.append(items)
    return lists


def in_order(items: list[Item]) -> list[tuple[Item, Item]]:
    """Pairs of a more and a less relevant item."""
    return [(more, less) for more in items for less in items if more.relevance > less.relevance]


def mean(values: list[Tensor], weights: list[float] | None = None) -> Tensor:
    numbers = torch.tensor(weights or [1.0] * len(values), dtype=torch.float64)
    return torch.dot(torch.stack(values), numbers) / numbers.sum()


def contrastive(lists: list[list[Item]], settings: Contrastive) -> Tensor:
    items = [item for items in lists for item in items]
    distances = [item.distance if settings.normalized else item.euclidean for item in items]
    if settings.form == "hinge_of_squares":
        distances = [distance**2 for distance in distances]
    pulls, pushes = distances, [(settings.margin - distance).clamp(min=0) for distance in distances]
    different = [1 - item.relevance for item in items]
    if settings.average == "active":
        different = [weight * float(push > 0) for weight, push in zip(different, pushes, strict=True)]
    if settings.form == "squared_hinge":
        pulls, pushes = [pull**2 / 2 for pull in pulls], [push**2 / 2 for push in pushes]
    return mean(pulls, [item.relevance for item in items]) + mean(pushes, different)


def triplet(lists: list[list[Item]], settings: Triplet) -> Tensor:
    def apart(item: Item) -> Tensor:
        distance = item.distance if settings.normalized else item.euclidean
        return distance**2 if settings.squared else distance

    triplets = [(apart(more), apart(less)) for items in lists for more, less in in_order(items)]
    if settings.form == "soft":
        return mean([torch.log1p((near - far).exp()) for near, far in triplets])
    if settings.form == "softmax":
        return mean([torch.stack([near, far]).softmax(0)[0] ** 2 for near, far in triplets])
    if settings.form == "ratio":
        losses = [(1 - far / (near + settings.margin)).clamp(min=0) for near, far in triplets]
    else:
        losses = [(near - far + settings.margin).clamp(min=0) for near, far in triplets]
    return mean(losses, None if settings.average == "all" else [float(loss > 0) for loss in losses])


def margin(lists: list[list[Item]], settings: Margin, boundaries: Tensor) -> Tensor:
    losses, active, total = [], 0.0, torch.zeros((), dtype=torch.float64)
    for item in (item for items in lists for item in items):
        beta = boundaries[item.images[0] if len(boundaries) > 1 else 0]
        pull = (settings.margin + item.distance - beta).clamp(min=0)
        push = (settings.margin - item.distance + beta).clamp(min=0)
        same = item.relevance
        losses.append(same * pull + (1 - same) * push + settings.nu * beta * same)
        active += same * float(pull > 0) + (1 - same) * float(push > 0)
    return sum(losses, total) / active


def n_pair(lists: list[list[Item]], settings: NPair, z: Tensor) -> Tensor:
    losses = []
    for items in lists:
        for item in items:
            lower = [other.product - item.product for other in items if other.relevance < item.relevance]
            if lower and settings.form == "multi_class":
                losses.append(torch.log1p(torch.stack(lower).exp().sum()))
            elif lower:
                losses.append(torch.log1p(torch.stack(lower).exp()).sum())
    return mean(losses) + settings.norm_penalty / 2 * z.flatten(0, 1).square().sum(1).mean()


def ranking(lists: list[list[Item]], settings: Ranking, threshold: Tensor | None) -> Tensor:
    losses = []
    for items in lists:
        pairs = in_order(items)
        if not pairs:
            continue
        cosines = torch.stack([item.cosine for item in items])
        highest = 4.0 if any(item.relevance > 1 for every in lists for item in every) else 1.0
        relevances = torch.tensor([item.relevance / highest for item in items], dtype=torch.float64)
        scores = (cosines - (0 if threshold is None else threshold)) / settings.temperature
        apart = [(less.cosine - more.cosine) / settings.temperature for more, less in pairs]
        match settings.loss:
            case "squared_error":
                loss = ((cosines - relevances) ** 2).mean()
            case "cross_entropy":
                chances = scores.sigmoid()
                loss = -(relevances * chances.log() + (1 - relevances) * (1 - chances).log()).mean()
            case "rank_net":
                loss = mean([torch.log1p(difference.exp()) for difference in apart])
            case "hinge":
                loss = mean([(1 + difference).clamp(min=0) for difference in apart])
            case "list_net":
                loss = -torch.dot((relevances / settings.label_temperature).softmax(0), scores.log_softmax(0))
            case "list_mle":
                above = [number for number, value in enumerate(relevances) if value > relevances.min()]
                tails = [scores[relevances <= relevances[number]].logsumexp(0) for number in above]
                loss = mean([tail - scores[number] for tail, number in zip(tails, above, strict=True)])
        losses.append(loss)
    return mean(losses)


class Case(NamedTuple):
    """An objective, the relations that it is trained by, and its loops."""

    settings: ObjectiveSettings
    relations: Relations
    by_loops: Callable[..., Tensor]
    """Of the lists, the settings, and what else is named in `GIVEN`."""


CASES = {
    "contrastive": Case(Contrastive(), PAIRS, contrastive),
    "contrastive, all": Case(Contrastive(margin=1.9, average="all"), PAIRS, contrastive),
    "contrastive, distances": Case(Contrastive(form="hinge", normalized=False, margin=3.0), PAIRS, contrastive),
    "contrastive, squares": Case(Contrastive(form="hinge_of_squares", margin=1.5), PAIRS, contrastive),
    "triplet": Case(Triplet(margin=0.5), TRIPLETS, triplet),
    "triplet, all": Case(Triplet(margin=0.5, squared=False, normalized=False, average="all"), TRIPLETS, triplet),
    "triplet, soft": Case(Triplet(form="soft"), RANKED, triplet),
    "triplet, softmax": Case(Triplet(form="softmax", squared=False), RANKED, triplet),
    "triplet, ratio": Case(Triplet(form="ratio"), TRIPLETS, triplet),
    "triplet, ranked": Case(Triplet(), RANKED, triplet),
    "margin": Case(Margin(nu=0.1), TRIPLETS, margin),
    "margin, pairs": Case(Margin(nu=0.1, beta_per="class"), PAIRS, margin),
    "n_pair": Case(NPair(), TRIPLETS, n_pair),
    "n_pair, ranked": Case(NPair(norm_penalty=0.1), RANKED, n_pair),
    "n_pair, one_vs_one": Case(NPair(form="one_vs_one"), RANKED, n_pair),
    **{
        f"ranking, {loss}": Case(Ranking(loss=loss, temperature=0.5), RANKED, ranking)
        for loss in ("squared_error", "cross_entropy", "rank_net", "hinge", "list_net", "list_mle")
    },
    "ranking, triplets": Case(Ranking(), TRIPLETS, ranking),
}


def drawn() -> Tensor:
    """Embeddings of two views."""
    return torch.randn(2, 12, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(one) if part is None else part for one, part in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_loops_over_lists(name: str, others: bool) -> None:
    settings, relations, by_loops = CASES[name]
    relations = relations._replace(others=others)
    population = Population(torch.arange(IMAGES), lists=Lists(relations))
    objective = settings.build(dim=DIM, population=population, seed=0).double()
    z, ids = drawn().requires_grad_(), torch.tensor(BATCHES[relations.kind])
    loss, terms = objective(z, ids, None, 0)
    lists, learned = lists_of(z, relations), list(objective.parameters())
    given = [z] if isinstance(settings, NPair) else learned
    expected = by_loops(lists, settings, *(given or ([None] if isinstance(settings, Ranking) else [])))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, [z, *learned]), gradients(expected, [z, *learned]))
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("squared", ["both", "embeddings", "neither"])
def test_the_log_ratio_is_that_of_the_given_triplets_whatever_their_order(squared: Squared) -> None:
    labels = torch.tensor([[0.0], [1.0], [3.0], [0.0], [2.5], [-1.0], [8.0]], dtype=torch.float64)
    settings, z = LogRatio(squared=squared, epsilon=0.01), drawn().requires_grad_()
    population = Population(torch.arange(IMAGES), labels, lists=Lists(TRIPLETS))
    objective = settings.build(dim=DIM, population=population, seed=0).double()
    loss, terms = objective(z, torch.tensor(BATCHES["triplets"]), None, 0)
    power, label_power = {"both": (1.0, 1.0), "embeddings": (1.0, 0.5), "neither": (0.5, 0.5)}[squared]

    def spread(points: Tensor) -> Tensor:
        return torch.cdist(points, points).square().mean()

    def misfit(item: Item) -> Tensor:
        apart = (item.euclidean**2 + 0.01 * spread(z.detach().flatten(0, 1))).log() * power
        first, second = (labels[image] for image in item.images)
        return apart - ((first - second).square().sum() + 0.01 * spread(labels)).log() * label_power

    # Image 3 has the label of image 0: the second list of each view, and the last, have no ratio.
    lists = [items for items in lists_of(z, TRIPLETS) if 3 not in {item.images[1] for item in items}]
    assert len(lists) == 6
    expected = mean([(misfit(first) - misfit(second)) ** 2 for first, second in lists])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, [z]), gradients(expected, [z]))
    assert terms["negatives"] == (2 * 6 + 2) / 8


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("correction", [False, True])
def test_of_a_pair_each_image_is_the_others_context(correction: bool, shared: bool, others: bool) -> None:
    settings = NoiseContrastive(negatives=6, temperature=0.5, correction=correction, shared=shared)
    relations, ids = PAIRS._replace(others=others), BATCHES["pairs"]
    population = Population(torch.arange(IMAGES), lists=Lists(relations))
    objective = settings.build(dim=DIM, population=population, seed=3).double()
    z, learned = drawn().requires_grad_(), list(objective.parameters())
    loss, _ = objective(z, torch.tensor(ids), None, 7)
    # Images 4 and 6 are in no pair.
    frequencies = torch.tensor([2.0, 2, 2, 1, float(others), 1, float(others)], dtype=torch.float64)
    chances = (frequencies**0.75).where(frequencies > 0, 0)
    cumulated, size = chances.cumsum(0), relations.size
    anchors = 2 * (size - 1) * len(ids) // size
    noise = draw(cumulated, 6 if shared else anchors * 2 * 6, seed=3, step=7)
    noise = noise.expand(anchors, 2, 6) if shared else noise.view(anchors, 2, 6)
    assert others or not torch.isin(noise, torch.tensor([4, 6])).any()
    rows = objective.get_parameter("weight")
    log_z = objective.get_parameter("log_normaliser") if correction else torch.zeros(())
    known = {
        (row[0], row[1]): value[0] for row, value in zip(PAIRS.rows.tolist(), PAIRS.relevances.tolist(), strict=True)
    }

    def logit(embedding: Tensor, image: int) -> Tensor:
        score = torch.dot(embedding / embedding.norm(), rows[image] / rows[image].norm()) / 0.5
        return score - log_z - torch.log(6 * chances[image] / cumulated[-1]) if correction else score

    losses, number = [], 0
    for first in range(0, len(ids), size):
        items = range(first + 1, first + size)
        for seat, other in [*((first, item) for item in items), *((item, first) for item in items)]:
            pair = tuple(ids[one] for one in ((seat, other) if seat == first else (other, seat)))
            for view in range(2) if pair in known else ():
                same, own = known[pair], logit(z[view, seat], ids[other])
                drawn_ids = [int(image) for image in noise[number, view] if correction or image != ids[other]]
                against = [torch.log1p(logit(z[view, seat], image).exp()) for image in drawn_ids]
                real = torch.log1p((-own).exp()) + sum(against)
                losses.append(same * real + (1 - same) * torch.log1p(own.exp()))
            number += 1
    expected = mean(losses)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, [z, *learned]), gradients(expected, [z, *learned]))


def test_the_shares_of_triplets_are_counted() -> None:
    angles = torch.tensor([0.0, 0.5, 0.4, 0.0, 0.5, 0.6, 0.0, 0.5, 3.0])
    points = torch.stack([angles.cos(), angles.sin()], 1)
    rows = torch.arange(9).view(3, 3)
    relations = Relations("triplets", rows, torch.tensor([[1.0, 0.0]] * 3), size=3)
    population = Population(torch.arange(9), lists=Lists(relations))
    for soft, easy in ((False, 1), (True, 0)):
        objective = Triplet(margin=0.2, form="soft" if soft else "hinge").build(dim=2, population=population, seed=0)
        terms = objective(points[None], torch.arange(9), None, 0).terms
        shares = [terms[name].item() * 3 for name in ("hard", "semi_hard", "easy", "active")]
        assert shares == pytest.approx([1, 2 - easy, easy, 3 - easy])
        assert terms["positive_similarity"].item() == pytest.approx(math.cos(0.5))
        assert terms["negatives"] == 1


@pytest.mark.parametrize("name", [*CASES, "noise_contrastive", "log_ratio"])
def test_a_batch_without_any_relation_teaches_nothing(name: str) -> None:
    case = CASES.get(name) or Case(OBJECTIVES[name](), PAIRS if name == "noise_contrastive" else TRIPLETS, mean)
    lists = Lists(case.relations)
    values = torch.randn(IMAGES, 1) if name == "log_ratio" else None
    settings = case.settings.model_copy(update={"norm_penalty": 0.0} if isinstance(case.settings, NPair) else {})
    objective = settings.build(dim=DIM, population=Population(torch.arange(IMAGES), values, lists=lists), seed=0)
    z = drawn().float().requires_grad_()
    loss = objective(z, torch.full((12,), 6), None, 0).total
    assert loss == 0
    assert not gradients(loss, [z])[0].any()


def test_what_lists_leave_undefined_is_refused() -> None:
    population = Population(torch.arange(IMAGES), torch.randn(IMAGES, 1), lists=Lists(TRIPLETS._replace(others=True)))
    with pytest.raises(ValueError, match="with no other images of the batch"):
        LogRatio().build(dim=DIM, population=population, seed=0)
    with pytest.raises(ValueError, match=r"set objective\.symmetric=false"):
        NPair(symmetric=True).build(dim=DIM, population=population, seed=0)
