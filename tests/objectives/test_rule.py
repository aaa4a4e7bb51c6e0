"""Relations of a rule, learned by each objective alone: embeddings are free, without an encoder or images."""

import pytest
import torch
from torch import Tensor

from manyviews.objectives import (
    Contrastive,
    LogRatio,
    Margin,
    NoiseContrastive,
    NPair,
    Population,
    Ranking,
    Triplet,
)
from manyviews.objectives.relations import Kind, Lists, Relations
from manyviews.objectives.settings import ObjectiveSettings

IMAGES, DIM, ITEMS, LISTS, STEPS = 40, 8, 8, 20, 150


def related(apart: Tensor, kind: Kind, generator: torch.Generator) -> Relations:
    """Relations of some images by how far they are apart: near pairs, the nearer of two, or items in order."""
    order = torch.stack([torch.randperm(IMAGES, generator=generator) for _ in range(600)])
    if kind == "pairs":
        rows = order[:, :2].unique(dim=0)
        return Relations(kind, rows, (apart[rows[:, 0], rows[:, 1]] < 0.3).float()[:, None], size=2)
    if kind == "triplets":
        rows = order[:, :3]
        swapped = apart[rows[:, 0], rows[:, 1]] > apart[rows[:, 0], rows[:, 2]]
        rows = torch.where(swapped[:, None], rows[:, [0, 2, 1]], rows)
        return Relations(kind, rows, torch.tensor([[1.0, 0.0]]).repeat(len(rows), 1), size=3)
    queries = torch.arange(IMAGES)[:, None]
    items = (queries + 1 + order[:IMAGES, :ITEMS] % (IMAGES - 1)) % IMAGES
    relevances = apart.gather(1, items).argsort(1, descending=True).argsort(1).float()
    return Relations(kind, torch.stack([queries.expand_as(items), items], 2).flatten(0, 1), relevances.view(-1, 1), 5)


def drawn(relations: Relations, generator: torch.Generator) -> Tensor:
    """Ids of a batch of lists."""
    if relations.kind != "ranked":
        return relations.rows[torch.randperm(len(relations.rows), generator=generator)[: 3 * LISTS]].flatten()
    queries = torch.randperm(IMAGES, generator=generator)[:LISTS]
    own = torch.stack([torch.randperm(ITEMS, generator=generator)[:4] for _ in queries])
    items = relations.rows.view(IMAGES, ITEMS, 2)[queries[:, None], own, 1]
    return torch.cat([queries[:, None], items], 1).flatten()


def share_in_order(settings: ObjectiveSettings, kind: Kind) -> float:
    """Share of all triplets of images whose order the learned embeddings have right."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(IMAGES, 2, generator=generator)
    apart = torch.cdist(places, places)
    relations = related(apart, kind, generator)
    population = Population(torch.arange(IMAGES), places, lists=Lists(relations))
    objective = settings.build(dim=DIM, population=population, seed=0)
    points = torch.randn(IMAGES, DIM, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([points, *objective.parameters()], 0.05)
    for step in range(STEPS):
        ids = drawn(relations, generator)
        optimiser.zero_grad()
        objective(points[ids][None], ids, None, step).total.backward()
        optimiser.step()
    found = points.detach()
    if isinstance(settings, NPair):
        learned = -found @ found.T
    else:
        unit = settings.traits.distance == "cosine"
        found = torch.nn.functional.normalize(found, dim=1) if unit else found
        learned = torch.cdist(found, found)
    first, second = (numbers[:, :, None] < numbers[:, None] for numbers in (learned, apart))
    every = ~torch.eye(IMAGES, dtype=torch.bool)
    different = every[:, :, None] & every[:, None] & every
    return (first == second)[different].float().mean().item()


@pytest.mark.parametrize(
    ("settings", "kind", "least"),
    [
        (Contrastive(), "pairs", 0.75),
        (Triplet(), "triplets", 0.7),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (NPair(), "ranked", 0.65),
                (Margin(), "pairs", 0.65),
                (NoiseContrastive(negatives=20), "pairs", 0.55),
                (NoiseContrastive(correction=False), "pairs", 0.55),
                (Margin(), "triplets", 0.65),
                (NPair(), "triplets", 0.7),
                (LogRatio(), "triplets", 0.85),
                (Ranking(), "triplets", 0.65),
                (Triplet(), "ranked", 0.65),
                (Ranking(loss="squared_error"), "ranked", 0.65),
                (Ranking(loss="cross_entropy"), "ranked", 0.58),
                (Ranking(loss="rank_net"), "ranked", 0.62),
                (Ranking(loss="hinge"), "ranked", 0.62),
                (Ranking(loss="list_net"), "ranked", 0.58),
                (Ranking(loss="list_mle"), "ranked", 0.62),
            )
        ),
    ],
    ids=lambda value: (
        f"{value.name}, {getattr(value, 'loss', '')}" if isinstance(value, ObjectiveSettings) else str(value)
    ),
)
def test_some_relations_put_most_of_the_others_in_order(settings: ObjectiveSettings, kind: Kind, least: float) -> None:
    assert share_in_order(settings, kind) > least
