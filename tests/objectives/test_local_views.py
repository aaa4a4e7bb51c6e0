"""Local views are anchors of the other views, and nobody's positive or negative: against double loops in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from manyviews.objectives import (
    Bank,
    Contrastive,
    InBatch,
    LogRatio,
    Margin,
    NearestNeighbours,
    Queue,
    Ranking,
    Supervised,
    Triplet,
)
from manyviews.objectives.mining import All
from manyviews.objectives.objective import Objective
from manyviews.objectives.settings import ObjectiveSettings, Population

KEYS, VIEWS, BATCH, DIM, IMAGES = 2, 5, 6, 4, 9
VALUES = torch.sin(torch.arange(2.0 * IMAGES)).view(IMAGES, 2).double()
TEMPERATURE = 0.3


def embeddings(seed: int = 0, views: int = VIEWS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, BATCH, DIM, generator=generator, dtype=torch.float64)


def ids_of(kind: str) -> Tensor:
    return torch.tensor([3, 1, 4, 0, 8, 5] if kind == "distinct" else [3, 1, 3, 0, 1, 1])


def build(settings: ObjectiveSettings, *, values: Tensor | None = None, keys: int | None = KEYS) -> Objective:
    population = Population(torch.arange(IMAGES), values, keys=keys)
    return settings.build(dim=DIM, population=population, seed=1).double()


def pairs() -> list[tuple[int, int]]:
    """Views and other views that are keys."""
    return [(view, key) for view in range(VIEWS) for key in range(KEYS) if key != view]


def check(objective: Objective, z: Tensor, ids: Tensor, expected: Tensor, targets: Tensor | None = None) -> None:
    """Compares loss and gradient of the objective with those of a loss that autograd has followed from `z`."""
    found = objective(z, ids, targets, 0).total
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0][KEYS:].abs().sum() > 0


@pytest.mark.parametrize("kind", ["distinct", "repeated"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_in_batch_is_the_mean_over_pairs_of_a_view_and_another_key(kind: str, decoupled: bool) -> None:
    z, ids = embeddings().requires_grad_(), ids_of(kind)
    unit, losses = F.normalize(z, dim=2), []
    for view, key in pairs():
        for image in range(BATCH):
            others = [
                unit[view, image] @ unit[other, j]
                for other in range(KEYS)
                for j in range(BATCH)
                if ids[j] != ids[image]
            ]
            positive = unit[view, image] @ unit[key, image] / TEMPERATURE
            negatives = torch.stack(others) / TEMPERATURE
            candidates = negatives if decoupled else torch.cat([negatives, positive[None]])
            losses.append(candidates.logsumexp(0) - positive)
    objective = build(InBatch(temperature=TEMPERATURE, decoupled=decoupled))
    check(objective, z, ids, torch.stack(losses).mean())


@pytest.mark.parametrize("kind", ["distinct", "repeated"])
def test_supervised_compares_every_view_with_the_keys_of_all_images(kind: str) -> None:
    z, ids = embeddings().requires_grad_(), ids_of(kind)
    unit, losses = F.normalize(z, dim=2), []
    for view, image in itertools.product(range(VIEWS), range(BATCH)):
        others = [(key, j) for key in range(KEYS) for j in range(BATCH) if (key, j) != (view, image)]
        logits = torch.stack([unit[view, image] @ unit[other] / TEMPERATURE for other in others])
        positive = torch.tensor([bool(ids[j] == ids[image]) for _, j in others])
        losses.append(logits.logsumexp(0) - logits[positive].mean())
    check(build(Supervised(temperature=TEMPERATURE)), z, ids, torch.stack(losses).mean())


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_queue_contrasts_local_views_with_the_keys_of_the_twin(symmetric: bool) -> None:
    settings = Queue(size=7, temperature=TEMPERATURE, symmetric=symmetric)
    objective, ids = build(settings), ids_of("distinct")
    rows: Tensor = objective.state_dict()["queue.rows"]
    z = embeddings(views=VIEWS if symmetric else VIEWS - 1).requires_grad_()
    targets = embeddings(5, views=KEYS if symmetric else 1)
    unit, twin, losses = F.normalize(z, dim=2), F.normalize(targets, dim=2), []
    for view, key in itertools.product(range(len(unit)), range(len(twin))):
        if symmetric and view == key:
            continue
        for image in range(BATCH):
            positive = unit[view, image] @ twin[key, image] / TEMPERATURE
            losses.append(torch.cat([rows @ unit[view, image] / TEMPERATURE, positive[None]]).logsumexp(0) - positive)
    check(objective, z, ids, torch.stack(losses).mean(), targets)
    objective.update(z.detach(), ids, targets)
    torch.testing.assert_close(objective.state_dict()["queue.rows"][:BATCH], twin[-1])


def test_neighbours_of_keys_are_compared_with_the_predictions_of_all_views() -> None:
    objective, ids = build(NearestNeighbours(size=BATCH, temperature=TEMPERATURE)), ids_of("distinct")
    support = embeddings(8)
    objective.update(embeddings(3), ids, support)
    z, targets = embeddings().requires_grad_(), embeddings(4)
    rows, unit, losses = F.normalize(support[0], dim=1), F.normalize(z, dim=2), []
    nearest = rows[(F.normalize(targets, dim=2) @ rows.T).argmax(2)]
    for view, other in ((view, other) for other, view in pairs()):
        logits = nearest[view] @ unit[other].T / TEMPERATURE
        losses.append(F.cross_entropy(logits, torch.arange(BATCH), reduction="none"))
    check(objective, z, ids, torch.cat(losses).mean(), targets)


def test_rows_of_a_bank_follow_the_keys_alone_and_all_views_are_anchors() -> None:
    objective, ids = build(Bank(temperature=TEMPERATURE)), ids_of("distinct")
    rows: Tensor = objective.state_dict()["rows"].clone()
    z = embeddings().requires_grad_()
    logits = F.normalize(z, dim=2) @ rows.T / TEMPERATURE
    expected = F.cross_entropy(logits.flatten(0, 1), ids.repeat(VIEWS))
    check(objective, z, ids, expected)
    objective.update(z.detach(), ids, None)
    rows[ids] = F.normalize(0.5 * rows[ids] + 0.5 * F.normalize(z.detach()[:KEYS], dim=2).mean(0), dim=1)
    torch.testing.assert_close(objective.state_dict()["rows"], rows)


def distances(z: Tensor, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Distances of each embedding from the keys with its id but itself, and from the keys of other ids."""
    unit, found = F.normalize(z, dim=2), []
    for view, image in itertools.product(range(VIEWS), range(BATCH)):
        others = [(key, j) for key in range(KEYS) for j in range(BATCH) if (key, j) != (view, image)]
        apart = torch.stack([(unit[view, image] - unit[other]).norm() for other in others])
        same = torch.tensor([bool(ids[j] == ids[image]) for _, j in others])
        found.append((apart[same], apart[~same]))
    return found


