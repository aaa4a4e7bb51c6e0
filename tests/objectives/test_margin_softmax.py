"""Softmax with angular margins against sums written out in float64, against another library, and at its limits."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from manyviews.config import dump_yaml, load
from manyviews.objectives import MarginSoftmax, Population
from manyviews.objectives.margin_softmax import (
    PRESETS,
    MarginSoftmaxObjective,
    angles_between,
    annealed,
    least_scale,
    margin_cosine,
)
from manyviews.recipe import Recipe

DIM, CLASSES = 6, 9
RANDOM: dict[str, Any] = {"m1": 1.37, "m2": 0.61, "m3": 0.23, "scale": 11.0}


def build(classes: int = CLASSES, dim: int = DIM, **settings: Any) -> MarginSoftmaxObjective:
    objective = MarginSoftmax.model_validate(settings).build(
        dim=dim, population=Population(torch.arange(classes)), seed=0
    )
    assert isinstance(objective, MarginSoftmaxObjective)
    return objective.double()


def batch(views: int = 2, count: int = 7, dim: int = DIM, length: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(views)
    return (torch.randn(views, count, dim, dtype=torch.float64, generator=generator) * length).requires_grad_()


def falling(angle: Tensor) -> Tensor:
    """ψ by its definition, interval by interval."""
    k = next(k for k in range(100) if angle <= (k + 1) * math.pi)
    return (-1) ** k * torch.cos(angle) - 2 * k


def oracle(embeddings: Tensor, ids: Tensor, weights: Tensor, settings: MarginSoftmax, step: int) -> Tensor:
    losses, classes = [], len(weights)
    least = (classes - 1) / classes * math.log((classes - 1) * 0.9999 / 0.0001)
    for view in embeddings:
        for x, own in zip(view, ids, strict=True):
            scale = (settings.scale or least) if settings.normalized else x.norm()
            cosines = [x @ w / x.norm() / w.norm() for w in weights]
            target = falling(settings.m1 * torch.arccos(cosines[own]) + settings.m2) - settings.m3
            if settings.annealing:
                weight = max(5, 1000 / (1 + settings.annealing * step))
                target = (weight * cosines[own] + target) / (1 + weight)
            others = [torch.exp(scale * cosine) for j, cosine in enumerate(cosines) if j != own]
            losses.append(-torch.log(torch.exp(scale * target) / (torch.exp(scale * target) + sum(others))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("settings", [*({"preset": name} for name in PRESETS), RANDOM], ids=str)
@pytest.mark.parametrize("views", [1, 2])
def test_loss_and_gradients_equal_the_double_loop(settings: dict[str, Any], views: int) -> None:
    objective, z, ids = build(**settings), batch(views), torch.tensor([4, 4, 8, 0, 1, 0, 7])
    with torch.no_grad():  # in training the weights do not stay of length 1
        objective.weight.mul_(torch.linspace(0.3, 3, CLASSES)[:, None])
    found = objective(z, ids, None, 50).total
    expected = oracle(z, ids, objective.weight, objective.settings, 50)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    learned = [z, objective.weight]
    torch.testing.assert_close(
        torch.autograd.grad(found, learned), torch.autograd.grad(expected, learned), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    ("preset", "numbers"),
    [
        ("norm_face", (1, 0, 0)),
        ("sphereface", (4, 0, 0)),
        ("cosface", (1, 0, 0.35)),
        ("arcface", (1, 0.5, 0)),
        ("combined_1", (1, 0.3, 0.2)),
        ("combined_2", (0.9, 0.4, 0.15)),
    ],
)
def test_a_preset_has_its_papers_numbers_and_given_ones_override_them(preset: Any, numbers: tuple[float, ...]) -> None:
    settings = MarginSoftmax(preset=preset)
    assert (settings.m1, settings.m2, settings.m3) == numbers
    assert (settings.annealing, settings.normalized) == ((0.12, False) if preset == "sphereface" else (None, True))
    other = MarginSoftmax(preset=preset, m2=0.25, annealing=None)
    assert (other.m1, other.m2, other.m3, other.annealing) == (numbers[0], 0.25, numbers[2], None)


def test_the_defaults_that_help_shows_are_those_of_the_default_preset() -> None:
    fields = MarginSoftmax.model_fields
    assert all(fields[key].default == value for key, value in PRESETS[fields["preset"].default].items())
    assert MarginSoftmax() == MarginSoftmax(preset="arcface")


def test_the_config_that_is_written_says_the_numbers_and_is_read_back_as_they_were() -> None:
    recipe = load(Recipe, None, ["objective.name=margin_softmax", "objective.preset=cosface", "objective.m3=0.4"])
    text = dump_yaml(recipe)
    assert "m3: 0.4" in text
    assert "m2: 0.0" in text
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_an_unknown_preset_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="magface"):
        load(Recipe, None, ["objective.name=margin_softmax", "objective.preset=magface"])


@pytest.mark.parametrize("options", [{"m1": 0.0}, {"m1": 17.0}, {"m2": -0.1}, {"m2": 3.2}, {"m3": 2.1}, {"scale": 0.0}])
def test_numbers_out_of_bounds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MarginSoftmax(**options)


def test_a_scale_for_embeddings_of_their_own_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale=30\.0 is for embeddings of length 1.*normalized=true"):
        MarginSoftmax(preset="sphereface", scale=30.0)
    assert MarginSoftmax(preset="sphereface", normalized=True, scale=30.0).m1 == 4


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 ids, and there is 1: .*ids=images"):
        build(classes=1)


def test_an_id_without_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match="9 ids, 0 to 8; the batch holds ids from 2 to 9"):
        build()(batch(count=2), torch.tensor([2, 9]), None, 0)


def test_psi_of_four_falls_from_one_to_minus_seven() -> None:
    found = margin_cosine(torch.linspace(0, math.pi, 5, dtype=torch.float64), 4.0, 0.0, 0.0)
    torch.testing.assert_close(found, torch.tensor([1.0, -1, -3, -5, -7], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("numbers", [(1, 0, 0), (4, 0, 0), (1, 0.5, 0), (0.9, 0.4, 0.15), (2.7, 3, 0.5), (16, 1, 0)])
def test_the_target_falls_with_the_angle_without_a_jump(numbers: tuple[float, float, float]) -> None:
    angles = torch.linspace(0, math.pi, 100_001, dtype=torch.float64)
    steps = margin_cosine(angles, *map(float, numbers)).diff()
    assert (steps <= 1e-14).all()
    assert steps.abs().max() <= numbers[0] * math.pi / 100_000 * 1.001


def test_the_derivative_of_the_target_is_continuous_where_it_turns_over() -> None:
    for fold in (1, 2, 3):
        angles = (fold * math.pi / 4 + torch.tensor([-1e-6, 0, 1e-6], dtype=torch.float64)).requires_grad_()
        (slopes,) = torch.autograd.grad(margin_cosine(angles, 4.0, 0.0, 0.0).sum(), angles)
        assert slopes.abs().max() < 2e-5


def test_without_a_margin_it_is_the_softmax_of_cosines() -> None:
    z, ids = batch(), torch.arange(7)
    cosines = F.normalize(z.flatten(0, 1), dim=1) @ F.normalize(build().weight, dim=1).T
    expected = F.cross_entropy(13 * cosines, ids.repeat(2))
    for settings in ({"preset": "norm_face"}, {"preset": "arcface", "m2": 0.0}, {"preset": "cosface", "m3": 0.0}):
        found = build(**settings, scale=13.0)(z, ids, None, 0).total
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_any_margin_makes_the_loss_larger() -> None:
    z, ids = batch(), torch.arange(7)
    plain = build(preset="norm_face")(z, ids, None, 0).total
    for preset in ("arcface", "cosface", "combined_1", "combined_2"):
        assert build(preset=preset)(z, ids, None, 0).total > plain


def test_lambda_falls_from_a_thousand_to_five() -> None:
    found = [annealed(step, 0.12) for step in (0, 25, 1_000, 1_658)]
    assert found == pytest.approx([1000, 250, 1000 / 121, 1000 / 199.96])
    assert annealed(1_659, 0.12) == annealed(10**6, 0.12) == 5
    z, ids, objective = batch(), torch.arange(7), build(preset="sphereface")
    assert [objective(z, ids, None, step).terms["lambda"].item() for step in (25, 5_000)] == [250, 5]
    assert "lambda" not in build()(z, ids, None, 0).terms


def test_annealing_comes_from_the_softmax_and_goes_to_the_margin() -> None:
    z, ids = batch(), torch.arange(7)
    losses = [build(preset="sphereface")(z, ids, None, step).total for step in (0, 100, 2_000)]
    plain = build(m1=1.0, m2=0.0, normalized=False)(z, ids, None, 0).total
    assert plain < losses[0] < losses[1] < losses[2] < build(m1=4.0, m2=0.0, normalized=False)(z, ids, None, 0).total
    torch.testing.assert_close(losses[0], plain, rtol=0.01, atol=0)


@pytest.mark.parametrize(("probability", "scale"), [(0.99, 6.1), (0.999, 8.2), (0.9999, 10.3)])
def test_the_scale_for_ten_classes(probability: float, scale: float) -> None:
    assert round(least_scale(10, probability), 1) == scale


def test_the_least_scale_reaches_its_probability_at_the_corners_of_a_simplex() -> None:
    objective = build(preset="norm_face", classes=DIM, dim=DIM)
    corners = torch.eye(DIM, dtype=torch.float64) - 1 / DIM
    objective.weight.data.copy_(corners)
    found = objective(corners[None], torch.arange(DIM), None, 0)
    torch.testing.assert_close(math.exp(-found.total.item()), 0.9999, rtol=1e-9, atol=0)
    assert found.terms["scale"].item() == least_scale(DIM)
    torch.testing.assert_close(found.terms["angle"].item(), 0.0)


def test_terms_are_cosines_degrees_and_counts() -> None:
    objective, z, ids = build(preset="sphereface"), batch(1), torch.arange(7)
    cosines = torch.cosine_similarity(z[0], objective.weight[:7], dim=1)
    terms = objective(z, ids, None, 0).terms
    torch.testing.assert_close(terms["positive_similarity"], cosines.detach().mean())
    torch.testing.assert_close(terms["angle"], cosines.detach().arccos().rad2deg().mean())
    torch.testing.assert_close(terms["scale"], z.detach()[0].norm(dim=1).mean())
    assert terms["negatives"] == 8


def test_the_angle_is_exact_and_its_gradient_bounded_from_zero_to_pi() -> None:
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 1e-15)):
        expected = torch.tensor([0, 1e-9, 1e-6, 1e-3, 1, 3, math.pi - 1e-6, math.pi], dtype=torch.float64)
        rows = torch.stack([expected.cos(), expected.sin()], 1).to(dtype).requires_grad_()
        others = torch.tensor([1.0, 0.0], dtype=dtype).expand_as(rows)
        angles = angles_between(rows, others)
        torch.testing.assert_close(angles.double(), expected, rtol=tolerance, atol=tolerance)
        (gradient,) = torch.autograd.grad(angles.sum(), rows)
        lengths = gradient.norm(dim=1)
        assert gradient.isfinite().all()
        assert not lengths[0].any()
        # The arc cosine clamped at 1 − 1e-7 would see nothing below 4e-4.
        torch.testing.assert_close(lengths[1:7], torch.ones(6, dtype=dtype), rtol=1e-3, atol=0)


@pytest.mark.parametrize("settings", [*({"preset": name} for name in PRESETS), RANDOM], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coincident_opposite_and_zero_embeddings_have_finite_gradients(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    objective = build(**settings).to(dtype)
    weights = objective.weight.detach()
    z = torch.stack([weights[0], -weights[1], torch.zeros(DIM), weights[3] * 50]).to(dtype)[None].requires_grad_()
    loss = objective(z, torch.arange(4), None, 0).total
    gradients = torch.autograd.grad(loss, [z, objective.weight])
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_weight_of_zero_has_a_finite_gradient_also_where_the_embedding_is_zero() -> None:
    objective = build()
    objective.weight.data.zero_()
    z = torch.zeros(1, 2, DIM, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(objective(z, torch.arange(2), None, 0).total, [z, objective.weight])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_each_image_may_be_its_own_class() -> None:
    objective = build(classes=3_000, dim=16)
    z, ids = batch(2, 50, 16), torch.arange(50) * 60
    logits = F.normalize(z.flatten(0, 1), dim=1) @ F.normalize(objective.weight, dim=1).T
    angles = logits.gather(1, ids.repeat(2)[:, None]).arccos() + 0.5
    logits = objective.scale * logits.scatter(1, ids.repeat(2)[:, None], angles.cos())
    expected = F.cross_entropy(logits, ids.repeat(2))
    torch.testing.assert_close(objective(z, ids, None, 0).total, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        # Their margin is in degrees. Beyond π − m2 they go on with cos θ − m2 sin m2: no angle here is that large.
        ("ArcFaceLoss", {"margin": math.degrees(0.5), "scale": 20}, {"preset": "arcface", "scale": 20.0}),
        ("CosFaceLoss", {"margin": 0.35, "scale": 20}, {"preset": "cosface", "scale": 20.0}),
        ("NormalizedSoftmaxLoss", {"temperature": 1 / 20}, {"preset": "norm_face", "scale": 20.0}),
        # They do not anneal.
        ("SphereFaceLoss", {"margin": 4, "scale": 1}, {"preset": "sphereface", "annealing": None}),
        # Their weights keep their length: the same where it is 1.
        ("LargeMarginSoftmaxLoss", {"margin": 4, "scale": 1}, {"preset": "sphereface", "annealing": None}),
    ],
)
def test_it_equals_pytorch_metric_learning(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        loss = getattr(losses, name)(num_classes=CLASSES, embedding_size=DIM, **theirs).double()
    objective, z, ids = build(**ours), batch(1), torch.tensor([4, 4, 8, 0, 1, 0, 7])
    loss.W.data.copy_(F.normalize(objective.weight.detach(), dim=1).T)
    found, expected = objective(z, ids, None, 0).total, loss(z[0], ids)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-8, atol=1e-12)
