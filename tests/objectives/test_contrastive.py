"""The contrastive loss against loops over all pairs in float64, against another library, and at its limits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triples import (
    REPEATED,
    Triple,
    compare,
    compare_kinds,
    embeddings,
    every_sampler,
    prepared,
    rival,
    sampled,
    table_of,
)

from manyviews.engine import tiles
from manyviews.objectives.contrastive import Contrastive, contrastive_loss
from manyviews.objectives.mining import Sampling


def loss(z: Tensor, ids: Tensor, **options: Any) -> Tensor:
    return contrastive_loss(z, ids, Contrastive(**options), seed=3, step=7).total


def pairs_of(triples: list[Triple], every: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Positive and negative pairs; those of all triples hold each pair many times, and count once."""
    positives, negatives = [(a, p) for a, p, _ in triples], [(a, n) for a, _, n in triples]
    return (sorted(set(positives)), sorted(set(negatives))) if every else (positives, negatives)


def oracle(table: Tensor, triples: list[Triple], *, margin: float, form: str, average: str, every: bool) -> Tensor:
    positives, negatives = pairs_of(triples, every)
    power = 2 if form == "hinge_of_squares" else 1
    pulls = torch.stack([table[pair] ** power for pair in positives])
    pushes = torch.stack([(margin - table[pair] ** power).clamp(min=0) for pair in negatives])
    count = len(pushes) if average == "all" else int((pushes > 0).sum())
    if form == "squared_hinge":
        pulls, pushes = pulls**2 / 2, pushes**2 / 2
    return pulls.mean() + pushes.sum() / max(count, 1)


@pytest.mark.parametrize("numbers", [60, 1 << 18], ids=["small tiles", "one tile"])
@pytest.mark.parametrize(
    ("margin", "form", "normalized", "average"),
    [
        (1.0, "squared_hinge", True, "active"),
        (1.4, "squared_hinge", True, "all"),
        (1.2, "hinge", True, "active"),
        (3.0, "squared_hinge", False, "all"),
        (1.5, "hinge_of_squares", True, "active"),
        (9.0, "hinge_of_squares", False, "all"),
    ],
)
@every_sampler
def test_loss_and_gradient_equal_the_means_over_pairs(
    kind: Sampling,
    margin: float,
    form: str,
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
    expected = oracle(table, triples, margin=margin, form=form, average=average, every=every)
    options: dict[str, Any] = {"margin": margin, "form": form, "normalized": normalized, "average": average}
    compare(loss(z, REPEATED, sampling=kind, **options), expected, z)


def test_an_anchor_without_a_positive_is_not_pushed_but_pushes_others() -> None:
    z = embeddings(1, 3)
    compare(
        loss(z, torch.tensor([0, 0, 1]), margin=2.0, average="all"),
        oracle(table_of(z), [(0, 1, 2), (1, 0, 2)], margin=2.0, form="squared_hinge", average="all", every=True),
        z,
    )


@pytest.mark.parametrize("margin", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("form", "power"), [("hinge", 1), ("hinge_of_squares", 2)])
def test_hinges_of_distances_and_of_squares_are_those_of_pytorch_metric_learning(
    form: str, power: int, margin: float
) -> None:
    losses = rival("pytorch_metric_learning.losses")
    distance = rival("pytorch_metric_learning.distances").LpDistance(power=power)
    # The ids are repeated in the views, so that each anchor has a positive: it also pushes anchors that have none.
    z = embeddings().detach().float()
    theirs = losses.ContrastiveLoss(pos_margin=0, neg_margin=margin, distance=distance)(
        z.flatten(0, 1), REPEATED.repeat(2)
    )
    torch.testing.assert_close(loss(z, REPEATED, form=form, margin=margin), theirs, rtol=1e-5, atol=1e-6)


@every_sampler
def test_a_farther_negative_is_easy_where_it_is_beyond_the_margin_and_semi_hard_within(kind: Sampling) -> None:
    z = embeddings()
    terms = contrastive_loss(z, REPEATED, Contrastive(margin=1.3, sampling=kind), seed=3, step=7).terms
    triples, table = sampled(kind, prepared(z, REPEATED)), table_of(z.detach())
    kinds = [
        "hard" if table[a, n] <= table[a, p] else "easy" if table[a, n] >= 1.3 else "semi_hard" for a, p, n in triples
    ]
    compare_kinds(terms, kinds)


def test_a_run_of_an_earlier_version_keeps_its_form() -> None:
    assert Contrastive.model_validate({"squared": True}) == Contrastive()
    assert Contrastive.model_validate({"squared": False}) == Contrastive(form="hinge")
    with pytest.raises(ValueError, match="squared"):
        Contrastive.model_validate({"squared": True, "form": "hinge"})