@pytest.mark.parametrize("kind", ["distinct", "repeated"])
def test_pairs_and_triplets_have_their_second_and_third_embedding_among_the_keys(kind: str) -> None:
    z, ids = embeddings().requires_grad_(), ids_of(kind)
    near, far = zip(*distances(z, ids), strict=True)
    positive, negative = torch.cat(near), torch.cat(far)
    pushes = (1.0 - negative).relu()
    expected = positive.square().mean() / 2 + pushes.square().sum() / 2 / (pushes > 0).sum()
    check(build(Contrastive()), z, ids, expected)
    excess = torch.cat([(p[:, None] - n + 0.5).relu().flatten() for p, n in zip(near, far, strict=True)])
    objective = build(Triplet(margin=0.5, squared=False, sampling=All()))
    check(objective, z, ids, excess.sum() / (excess > 0).sum())
    pulls, pushes = (positive - 1.0).relu(), (1.5 - negative).relu()
    active = (pulls > 0).sum() + (pushes > 0).sum()
    check(build(Margin(beta=1.25, margin=0.25, sampling=All())), z, ids, (pulls.sum() + pushes.sum()) / active)


def test_log_ratios_are_of_distances_from_keys() -> None:
    z, ids = embeddings().requires_grad_(), ids_of("distinct")
    apart = [[(z[v, b] - z[k, j]).square().sum() for k in range(KEYS) for j in range(BATCH) if j != b]
             for v in range(VIEWS) for b in range(BATCH)]  # fmt: skip
    labels = [[(VALUES[ids[b]] - VALUES[ids[j]]).square().sum() for _ in range(KEYS) for j in range(BATCH) if j != b]
              for _ in range(VIEWS) for b in range(BATCH)]  # fmt: skip
    losses = []
    for first, second in zip(apart, labels, strict=True):
        ratios = torch.stack(first).log() - torch.stack(second).log()
        losses += [(ratios[i] - ratios[j]).square() for i, j in itertools.combinations(range(len(ratios)), 2)]
    check(build(LogRatio(epsilon=1e-16), values=VALUES), z, ids, torch.stack(losses).mean())


@pytest.mark.parametrize("kind", ["distinct", "repeated"])
def test_keys_are_ranked_for_every_view(kind: str) -> None:
    z, ids = embeddings().requires_grad_(), ids_of(kind)
    unit, losses = F.normalize(z, dim=2), []
    for view, image in itertools.product(range(VIEWS), range(BATCH)):
        others = [(key, j) for key in range(KEYS) for j in range(BATCH) if (key, j) != (view, image)]
        scores = torch.stack([unit[view, image] @ unit[other] for other in others]) / TEMPERATURE
        relevance = torch.tensor([float(ids[j] == ids[image]) for _, j in others], dtype=torch.float64) / 0.1
        losses.append(-(relevance.softmax(0) * scores.log_softmax(0)).sum())
    check(build(Ranking(temperature=TEMPERATURE)), z, ids, torch.stack(losses).mean())


@pytest.mark.parametrize("settings", [InBatch(), Supervised(), Triplet(), Margin(), Ranking(), Contrastive()])
def test_with_all_views_as_keys_the_loss_is_that_without_local_views(settings: ObjectiveSettings) -> None:
    z, ids = embeddings(), ids_of("repeated")
    found, expected = (build(settings, keys=keys)(z, ids, None, 0) for keys in (VIEWS, None))
    torch.testing.assert_close(found.total, expected.total, rtol=1e-12, atol=1e-12)
    for name, value in expected.terms.items():
        torch.testing.assert_close(found.terms[name], value, rtol=1e-9, atol=1e-12)


def test_the_information_bound_counts_the_keys_as_candidates() -> None:
    terms = build(InBatch())(embeddings(), ids_of("distinct"), None, 0).terms
    assert terms["negatives"] == KEYS * (BATCH - 1)
    assert terms["ceiling"].item() == pytest.approx(math.log(1 + KEYS * (BATCH - 1)))
