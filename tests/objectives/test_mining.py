"""Sampling against loops over all triples, and what is drawn against its density."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from triples import (
    REPEATED,
    by_loops,
    embeddings,
    every_sampler,
    prepared,
    rival,
    sampled,
    table_of,
)

from manyviews import recipe
from manyviews.config import load
from manyviews.objectives import Population
from manyviews.objectives.contrastive import Contrastive, contrastive_loss
from manyviews.objectives.margin import Margin
from manyviews.objectives.mining import (
    All,
    DistanceWeighted,
    Easiest,
    Hard,
    Hardest,
    Random,
    Sampling,
    SemiHard,
    WithinMargin,
    choose,
    of_objective,
    refuse_no_margin,
    refuse_off_sphere,
    sampling,
)
from manyviews.objectives.mining.sampling import draw
from manyviews.objectives.mining.sphere import log_weights
from manyviews.objectives.triplet import Triplet, triplet_loss
from manyviews.recipe import Recipe

FIXED: dict[str, type[Any]] = {
    "all": All,
    "easiest": Easiest,
    "semi_hard": SemiHard,
    "hard": Hard,
    "hardest": Hardest,
}
DRAWN: list[Sampling] = [Random(), Random(positives="random"), DistanceWeighted(), DistanceWeighted(farthest=None)]
DRAWN.append(WithinMargin(margin=0.9, squared=True))
EVERY: list[Sampling] = [*(kind() for kind in FIXED.values()), *DRAWN]


def name_of(value: object) -> str:
    return str(getattr(value, "name", value))


@pytest.mark.parametrize("few", [0, 32])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("which", ["all", "easy", "hard"])
@pytest.mark.parametrize("name", FIXED)
def test_the_triples_are_those_of_loops_over_all(
    name: str, which: Any, normalized: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "FEW", few)
    z = embeddings().detach()
    expected = by_loops(name, which, table_of(z, normalized=normalized), REPEATED.repeat(2))
    assert sampled(FIXED[name](positives=which), prepared(z, REPEATED, normalized=normalized)) == expected
    assert len(expected) >= 15


@pytest.mark.parametrize("tile", [1, 3, 7])
@pytest.mark.parametrize("kind", EVERY, ids=name_of)
def test_the_split_into_tiles_changes_nothing_not_even_what_is_drawn(kind: Sampling, tile: int) -> None:
    batch = prepared(embeddings(), REPEATED)
    assert sampled(kind, batch, tile) == sampled(kind, batch)


@pytest.mark.parametrize("kind", DRAWN, ids=name_of)
def test_what_is_drawn_follows_from_seed_and_step(kind: Sampling) -> None:
    z = embeddings()
    first, again = (sampled(kind, prepared(z, REPEATED, seed=1, step=5)) for _ in range(2))
    assert first == again
    assert first != sampled(kind, prepared(z, REPEATED, seed=1, step=6))
    assert first != sampled(kind, prepared(z, REPEATED, seed=2, step=5))


@pytest.mark.parametrize("kind", EVERY, ids=name_of)
def test_positives_share_the_id_and_negatives_never_do(kind: Sampling) -> None:
    ids = REPEATED.repeat(2).tolist()
    for step in range(20):
        triples = sampled(kind, prepared(embeddings(seed=step), REPEATED, step=step))
        assert triples
        for a, p, n in triples:
            assert a != p
            assert ids[a] == ids[p] != ids[n]


@pytest.mark.parametrize("kind", EVERY, ids=name_of)
@pytest.mark.parametrize(
    ("views", "ids"), [(1, torch.arange(10)), (2, torch.full((10,), 4))], ids=["no positives", "no negatives"]
)
def test_without_positives_or_negatives_there_are_no_triples(kind: Sampling, views: int, ids: Tensor) -> None:
    batch = prepared(embeddings(views), ids)
    assert sampled(kind, batch) == []
    products = batch.anchors @ batch.candidates.T
    figures = choose(kind, batch, slice(0, len(products)), products).figures.tolist()
    pairs = 0 if views == 1 else 20 * (1 if kind.positives != "all" else 19)
    assert figures == [pairs, pairs, 0]


@pytest.mark.parametrize(("fallback", "negative"), [("easiest", 3), ("hardest", 2), (None, None)])
def test_a_positive_farther_than_all_negatives_has_the_fallback_or_is_left_out_and_is_counted(
    fallback: Any, negative: int | None
) -> None:
    z = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.1], [1.0, 0.5]]], dtype=torch.float64)
    batch = prepared(z, torch.tensor([0, 0, 1, 2]))
    triples = choose(SemiHard(fallback=fallback), batch, slice(0, 1), batch.anchors[:1] @ batch.candidates.T)
    assert triples.figures.tolist() == ([1, 1, 0] if negative is None else [1, 0, 1])
    assert bool(triples.chosen.any()) == (negative is not None)
    if negative is not None:
        assert triples.negatives is not None
        assert triples.negatives.tolist() == [[negative]]


@pytest.mark.parametrize("fallback", ["easiest", "hardest", None])
@pytest.mark.parametrize("few", [0, 32])
def test_fallbacks_are_those_of_loops_over_all(fallback: Any, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "FEW", few)
    # In two dimensions many positives are farther than all negatives.
    z, ids = embeddings(batch=10, dim=2, seed=1).detach(), REPEATED
    expected = by_loops("semi_hard", "all", table_of(z), ids.repeat(2), fallback)
    assert sampled(SemiHard(fallback=fallback), prepared(z, ids)) == expected
    others = by_loops("semi_hard", "all", table_of(z), ids.repeat(2), None)
    assert len(others) < len(by_loops("semi_hard", "all", table_of(z), ids.repeat(2)))


def test_every_hard_negative_is_nearer_than_its_positive_and_every_semi_hard_one_farther() -> None:
    hardest_only = 0
    for seed in range(20):
        z = embeddings(seed=seed).detach()
        table, batch = table_of(z), prepared(z, REPEATED)
        hard, hardest = sampled(Hard(), batch), sampled(Hardest(positives="all"), batch)
        assert hard
        assert all(table[a, n] < table[a, p] for a, p, n in hard)
        assert all(table[a, n] > table[a, p] for a, p, n in sampled(SemiHard(fallback=None), batch))
        assert set(hard) < set(hardest) or hard == hardest
        hardest_only += len(hardest) - len(hard)
    assert hardest_only


def test_a_negative_as_far_as_the_positive_is_not_hard() -> None:
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]], dtype=torch.float64)
    triples = sampled(Hard(), prepared(z, torch.tensor([0, 0, 1])))
    assert (0, 1, 2) not in triples
    assert (0, 1, 2) in sampled(Hardest(), prepared(z, torch.tensor([0, 0, 1])))


def test_a_negative_as_far_as_the_positive_is_not_semi_hard() -> None:
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]]], dtype=torch.float64)
    assert sampled(SemiHard(), prepared(z, torch.tensor([0, 0, 1, 1])))[:1] == [(0, 1, 3)]


def test_the_default_of_hardest_is_batch_hard() -> None:
    z = embeddings().detach()
    assert sampled(Hardest(), prepared(z, REPEATED)) == by_loops("hardest", "hard", table_of(z), REPEATED.repeat(2))


def test_random_negatives_are_all_equally_likely_and_so_are_random_positives() -> None:
    batch, counts, positives, rounds = prepared(embeddings()[:, :6], REPEATED[:6]), Counter[int](), Counter[int](), 2000
    products = batch.anchors[:1] @ batch.candidates.T
    for step in range(rounds):
        triples = choose(Random(positives="random"), batch._replace(key=(0, step)), slice(0, 1), products)
        positives[int(triples.positives)] += 1
        counts[int(triples.negatives)] += 1
    ids = REPEATED[:6].repeat(2)
    negatives = (ids != 3).nonzero()[:, 0].tolist()
    assert sorted(counts) == negatives
    assert sorted(positives) == [p for p in range(12) if ids[p] == 3 and p]
    for found in (counts, positives):
        chance = 1 / len(found)
        deviation = math.sqrt(rounds * chance * (1 - chance))
        assert all(abs(number - rounds * chance) < 4.5 * deviation for number in found.values())


def density(d: float, n: int) -> float:
    return d ** (n - 2) * (1 - d * d / 4) ** ((n - 3) / 2)


@pytest.mark.parametrize("n", [2, 3, 4, 16, 128])
def test_the_weights_are_the_inverse_of_the_density_of_distances(n: int) -> None:
    d = torch.linspace(0.3, 1.9, 17, dtype=torch.float64)
    weights = log_weights(1 - d.square() / 2, n, 0.5)
    weights = (weights - weights.max()).exp()
    expected = torch.tensor([1 / density(max(float(x), 0.5), n) for x in d], dtype=torch.float64)
    torch.testing.assert_close(weights, expected / expected.max(), rtol=1e-10, atol=1e-12)


def test_the_density_is_that_of_random_points_on_the_sphere() -> None:
    for n in (2, 3, 8):
        points = torch.nn.functional.normalize(
            torch.randn(2, 200_000, n, generator=torch.Generator().manual_seed(n)), dim=2
        )
        distances = (points[0] - points[1]).norm(dim=1)
        edges = torch.linspace(0.2, 1.8, 9)
        found = torch.histogram(distances, edges).hist
        grid = torch.linspace(0.2, 1.8, 801, dtype=torch.float64)
        middles = (grid[1:] + grid[:-1]) / 2
        expected = torch.tensor([density(float(d), n) for d in middles]).view(8, 100).sum(1)
        torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("dim", [2, 3, 4, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_finite_where_points_coincide_or_are_opposite(dim: int, dtype: torch.dtype) -> None:
    cosines = torch.tensor([1.0, 1.0 + 1e-6, 0.0, -1.0, -1.0 - 1e-6], dtype=dtype)
    assert log_weights(cosines, dim, 0.5).isfinite().all()
    assert log_weights(cosines, dim, 1e-3).isfinite().all()


@pytest.mark.parametrize("dim", [2, 3, 5, 16])
@pytest.mark.parametrize("farthest", [1.4, None])
def test_draws_are_as_frequent_as_their_weights(dim: int, farthest: float | None) -> None:
    distances = torch.tensor([[0.0, 0.2, 0.6, 0.7, 0.9, 1.1, 1.3, 1.35, 1.5, 1.7]], dtype=torch.float64)
    uniform = (torch.arange(100_000) + 0.5)[None] / 100_000
    # The first is the anchor itself, the fourth of its class.
    places, there = draw(
        DistanceWeighted(farthest=farthest), 1 - distances.square() / 2, torch.tensor([[0, 3]]), uniform, dim
    )
    assert there.all()
    expected = torch.tensor([1 / density(max(float(d), 0.5), dim) for d in distances[0]], dtype=torch.float64)
    expected[[0, 3]] = 0
    if farthest is not None:
        expected[distances[0] >= farthest] = 0
    found = places[0].bincount(minlength=10) / 100_000
    torch.testing.assert_close(found.double(), expected / expected.sum(), rtol=0, atol=1e-4)


def test_a_row_of_far_candidates_beside_one_with_a_near_candidate_keeps_its_weights() -> None:
    # Divided by the largest weight of both rows, e^91 at 128 dimensions, the second row's would all be zero.
    distances = torch.tensor([[0.0, 0.5, 1.3], [0.0, 1.35, 1.3]])
    uniform = ((torch.arange(10_000) + 0.5) / 10_000).repeat(2, 1)
    places, there = draw(
        DistanceWeighted(), 1 - distances.square() / 2, torch.zeros(2, 1, dtype=torch.int64), uniform, 128
    )
    assert there.all()
    assert (places[0] == 1).all()
    ratio = density(1.3, 128) / density(1.35, 128)
    assert (places[1] == 1).float().mean().item() == pytest.approx(ratio / (1 + ratio), abs=1e-3)


def test_a_share_of_nearly_one_draws_the_last_candidate_and_not_what_follows_it() -> None:
    distances = torch.tensor([[0.0, 0.9, 1.0, 1.6, 0.7]])
    last = torch.tensor([[0.0, 1 - 2.0**-24, 1.0]])
    places, _ = draw(DistanceWeighted(), 1 - distances.square() / 2, torch.tensor([[0, 4]]), last, 16)
    assert places.tolist() == [[1, 2, 2]]


def test_a_row_without_a_candidate_draws_from_all_its_negatives_alike_and_is_counted() -> None:
    # The anchor and its positive are at one pole, the others at the other, beyond the farthest candidate.
    z = torch.tensor([[[1.0, 0], [1.0, 0.1], [-1.0, 0], [-1.0, 0.1], [-1.0, 0.2]]], dtype=torch.float64)
    batch, counts = prepared(z, torch.tensor([0, 0, 1, 2, 3])), Counter[int]()
    products = batch.anchors[:1] @ batch.candidates.T
    for step in range(1500):
        triples = choose(DistanceWeighted(), batch._replace(key=(0, step)), slice(0, 1), products)
        assert triples.figures.tolist() == [1, 0, 1]
        assert triples.negatives is not None
        counts[int(triples.negatives)] += 1
    assert sorted(counts) == [2, 3, 4]
    assert all(abs(number - 500) < 4.5 * math.sqrt(1500 * 2 / 9) for number in counts.values())


@pytest.mark.parametrize("kind", EVERY, ids=name_of)
@pytest.mark.parametrize("dim", [2, 3])
def test_equal_and_opposite_points_draw_negatives_too(kind: Sampling, dim: int) -> None:
    point = torch.ones(dim)
    z = torch.stack([point, point, -point, -point, point, -point])[None]
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    triples = sampled(kind, prepared(z, ids))
    assert all(ids[a] == ids[p] != ids[n] for a, p, n in triples)
    assert triples or kind.name in ("semi_hard", "within_margin")


def test_semi_hard_triples_are_among_those_of_pytorch_metric_learning() -> None:
    miners = rival("pytorch_metric_learning.miners")
    z, ids = embeddings(batch=10, dim=5).detach(), REPEATED.repeat(2)
    rows = z.flatten(0, 1)
    # It keeps all negatives between the positive and the margin, and we the nearest; a margin of 2 keeps them all.
    theirs = list(zip(*(part.tolist() for part in miners.TripletMarginMiner(2.0, "semihard")(rows, ids)), strict=True))
    ours = sampled(SemiHard(fallback=None), prepared(z, REPEATED))
    assert set(ours) <= set(theirs)
    assert {(a, p) for a, p, _ in ours} == {(a, p) for a, p, _ in theirs}
    hardest = list(zip(*(part.tolist() for part in miners.BatchHardMiner()(rows, ids)), strict=True))
    assert sampled(Hardest(), prepared(z, REPEATED)) == hardest
    # It keeps all hard negatives, and we the nearest.
    hard = list(zip(*(part.tolist() for part in miners.TripletMarginMiner(0.2, "hard")(rows, ids)), strict=True))
    ours = sampled(Hard(), prepared(z, REPEATED))
    assert set(ours) <= set(hard)
    assert {(a, p) for a, p, _ in ours} == {(a, p) for a, p, _ in hard}


def test_the_weights_are_those_of_pytorch_metric_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    miners = rival("pytorch_metric_learning.miners")
    utilities = rival("pytorch_metric_learning.utils.loss_and_miner_utils")
    seen: list[Tensor] = []
    monkeypatch.setattr(
        utilities, "get_random_triplet_indices", lambda *a, weights, **k: seen.append(weights) or (torch.zeros(0),) * 3
    )
    z = embeddings(batch=10, dim=5).detach()
    miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4)(z.flatten(0, 1), REPEATED.repeat(2))
    batch, shares = prepared(z, REPEATED), 50_000
    uniform = ((torch.arange(shares) + 0.5) / shares).repeat(20, 1)
    products = batch.anchors @ batch.candidates.T
    places, there = draw(DistanceWeighted(), products, batch.mates(slice(0, 20)), uniform, 5)
    found = torch.stack([row.bincount(minlength=20) for row in places]) / shares
    # In few dimensions one maximum for all rows does no harm; a row without candidates is NaN there.
    assert there.all()
    torch.testing.assert_close(found.double(), seen[0], rtol=0, atol=1e-4)


def within(table: Tensor, ids: Tensor, margin: float, *, squared: bool) -> dict[tuple[int, int], list[int]]:
    """By anchor and positive, the negatives that are farther, but not by the margin."""
    power, count = 2 if squared else 1, len(ids)
    pairs = [(a, p) for a in range(count) for p in range(count) if a != p and ids[a] == ids[p]]
    return {
        (a, p): [
            n
            for n in range(count)
            if ids[n] != ids[a] and table[a, p] < table[a, n] and table[a, n] ** power < table[a, p] ** power + margin
        ]
        for a, p in pairs
    }


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("squared", [True, False])
def test_a_negative_within_the_margin_is_any_of_those_of_a_loop_and_all_come(squared: bool, normalized: bool) -> None:
    z, margin = embeddings().detach(), 0.5 if normalized else 2.0
    expected = within(table_of(z, normalized=normalized), REPEATED.repeat(2), margin, squared=squared)
    drawn: dict[tuple[int, int], Counter[int]] = {pair: Counter() for pair in expected}
    kind, rounds = WithinMargin(margin=margin, squared=squared), 150
    for step in range(rounds):
        for a, p, n in sampled(kind, prepared(z, REPEATED, normalized=normalized, step=step)):
            drawn[a, p][n] += 1
    assert {pair: sorted(counts) for pair, counts in drawn.items()} == expected
    assert any(not negatives for negatives in expected.values())
    for counts in drawn.values():
        chance = 1 / max(len(counts), 1)
        deviation = math.sqrt(rounds * chance * (1 - chance))
        assert all(abs(number - rounds * chance) <= 5 * deviation for number in counts.values())


@pytest.mark.parametrize("margin", [0.1, 0.4])
def test_negatives_within_the_margin_are_among_those_of_pytorch_metric_learning(margin: float) -> None:
    miners = rival("pytorch_metric_learning.miners")
    z, ids = embeddings(batch=10, dim=5).detach(), REPEATED.repeat(2)
    theirs = miners.TripletMarginMiner(margin, "semihard")(z.flatten(0, 1), ids)
    listed = set(zip(*(part.tolist() for part in theirs), strict=True))
    kind = WithinMargin(margin=margin, squared=False)
    drawn = {triple for step in range(80) for triple in sampled(kind, prepared(z, REPEATED, step=step))}
    assert drawn == listed


def test_every_triplet_within_the_margin_of_the_loss_is_semi_hard() -> None:
    for settings in (Triplet(sampling=WithinMargin()), Triplet(sampling=WithinMargin(), squared=False, margin=0.4)):
        terms = triplet_loss(embeddings(), REPEATED, settings, seed=3, step=7).terms
        assert terms["semi_hard"] == terms["active"] == 1
        assert 0 < terms["without_negative"] < 1


def test_a_margin_of_the_sampling_itself_is_kept_and_else_it_is_that_of_the_objective() -> None:
    assert of_objective(WithinMargin(), 0.3, squared=True) == WithinMargin(margin=0.3, squared=True)
    own = WithinMargin(margin=0.1, squared=False)
    assert of_objective(own, 0.3, squared=True) == own
    assert of_objective(SemiHard(), 0.3, squared=True) == SemiHard()
    assert Contrastive(form="hinge_of_squares", sampling=WithinMargin()).sampler == WithinMargin(
        margin=1.0, squared=True
    )
    assert Margin(sampling=WithinMargin()).sampler == WithinMargin(margin=0.2, squared=False)
    for settings in (Triplet, Margin):
        with pytest.raises(ValueError, match="within_margin needs a margin above 0"):
            settings(margin=0, sampling=WithinMargin())
    refuse_no_margin(own, 0.0)
    with pytest.raises(ValueError, match="complete it by `of_objective`"):
        sampled(WithinMargin(), prepared(embeddings(), REPEATED))


def test_a_bound_below_the_cutoff_is_refused() -> None:
    with pytest.raises(ValueError, match=r"farthest 0\.4 must be beyond cutoff 0\.5; set farthest=null"):
        DistanceWeighted(farthest=0.4)


def test_distance_weighted_sampling_off_the_sphere_is_refused() -> None:
    with pytest.raises(ValueError, match="on the unit sphere; set normalized=true"):
        refuse_off_sphere(DistanceWeighted(), False)
    refuse_off_sphere(DistanceWeighted(), True)
    refuse_off_sphere(Random(), False)
    for settings in (Triplet, Contrastive):
        with pytest.raises(ValueError, match="unit sphere; set normalized=true"):
            settings(sampling=DistanceWeighted(), normalized=False)


@every_sampler
@pytest.mark.parametrize(
    "settings",
    [Triplet(), Triplet(form="soft"), Contrastive(), Contrastive(average="all"), Margin(nu=0.5, beta_per="class")],
    ids=["triplet", "triplet, soft", "contrastive", "contrastive, all", "margin"],
)
@pytest.mark.parametrize(
    ("views", "ids"),
    [(1, torch.arange(10)), (2, torch.full((10,), 4))],
    ids=["one image of each class", "one class"],
)
def test_without_positives_or_negatives_losses_and_gradients_are_zero(
    kind: Sampling, settings: Any, views: int, ids: Tensor
) -> None:
    settings = settings.model_copy(update={"sampling": kind})
    z, objective = embeddings(views), settings.build(dim=5, population=Population(torch.arange(10)), seed=3).double()
    found = objective(z, ids, None, 7).total
    gradients = torch.autograd.grad(found, [z, *objective.parameters()])
    assert found == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("settings", "loss"), [(Triplet, triplet_loss), (Contrastive, contrastive_loss)])
def test_the_module_passes_its_settings_on_and_draws_by_seed_and_step(settings: Any, loss: Any) -> None:
    z, chosen = embeddings(), settings(margin=0.4, sampling=Random())
    objective = chosen.build(dim=5, population=Population(torch.arange(10)), seed=3)
    assert torch.equal(objective(z, REPEATED, None, 7).total, loss(z, REPEATED, chosen, seed=3, step=7).total)
    assert objective(z, REPEATED, None, 8).total != objective(z, REPEATED, None, 7).total
    assert not list(objective.parameters())


@pytest.mark.parametrize("name", ["siamese", "facenet", "margin_distance_weighted"])
def test_each_recipe_takes_any_sampling_on_the_command_line(name: str) -> None:
    for file in (recipe.find(name), recipe.find(f"{name}_instances")):
        chosen = load(Recipe, file, ["objective.sampling=hardest", "objective.sampling.positives=easy"]).objective
        assert chosen.sampling == Hardest(positives="easy")
        chosen = load(Recipe, file, ["objective.sampling=semi_hard", "objective.sampling.fallback=hardest"]).objective
        assert chosen.sampling == SemiHard(fallback="hardest")
        words = ["objective.sampling.name=distance_weighted", "objective.sampling.farthest=null"]
        assert load(Recipe, file, words).objective.sampling == DistanceWeighted(farthest=None)
    with pytest.raises(ValueError, match=r"objective\.sampling\.name=harder is none of .* did you mean hard\?"):
        load(Recipe, recipe.find(name), ["objective.sampling=harder"])


@pytest.mark.parametrize("name", ["siamese_instances", "facenet_instances", "margin_distance_weighted_instances"])
def test_one_view_of_each_image_by_itself_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"at least 2 views of each image; set views\.num_views=2"):
        load(Recipe, recipe.find(name), ["views.num_views=1"])


def test_distances_of_unit_rows_are_euclidean_and_finite_where_rows_coincide() -> None:
    batch = prepared(embeddings(views=1, batch=6), torch.arange(6))
    unit = batch.anchors.detach()
    found = batch.distances(unit @ unit.T)
    apart = ~torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(found[apart], torch.cdist(unit, unit)[apart])
    assert found.diagonal().max() < 1e-7
    for dtype in (torch.float32, torch.float64):
        products = torch.tensor([1.0, -1.0, 1.0 + 1e-6], dtype=dtype, requires_grad=True)
        gradient = torch.autograd.grad(batch.distances(products).sum(), products)[0]
        assert gradient.isfinite().all()
        assert (gradient[0], gradient[2]) == (0, 0)
