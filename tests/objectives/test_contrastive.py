"""The contrastive loss against loops over all pairs in float64, against another library, and at its limits."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from triples import REPEATED, Triple, compare, embeddings, prepared, sampled, table_of

from manyviews.engine import tiles
from manyviews.objectives import Population
from manyviews.objectives.contrastive import Contrastive, contrastive_loss
from manyviews.objectives.mining import All, DistanceWeighted, Easiest, Hard, Hardest, Random, Sampling, SemiHard

EVERY: list[Sampling] = [
    All(),
    All(positives="hard"),
    Random(),
    Easiest(),
    SemiHard(),
    SemiHard(fallback=None),
    Hard(),
    Hardest(),
    DistanceWeighted(),
]


def name_of(value: object) -> str:
    return str(getattr(value, "name", value))


def loss(z: Tensor, ids: Tensor, **options: Any) -> Tensor:
    return contrastive_loss(z, ids, Contrastive(**options), seed=3, step=7).total


def pairs_of(triples: list[Triple], every: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Positive and negative pairs; those of all triples hold each pair many times, and count once."""
    positives, negatives = [(a, p) for a, p, _ in triples], [(a, n) for a, _, n in triples]
    return (sorted(set(positives)), sorted(set(negatives))) if every else (positives, negatives)


def oracle(table: Tensor, triples: list[Triple], *, margin: float, squared: bool, average: str, every: bool) -> Tensor:
    positives, negatives = pairs_of(triples, every)
    pulls = torch.stack([table[pair] for pair in positives])
    pushes = torch.stack([(margin - table[pair]).clamp(min=0) for pair in negatives])
    count = len(pushes) if average == "all" else int((pushes > 0).sum())
    if squared:
        pulls, pushes = pulls**2 / 2, pushes**2 / 2
    return pulls.mean() + pushes.sum() / max(count, 1)


@pytest.mark.parametrize("numbers", [60, 1 << 18], ids=["small tiles", "one tile"])
@pytest.mark.parametrize(
    ("margin", "squared", "normalized", "average"),
    [(1.0, True, True, "active"), (1.4, True, True, "all"), (1.2, False, True, "active"), (3.0, True, False, "all")],
)
@pytest.mark.parametrize("kind", EVERY, ids=name_of)
def test_loss_and_gradient_equal_the_means_over_pairs(
    kind: Sampling,
    margin: float,
    squared: bool,
    normalized: bool,
    average: Any,
    numbers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "NUMBERS", numbers)
    if kind.name == "distance_weighted" and not normalized:
        return
    z, every = embeddings(), kind.name == "all"
    triples = sampled(kind, prepared(z, REPEATED, normalized=normalized))
    table = table_of(z, normalized=normalized)
    expected = oracle(table, triples, margin=margin, squared=squared, average=average, every=every)
    options: dict[str, Any] = {"margin": margin, "squared": squared, "normalized": normalized, "average": average}
    compare(loss(z, REPEATED, sampling=kind, **options), expected, z)


@pytest.mark.parametrize("kind", EVERY, ids=name_of)
@pytest.mark.parametrize("average", ["active", "all"])
@pytest.mark.parametrize(
    ("views", "ids"),
    [(1, torch.arange(10)), (2, torch.full((10,), 4))],
    ids=["one image of each class", "one class"],
)
def test_without_positives_or_negatives_loss_and_gradient_are_zero(
    kind: Sampling, average: Any, views: int, ids: Tensor
) -> None:
    z = embeddings(views)
    found = loss(z, ids, sampling=kind, average=average)
    (gradient,) = torch.autograd.grad(found, z)
    assert found == 0
    assert not gradient.any()


def test_an_anchor_without_a_positive_is_not_pushed_but_pushes_others() -> None:
    z = embeddings(1, 3)
    compare(
        loss(z, torch.tensor([0, 0, 1]), margin=2.0, average="all"),
        oracle(table_of(z), [(0, 1, 2), (1, 0, 2)], margin=2.0, squared=True, average="all", every=True),
        z,
    )


def test_the_module_passes_its_settings_on_and_draws_by_seed_and_step() -> None:
    z = embeddings()
    settings = Contrastive(margin=1.4, sampling=Random())
    objective = settings.build(dim=5, population=Population(torch.arange(10)), seed=3)
    assert torch.equal(objective(z, REPEATED, None, 7).total, loss(z, REPEATED, margin=1.4, sampling=Random()))
    assert objective(z, REPEATED, None, 8).total != objective(z, REPEATED, None, 7).total
    assert not list(objective.parameters())


def test_distance_weighted_sampling_off_the_sphere_is_refused() -> None:
    with pytest.raises(ValueError, match="unit sphere; set normalized=true"):
        Contrastive(sampling=DistanceWeighted(), normalized=False)


@pytest.mark.parametrize("margin", [0.5, 1.0, 1.5])
def test_without_squares_it_equals_pytorch_metric_learning(margin: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = pytest.importorskip("pytorch_metric_learning.losses")
    # The ids are repeated in the views, so that each anchor has a positive: it also pushes anchors that have none.
    z = embeddings().detach().float()
    theirs = losses.ContrastiveLoss(pos_margin=0, neg_margin=margin)(z.flatten(0, 1), REPEATED.repeat(2))
    torch.testing.assert_close(loss(z, REPEATED, squared=False, margin=margin), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", EVERY, ids=name_of)
def test_a_farther_negative_is_easy_where_it_is_beyond_the_margin_and_semi_hard_within(kind: Sampling) -> None:
    z = embeddings()
    terms = contrastive_loss(z, REPEATED, Contrastive(margin=1.3, sampling=kind), seed=3, step=7).terms
    triples, table = sampled(kind, prepared(z, REPEATED)), table_of(z.detach())
    kinds = {"easy": 0, "semi_hard": 0, "hard": 0}
    for a, p, n in triples:
        kinds["hard" if table[a, n] <= table[a, p] else "easy" if table[a, n] >= 1.3 else "semi_hard"] += 1
    for name, number in kinds.items():
        assert terms[name].item() == pytest.approx(number / len(triples), abs=1e-12)
