"""The triplet loss against loops over all triples in float64, against another library, and at its limits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triples import (
    REPEATED,
    Triple,
    by_loops,
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
from manyviews.objectives import triplet_losses as module
from manyviews.objectives.mining import All, Easiest, Hard, Hardest, Sampling, SemiHard
from manyviews.objectives.triplet import Triplet, triplet_loss
from manyviews.objectives.triplet_losses import Form

FORMS: tuple[Form, ...] = ("hinge", "ratio")


def loss(z: Tensor, ids: Tensor, **options: Any) -> Tensor:
    return triplet_loss(z, ids, Triplet(**options), seed=3, step=7).total


def oracle(
    table: Tensor, triples: list[Triple], *, margin: float, squared: bool, form: str = "hinge", average: str = "active"
) -> Tensor:
    power = 2 if squared else 1
    losses = []
    for a, p, n in triples:
        positive, negative = table[a, p] ** power, table[a, n] ** power
        if form == "softmax":
            # Hoffer and Ailon: the mean squared error of both shares, whose target is (0, 1).
            shares = torch.stack([positive, negative]).exp()
            shares = shares / shares.sum()
            losses.append((shares[0] ** 2 + (shares[1] - 1) ** 2) / 2)
        elif form == "ratio":
            losses.append((1 - negative / (positive + margin)).clamp(min=0))
        elif form == "soft":
            losses.append(torch.log(1 + (positive - negative).exp()))
        else:
            losses.append((positive - negative + margin).clamp(min=0))
    active = sum(float(found.detach()) > 0 for found in losses)
    return torch.stack(losses).sum() / (len(losses) if average == "all" else active)


@pytest.mark.parametrize("numbers", [60, 1 << 18], ids=["small tiles", "one tile"])
@pytest.mark.parametrize(
    ("margin", "squared", "form", "normalized", "average"),
    [
        (0.2, True, "hinge", True, "active"),
        (0.5, False, "hinge", True, "all"),
        (0.1, False, "hinge", False, "active"),
        (0.2, True, "soft", True, "active"),
        (0.2, False, "soft", False, "all"),
        (0.2, False, "softmax", False, "active"),
        (0.3, True, "ratio", True, "active"),
        (0.2, False, "ratio", False, "all"),
    ],
)
@every_sampler
def test_loss_and_gradient_equal_the_sum_over_triples(
    kind: Sampling,
    margin: float,
    squared: bool,
    form: str,
    normalized: bool,
    average: Any,
    numbers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "NUMBERS", numbers)
    if kind.name == "distance_weighted" and not normalized:
        return
    z = embeddings()
    triples = sampled(kind, prepared(z, REPEATED, normalized=normalized))
    expected = oracle(
        table_of(z, normalized=normalized), triples, margin=margin, squared=squared, form=form, average=average
    )
    options: dict[str, Any] = {"margin": margin, "squared": squared, "form": form, "normalized": normalized}
    compare(loss(z, REPEATED, sampling=kind, average=average, **options), expected, z)


@pytest.mark.parametrize("name", ["all", "easiest", "semi_hard", "hard", "hardest"])
def test_nothing_but_embeddings_and_ids_decides_where_nothing_is_drawn(name: str) -> None:
    z = embeddings(3, 6)
    kinds = {"all": All(), "easiest": Easiest(), "semi_hard": SemiHard(), "hard": Hard(), "hardest": Hardest()}
    ids = torch.tensor([0, 1, 1, 2, 4, 0])
    triples = by_loops(name, "hard" if name == "hardest" else "all", table_of(z), ids.repeat(3))
    compare(loss(z, ids, sampling=kinds[name], margin=0.3), oracle(table_of(z), triples, margin=0.3, squared=True), z)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_a_search_among_the_positives_gives_what_passes_over_the_rows_give(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, ids = embeddings(2, 25), torch.arange(25) ** 2 % (classes + 1)
    expected = loss(z, ids, sampling=All())
    monkeypatch.setattr(module, "FEW", 0)
    compare(loss(z, ids, sampling=All()), expected, z)
    compare(
        loss(z, ids, sampling=All(), squared=False, margin=0.0),
        loss(z, ids, sampling=All(), squared=False, margin=0.0),
        z,
    )


def test_terms_say_how_much_is_compared() -> None:
    z = embeddings()
    result = triplet_loss(z, REPEATED, Triplet(sampling=All()), seed=0, step=0)
    table, ids = table_of(z.detach()), REPEATED.repeat(2)
    triples = by_loops("all", "all", table, ids)
    active = sum(float(table[a, p] ** 2 - table[a, n] ** 2) > -0.2 for a, p, n in triples)
    assert result.terms["active"].item() == pytest.approx(active / len(triples))
    pairs = {(a, p) for a, p, _ in triples}
    cosine = sum(1 - float(table[a, p]) ** 2 / 2 for a, p in pairs) / len(pairs)
    assert result.terms["positive_similarity"].item() == pytest.approx(cosine)
    assert result.terms["negatives"].item() == pytest.approx(sum(int((ids != i).sum()) for i in ids) / 20)
    assert result.terms["without_negative"] == 0
    assert not any(term.requires_grad for term in result.terms.values())
    kept = by_loops("semi_hard", "all", table, ids, None)
    assert 0 < len(kept) < len(pairs)
    for fallback, name in (("easiest", "fallback"), (None, "without_negative")):
        terms = triplet_loss(z, REPEATED, Triplet(sampling=SemiHard(fallback=fallback)), seed=0, step=0).terms
        assert terms[name].item() == pytest.approx(1 - len(kept) / len(pairs))
        assert terms["fallback"] + terms["without_negative"] == terms[name]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("squared", [True, False])
@every_sampler
def test_easy_semi_hard_and_hard_are_the_papers_kinds_of_triplets(
    kind: Sampling, squared: bool, normalized: bool
) -> None:
    if kind.name == "distance_weighted" and not normalized:
        return
    z, margin = embeddings(), 0.7
    settings = Triplet(sampling=kind, margin=margin, squared=squared, normalized=normalized)
    terms = triplet_loss(z, REPEATED, settings, seed=3, step=7).terms
    triples = sampled(kind, prepared(z, REPEATED, normalized=normalized))
    table = table_of(z.detach(), normalized=normalized) ** (2 if squared else 1)
    differences = [float(table[a, n] - table[a, p]) for a, p, n in triples]
    kinds = ["hard" if gap <= 0 else "semi_hard" if gap < margin else "easy" for gap in differences]
    compare_kinds(terms, kinds)


@pytest.mark.parametrize("positives", [5, 60])
def test_kinds_of_all_triplets_are_those_of_pytorch_metric_learning(positives: int) -> None:
    miners = rival("pytorch_metric_learning.miners")
    distances = rival("pytorch_metric_learning.distances")
    z, ids = embeddings(1, 3 * positives).detach(), torch.arange(3).repeat_interleave(positives)
    terms = triplet_loss(z, ids, Triplet(sampling=All()), seed=0, step=0).terms
    counts = {
        ours: len(miners.TripletMarginMiner(0.2, theirs, distance=distances.LpDistance(power=2))(z[0], ids)[0])
        for ours, theirs in {"easy": "easy", "semi_hard": "semihard", "hard": "hard"}.items()
    }
    for name, number in counts.items():
        assert terms[name].item() == pytest.approx(number / sum(counts.values()))


def test_semi_hard_with_its_fallback_is_tensorflows_loss() -> None:
    # triplet_semihard_loss: squared distances, a margin of 1, the mean over all positive pairs; of the negatives that
    # are farther than the positive the nearest, and where there is none the farthest of all negatives.
    for seed in range(5):
        z = embeddings(batch=10, dim=2, seed=seed)
        table, ids, losses = table_of(z).square(), REPEATED.repeat(2).tolist(), []
        for a in range(20):
            negatives = [table[a, n] for n in range(20) if ids[n] != ids[a]]
            for p in range(20):
                if p != a and ids[p] == ids[a]:
                    outside = [d for d in negatives if d > table[a, p]]
                    losses.append((table[a, p] - (min(outside) if outside else max(negatives)) + 1).clamp(min=0))
        compare(loss(z, REPEATED, margin=1.0, average="all"), torch.stack(losses).mean(), z)


def test_where_every_negative_is_nearer_the_fallback_still_teaches() -> None:
    # Two classes that lie crosswise: no negative is farther than the positive.
    z = torch.tensor([[[1.0, 0.1], [-1.0, 0.1], [0.1, 1.0], [0.1, -1.0]]], dtype=torch.float64).requires_grad_()
    ids = torch.tensor([0, 0, 1, 1])
    for fallback, taught in (("easiest", True), ("hardest", True), (None, False)):
        found = loss(z, ids, sampling=SemiHard(fallback=fallback))
        assert (found.item() > 1) == taught
        assert bool(torch.autograd.grad(found, z)[0].any()) == taught


def test_all_equal_points_cost_the_margin() -> None:
    z = torch.ones(2, 5, 4)
    for squared in (True, False):
        assert loss(z, torch.arange(5), sampling=All(), squared=squared).item() == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_all_triplets_equal_those_of_pytorch_metric_learning(squared: bool, soft: bool) -> None:
    losses = rival("pytorch_metric_learning.losses")
    distances = rival("pytorch_metric_learning.distances")
    reducers = rival("pytorch_metric_learning.reducers")
    z = embeddings().detach().float()
    # Its soft loss adds the margin inside the exponential; the paper's has none.
    theirs = losses.TripletMarginLoss(
        margin=0.0 if soft else 0.2,
        smooth_loss=soft,
        distance=distances.LpDistance(power=2 if squared else 1),
        reducer=reducers.AvgNonZeroReducer(),
    )(z.flatten(0, 1), REPEATED.repeat(2))
    torch.testing.assert_close(
        loss(z, REPEATED, sampling=All(), squared=squared, form="soft" if soft else "hinge"),
        theirs,
        rtol=1e-5,
        atol=1e-6,
    )


def test_batch_hard_equals_that_of_pytorch_metric_learning() -> None:
    losses = rival("pytorch_metric_learning.losses")
    miners = rival("pytorch_metric_learning.miners")
    z, ids = embeddings().detach().float(), REPEATED.repeat(2)
    rows = z.flatten(0, 1)
    theirs = losses.TripletMarginLoss(margin=0.2)(rows, ids, miners.BatchHardMiner()(rows, ids))
    torch.testing.assert_close(loss(z, REPEATED, sampling=Hardest(), squared=False), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["hinge", "soft", "softmax", "ratio"])
def test_the_derivatives_of_every_form_are_those_of_autograd(form: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (2 * torch.rand(200, generator=generator, dtype=torch.float64) for _ in range(2))
    positive.requires_grad_()
    negative.requires_grad_()
    found = module.penalties(positive, negative, form, 0.3)
    rises, falls = torch.autograd.grad(found.losses.sum(), [positive, negative])
    torch.testing.assert_close(found.by_positive, rises)
    torch.testing.assert_close(found.by_negative, -falls)
    nowhere = module.penalties(torch.tensor([-torch.inf, 1.0]), torch.tensor([0.1, torch.inf]), form, 0.3)
    assert not any(part.any() for part in nowhere)


def test_a_ratio_costs_less_than_one_and_where_the_hinge_does() -> None:
    z = embeddings(seed=4)
    hinge, ratio = (triplet_loss(z, REPEATED, Triplet(sampling=All(), form=form), seed=0, step=0) for form in FORMS)
    assert ratio.terms["active"] == hinge.terms["active"] > 0
    assert 0 < ratio.total < 1
    with pytest.raises(ValueError, match=r"form=ratio divides by .* set margin above 0"):
        Triplet(form="ratio", margin=0)


def test_the_softmax_loss_is_small_only_where_the_ratio_of_distances_is() -> None:
    # Hoffer and Ailon 2015, section 3: it vanishes only as d(a, p) / d(a, n) does; at equal distances it is 1 / 4.
    near, far = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([30.0, 1.0, 31.0])
    found = module.penalties(near, far, "softmax", 0.0).losses
    assert found.tolist() == pytest.approx([0, 0.25, 0], abs=1e-12)


def test_a_run_of_an_earlier_version_keeps_its_form() -> None:
    assert Triplet.model_validate({"soft": True}) == Triplet(form="soft")
    assert Triplet.model_validate({"soft": False}) == Triplet()
    with pytest.raises(ValueError, match="soft"):
        Triplet.model_validate({"soft": True, "form": "hinge"})
