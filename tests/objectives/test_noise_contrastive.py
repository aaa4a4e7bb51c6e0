"""Learned rows told from noise, against sums written out in float64, and against what the papers say they find."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from manyviews.objectives import NoiseContrastive, Population, noise_contrastive
from manyviews.objectives.noise_contrastive import NoiseContrastiveObjective, draw

DIM, IMAGES = 5, 12
CLASSES = torch.tensor([0, 0, 1, 2, 2, 2, 2, 3, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6, 6])


def build(ids: Tensor | None = None, dim: int = DIM, **settings: Any) -> NoiseContrastiveObjective:
    population = Population(torch.arange(IMAGES)) if ids is None else Population(ids)
    objective = NoiseContrastive.model_validate(settings).build(dim=dim, population=population, seed=4)
    assert isinstance(objective, NoiseContrastiveObjective)
    return objective.double()


def batch(views: int = 2, count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(views)
    return torch.randn(views, count, DIM, dtype=torch.float64, generator=generator).requires_grad_()


def weights_of(frequencies: Tensor, power: float) -> Tensor:
    return frequencies.double() ** power


def drawn_by(frequencies: Tensor, settings: NoiseContrastive, step: int) -> list[int]:
    """One draw for all anchors."""
    cumulative = weights_of(frequencies, settings.power).cumsum(0)
    return draw(cumulative, settings.traits.noise, seed=4, step=step).tolist()


def drawn_for(frequencies: Tensor, settings: NoiseContrastive, step: int, views: int, count: int) -> list[Any]:
    """The draws of each view of each image."""
    if settings.traits.one_draw:
        return [[drawn_by(frequencies, settings, step)] * count] * views
    cumulative = weights_of(frequencies, settings.power).cumsum(0)
    drawn = draw(cumulative, count * views * settings.traits.noise, seed=4, step=step)
    return drawn.view(count, views, settings.traits.noise).transpose(0, 1).tolist()


def oracle(
    embeddings: Tensor,
    ids: Tensor,
    rows: Tensor,
    log_normaliser: Tensor | float,
    frequencies: Tensor,
    settings: NoiseContrastive,
    step: int,
) -> Tensor:
    k, law = settings.traits.noise, weights_of(frequencies, settings.power)
    noise = drawn_for(frequencies, settings, step, *embeddings.shape[:2])

    def score(x: Tensor, number: int) -> Tensor:
        row = rows[number]
        if settings.normalized:
            x, row = x / x.norm(), row / row.norm()
        found = x @ row / settings.temperature
        return found - log_normaliser - torch.log(k * law[number] / law.sum()) if settings.correction else found

    losses = []
    for view, drawn in zip(embeddings, noise, strict=True):
        for x, own, numbers in zip(view, ids.tolist(), drawn, strict=True):
            counted = [number for number in numbers if settings.correction or number != own]
            terms = [-torch.log(torch.sigmoid(score(x, own)))]
            losses.append(sum((-torch.log(torch.sigmoid(-score(x, number))) for number in counted), start=terms[0]))
    return torch.stack(losses).mean()


OPTIONS: list[dict[str, Any]] = [
    {"negatives": 9},
    {"negatives": 30, "power": 0.0, "temperature": 0.5},
    {"negatives": 30, "normaliser": 7.5, "power": 1.3},
    {"negatives": 9, "normalized": False, "temperature": 1.0},
    {"negatives": 9, "shared": False},
    {"negatives": 30, "correction": False},
    {"negatives": 30, "correction": False, "shared": True},
    {"negatives": 1, "correction": False, "normalized": False},
]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients_equal_the_double_loop(views: int, options: dict[str, Any]) -> None:
    objective, z, ids = build(CLASSES, **options), batch(views), torch.tensor([6, 6, 2, 0, 5, 4])
    learned = dict(objective.named_parameters())
    assert ("log_normaliser" in learned) == (options.get("correction", True) and "normaliser" not in options)
    log_normaliser = learned.get("log_normaliser", math.log(options.get("normaliser", 1.0)))
    for step in (0, 3):
        found = objective(z, ids, None, step).total
        expected = oracle(z, ids, objective.weight, log_normaliser, CLASSES.bincount(), objective.settings, step)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        leaves = [z, *learned.values()]
        torch.testing.assert_close(
            torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_noise_is_drawn_by_the_power_law(power: float) -> None:
    frequencies, count = torch.tensor([1, 100, 10, 3, 40]), 200_000
    law = weights_of(frequencies, power)
    found = draw(law.cumsum(0), count, seed=0, step=0).bincount(minlength=5) / count
    expected = law / law.sum()
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_a_draw_follows_from_the_seed_and_the_step_alone() -> None:
    cumulative = torch.ones(1000, dtype=torch.float64).cumsum(0)
    draws = [draw(cumulative, 50, seed=seed, step=step) for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_without_a_power_noise_of_classes_is_noise_of_images() -> None:
    z, ids = batch(), torch.arange(6)
    found = build(torch.arange(IMAGES).repeat(3)[:30], power=0.0, negatives=20)
    expected = build(power=0.75, negatives=20)
    torch.testing.assert_close(found(z, ids, None, 5).total, expected(z, ids, None, 5).total)


def test_where_the_expected_noise_is_one_the_correction_changes_nothing() -> None:
    # k · P = IMAGES / IMAGES and Z = 1; the anchors' own ids, which differ, are not among the noise.
    settings: dict[str, Any] = {"negatives": IMAGES, "power": 0.0, "normaliser": 1.0, "shared": True}
    frequencies = torch.ones(IMAGES, dtype=torch.int64)
    drawn = drawn_by(frequencies, NoiseContrastive(**settings), 0)
    ids = torch.tensor([number for number in range(IMAGES) if number not in drawn][:3])
    assert len(ids) == 3
    z = batch(count=3)
    found, expected = (build(**settings, correction=correction)(z, ids, None, 0).total for correction in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_only_negative_sampling_leaves_out_noise_of_the_anchors_own_id() -> None:
    ids, z = torch.tensor([0, 1]), batch(1, 2)
    sampled = build(torch.tensor([0, 1]), negatives=40, correction=False, shared=True)
    drawn = drawn_by(torch.tensor([1, 1]), sampled.settings, 0)
    terms = sampled(z, ids, None, 0).terms
    assert 0 < drawn.count(0) < 40
    assert terms["negatives"] == 20
    estimated = build(torch.tensor([0, 1]), negatives=40)
    assert estimated(z, ids, None, 0).terms["negatives"] == 40


def minimise(objective: NoiseContrastiveObjective, anchors: Tensor, ids: Tensor, *leaves: Tensor) -> None:
    optimiser = torch.optim.LBFGS(
        leaves, max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        found = objective(anchors, ids, None, 0).total
        found.backward()
        return found

    optimiser.step(loss)


def test_estimation_finds_the_normaliser(monkeypatch: pytest.MonkeyPatch) -> None:
    # Noise that is exactly what is expected of it, each of five ids four times: then the minimum is exactly at log Z.
    monkeypatch.setattr(noise_contrastive, "draw", lambda *_, **__: torch.arange(5).repeat(4))
    law = torch.tensor([8, 4, 2, 1, 1], dtype=torch.float64)
    ids = torch.arange(5).repeat_interleave(law.long())
    objective = build(ids, dim=1, negatives=20, power=0.0, normalized=False, temperature=1.0)
    objective.weight.data.copy_((40 * law / law.sum()).log()[:, None])
    torch.testing.assert_close(objective.log_normaliser.item(), math.log(5), rtol=1e-6, atol=0)
    minimise(objective, torch.ones(1, len(ids), 1, dtype=torch.float64), ids, objective.log_normaliser)
    torch.testing.assert_close(objective.log_normaliser.item(), math.log(40), rtol=1e-7, atol=0)


@pytest.mark.parametrize("correction", [True, False])
def test_estimation_finds_probabilities_and_negative_sampling_their_odds_over_the_noise(
    correction: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two anchors and three ids that come together so often; each pair has a score of its own. The noise is exactly as
    # frequent as the ids.
    joint = torch.tensor([[6, 2, 1], [1, 2, 5]], dtype=torch.float64)
    pairs = [(x, y) for x in range(2) for y in range(3) for _ in range(int(joint[x, y]))]
    ids = torch.tensor([y for _, y in pairs])
    monkeypatch.setattr(noise_contrastive, "draw", lambda *_, **__: ids.repeat(3))
    objective = build(
        ids,
        dim=2,
        negatives=3 * len(ids),
        power=1.0,
        normalized=False,
        temperature=1.0,
        shared=True,
        correction=correction,
        normaliser=1.0,
    )
    anchors = torch.eye(2, dtype=torch.float64)[[x for x, _ in pairs]][None]
    minimise(objective, anchors, ids, objective.weight)
    probabilities = joint / joint.sum(1, keepdim=True)
    expected = probabilities if correction else probabilities / (1 - probabilities) / (3 * ids.bincount())
    torch.testing.assert_close(objective.weight.detach().exp().T, expected, rtol=1e-5, atol=0)


def test_terms_are_cosines_counts_and_the_normaliser() -> None:
    z, ids = batch(1), torch.arange(6)
    objective = build(normalized=False, negatives=20)
    terms = objective(z, ids, None, 0).terms
    expected = F.cosine_similarity(z[0], objective.weight[:6], dim=1).mean()
    torch.testing.assert_close(terms["positive_similarity"], expected.detach())
    torch.testing.assert_close(terms["normaliser"].item(), float(IMAGES), rtol=1e-6, atol=0)
    assert terms["negatives"] == 20
    assert "normaliser" not in build(correction=False)(z, ids, None, 0).terms
    assert "normaliser" not in build(normaliser=3.0)(z, ids, None, 0).terms


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_coincident_zero_and_long_embeddings_have_finite_gradients(options: dict[str, Any]) -> None:
    objective = build(CLASSES, **options).float()
    rows = objective.weight.detach()
    z = torch.stack([rows[0], -rows[1], torch.zeros(DIM), rows[3] * 1e4])[None].requires_grad_()
    loss = objective(z, torch.arange(4), None, 0).total
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, [z, *objective.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_what_is_known_from_the_images_is_no_part_of_a_checkpoint() -> None:
    assert build().state_dict().keys() == {"weight", "log_normaliser"}
    assert build(normaliser=2.0).state_dict().keys() == {"weight"}
    assert build().shards() == {"weight": IMAGES}


def test_one_id_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 ids, and there is 1: .*ids=images"):
        build(torch.zeros(3, dtype=torch.int64))


def test_an_id_without_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="12 ids, 0 to 11; the batch holds ids from 3 to 12"):
        build()(batch(1, 2), torch.tensor([3, 12]), None, 0)


@pytest.mark.parametrize("options", [{"negatives": 0}, {"power": -0.1}, {"normaliser": 0.0}, {"temperature": 0.0}])
def test_numbers_out_of_bounds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        NoiseContrastive(**options)


def test_without_the_correction_there_is_little_noise_unless_it_is_given() -> None:
    assert [NoiseContrastive(correction=correction).traits.noise for correction in (True, False)] == [1024, 5]
    assert NoiseContrastive(correction=False, negatives=5).traits.noise == 5


def test_negative_sampling_draws_noise_for_each_anchor_and_estimation_for_all_unless_it_is_said() -> None:
    settings = [NoiseContrastive(correction=c, shared=s) for c in (True, False) for s in (None, True, False)]
    assert [one.traits.one_draw for one in settings] == [True, True, False, False, True, False]
    views, images = 2, 64
    z = torch.randn(views, images, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for shared, rows in ((True, 5), (None, images * views * 5)):
        objective = NoiseContrastive(correction=False, shared=shared).build(
            dim=DIM, population=Population(torch.arange(100_000)), seed=4
        )
        (gradient,) = torch.autograd.grad(objective.double()(z, torch.arange(images), None, 0).total, objective.weight)
        # Next to no row of so many is drawn twice.
        assert int(gradient[images:].any(1).sum()) == pytest.approx(rows, rel=0.02)


def test_noise_of_its_own_for_each_anchor_has_the_expectation_of_noise_for_all() -> None:
    z, ids = batch(), torch.arange(6)
    means = []
    for shared in (True, False):
        objective = build(CLASSES, negatives=20, correction=False, shared=shared)
        means.append(torch.stack([objective(z, ids, None, step).total.detach() for step in range(400)]))
    deviation = (means[0].var() / 400 + means[1].var() / 400).sqrt()
    assert abs(means[0].mean() - means[1].mean()) < 4 * deviation


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_information_is_infonces_over_the_noise_less_what_the_noise_itself_differs(options: dict[str, Any]) -> None:
    objective, z, ids = build(CLASSES, **options), batch(), torch.tensor([6, 6, 2, 0, 5, 4])
    settings, frequencies = objective.settings, CLASSES.bincount()
    law = weights_of(frequencies, settings.power) / weights_of(frequencies, settings.power).sum()
    shares = frequencies.double() / frequencies.sum()
    divergence = float((shares * (shares / law).log()).sum())
    bounds, ceilings = [], []
    for view, drawn in zip(z, drawn_for(frequencies, settings, 3, 2, 6), strict=True):
        for x, own, numbers in zip(view, ids.tolist(), drawn, strict=True):
            counted = [number for number in numbers if settings.correction or number != own]
            rows = objective.weight[[own, *counted]]
            if settings.normalized:
                rows, x = F.normalize(rows, dim=1), F.normalize(x, dim=0)
            scores = rows @ x / settings.temperature
            if settings.correction:
                scores = scores - law[[own, *counted]].log()
            bounds.append(math.log(len(scores)) + float(scores.log_softmax(0)[0].detach()) - divergence)
            ceilings.append(math.log(len(scores)) - divergence)
    terms = objective(z, ids, None, 3).terms
    assert terms["information"].item() == pytest.approx(sum(bounds) / 12, abs=1e-9)
    assert terms["ceiling"].item() == pytest.approx(sum(ceilings) / 12, abs=1e-9)


def test_noise_that_is_too_little_and_too_unlike_bounds_nothing() -> None:
    # One id in a thousand is drawn half of the time.
    ids = torch.cat([torch.zeros(1000, dtype=torch.int64), torch.arange(1, 60)])
    assert "information" not in build(ids, power=0.0, negatives=1)(batch(1, 2), torch.tensor([0, 1]), None, 0).terms
    assert "information" in build(ids, power=1.0, negatives=1)(batch(1, 2), torch.tensor([0, 1]), None, 0).terms
