"""NT-Xent against the paper's sums in float64, against other libraries, and at its limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triples import rival

from manyviews.objectives import InBatch, Population
from manyviews.objectives.in_batch import InBatchObjective, debiased, nt_xent


def embeddings(views: int = 2, batch: int = 7, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(views)
    return torch.randn(views, batch, dim, dtype=torch.float64, generator=generator).requires_grad_()


def oracle(
    views: Tensor,
    ids: Tensor,
    temperature: float,
    decoupled: bool = False,
    positive_probability: float = 0.0,
    hardness: float = 0.0,
) -> Tensor:
    rows = [(v, b, views[v, b] / views[v, b].norm()) for v in range(len(views)) for b in range(len(ids))]
    losses = []
    for v, b, anchor in rows:
        for w, c, positive in rows:
            if c != b or w == v:
                continue
            numerator = torch.exp(anchor @ positive / temperature)
            negatives = torch.stack([torch.exp(anchor @ z / temperature) for _, k, z in rows if ids[k] != ids[b]])
            importance = negatives**hardness
            denominator = (importance * negatives).sum() / importance.mean()
            expected = positive_probability * len(negatives) * numerator
            least = len(negatives) * math.exp(-1 / temperature)
            denominator = ((denominator - expected) / (1 - positive_probability)).clamp(min=least)
            losses.append(-torch.log(numerator / (denominator + (0 if decoupled else numerator))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoupled": True},
        {"positive_probability": 0.1},
        {"hardness": 1.5},
        {"hardness": 0.5, "positive_probability": 0.3},
        {"hardness": 0.5, "decoupled": True},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("ids", [range(7), [4, 4, 9, 4, 1, 0, 9]], ids=["distinct", "repeated"])
def test_loss_and_gradient_equal_the_double_loop(
    views: int, options: dict[str, Any], temperature: float, ids: list[int]
) -> None:
    z, numbers = embeddings(views), torch.tensor(list(ids))
    found, expected = nt_xent(z, numbers, temperature, **options).total, oracle(z, numbers, temperature, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("positive_probability", [0.0, 0.2])
def test_hardness_goes_to_the_unweighted_sum_as_it_goes_to_zero(positive_probability: float) -> None:
    z, ids = embeddings(), torch.arange(7)
    losses = [
        nt_xent(z, ids, 0.5, hardness=hardness, positive_probability=positive_probability).total
        for hardness in (0.0, 1e-7)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)


def test_the_debiased_loss_goes_to_nt_xent_as_the_probability_goes_to_zero() -> None:
    z, ids = embeddings(), torch.arange(7)
    found = nt_xent(z, ids, 0.5, positive_probability=1e-9).total
    torch.testing.assert_close(found, nt_xent(z, ids, 0.5).total, rtol=1e-6, atol=1e-6)


def test_great_hardness_leaves_the_hardest_negative_alone() -> None:
    z, ids = embeddings(), torch.arange(7)
    found = nt_xent(z, ids, 0.5, hardness=1000.0).total
    rows = F.normalize(z.flatten(0, 1), dim=1)
    similarities = rows @ rows.T / 0.5
    own = ids.repeat(2)[:, None] == ids.repeat(2)
    hardest = similarities.masked_fill(own, -torch.inf).amax(1) + math.log(12)
    positives = similarities[torch.arange(14), (torch.arange(14) + 7) % 14]
    torch.testing.assert_close(found, F.softplus(hardest - positives).mean(), rtol=1e-6, atol=1e-6)


def test_where_every_negative_may_be_a_positive_the_least_sum_holds_and_has_no_gradient() -> None:
    # Of Σ = 8 e^0 nearly all, 0.9 · 8 e^2, is expected to be positives: less than nothing is left.
    z = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)
    found = nt_xent(z, torch.arange(5), 0.5, positive_probability=0.9).total
    torch.testing.assert_close(found.item(), math.log1p((8 * math.exp(-2)) / math.exp(2)))
    # 2 · 0.9 e^0.5 = 2.967 of e^1 = 2.718, and of 2.98: ten times what is left there is 0.12, and the least is 0.27.
    negatives = torch.tensor([1.0, math.log(2.98)], dtype=torch.float64, requires_grad=True)
    positives = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    left = debiased(negatives, positives, torch.full((2,), 2.0, dtype=torch.float64), 0.9, 0.5)
    torch.testing.assert_close(left.detach(), torch.full((2,), math.log(2) - 2, dtype=torch.float64))
    assert not any(gradient.any() for gradient in torch.autograd.grad(left.sum(), [negatives, positives]))


@pytest.mark.parametrize("options", [{"positive_probability": 0.1}, {"hardness": 1.0, "positive_probability": 0.1}])
def test_the_corrected_sum_is_finite_where_what_is_left_vanishes(options: dict[str, Any]) -> None:
    # The sums and what is expected of positives in them differ by rounding only, on either side.
    view = torch.ones(8, 4)
    noise = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 1e-4, 1e-3, 1e-2):
        for probability in (0.1, 0.5, 0.99):
            z = (torch.stack([view, view]) + scale * noise).requires_grad_()
            loss = nt_xent(z, torch.arange(8), 0.01, **options | {"positive_probability": probability}).total
            assert loss.isfinite()
            assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_a_decoupled_loss_with_a_corrected_sum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"positive_probability 0\.1 exclude each other.*set decoupled=false"):
        InBatch(decoupled=True, positive_probability=0.1)


@pytest.mark.parametrize(("key", "value"), [("positive_probability", 1.0), ("hardness", -0.1)])
def test_options_out_of_bounds_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        InBatch(**{key: value})


@pytest.mark.parametrize("views", [2, 3])
def test_each_loss_says_what_infonce_of_its_scores_bounds(views: int) -> None:
    z, ids = embeddings(views), torch.tensor([1, 1, 1, 4, 5, 6, 7])
    # The mean of the logarithms: the logarithm of a mean number of candidates is more than can be said.
    ceiling = (3 * math.log(1 + views * 4) + 4 * math.log(1 + views * 6)) / 7
    plain = nt_xent(z, ids, 0.1).total.item()
    for options in ({}, {"decoupled": True}, {"positive_probability": 0.1}):
        terms = nt_xent(z, ids, 0.1, **options).terms
        assert terms["ceiling"].item() == pytest.approx(ceiling)
        assert terms["information"].item() == pytest.approx(ceiling - plain)
    sharp = nt_xent(z, ids, 0.1 / (1 + 1.5)).total.item()
    assert nt_xent(z, ids, 0.1, hardness=1.5).terms["information"].item() == pytest.approx(ceiling - sharp)


def test_the_bound_is_below_the_information_that_there_is() -> None:
    # Views that are a class and noise on a circle share no more than the class: log 8 nats, and a score that knows all.
    generator = torch.Generator().manual_seed(0)
    angles = torch.arange(8).repeat(64) * (math.pi / 4)
    noisy = angles + 0.02 * torch.randn(2, 512, generator=generator)
    z = torch.stack([noisy.cos(), noisy.sin()], 2).double()
    for options in ({}, {"decoupled": True}):
        found = nt_xent(z, torch.arange(512), 0.01, **options).terms["information"].item()
        assert math.log(8) - 0.2 < found < math.log(8) + 0.02


def test_the_module_passes_its_settings_on() -> None:
    z, ids = embeddings(), torch.arange(7)
    for options in ({}, {"decoupled": True}, {"positive_probability": 0.2, "hardness": 2.0}):
        found = (
            InBatch(temperature=0.3, **options)
            .build(dim=5, population=Population(torch.arange(7)), seed=0)(z, ids, None, 0)
            .total
        )
        assert torch.equal(found, nt_xent(z, ids, 0.3, **options).total)


def test_the_length_of_an_embedding_does_not_matter() -> None:
    z, ids = embeddings(), torch.arange(7)
    torch.testing.assert_close(nt_xent(z * 40, ids, 0.1).total, nt_xent(z, ids, 0.1).total)


def test_equal_embeddings_cost_the_logarithm_of_the_candidates() -> None:
    z = torch.ones(2, 16, 4, dtype=torch.float64)
    loss = nt_xent(z, torch.arange(16), 0.1)
    torch.testing.assert_close(loss.total.item(), math.log(31))
    assert loss.terms["negatives"] == 30
    torch.testing.assert_close(loss.terms["positive_similarity"].item(), 1.0)


def test_negatives_are_counted_without_repeated_images() -> None:
    terms = nt_xent(embeddings(), torch.tensor([1, 1, 1, 4, 5, 6, 7]), 0.1).terms
    torch.testing.assert_close(terms["negatives"].item(), (3 * 8 + 4 * 12) / 7)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"decoupled": True},
    {"positive_probability": 0.1},
    {"hardness": 1.0},
    {"hardness": 1.0, "positive_probability": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_identical_views_at_a_low_temperature_stay_finite(options: dict[str, Any], temperature: float) -> None:
    view = embeddings().detach()[0].float()
    z = torch.stack([view, view]).requires_grad_()
    loss = nt_xent(z, torch.arange(7), temperature, **options).total
    wide = nt_xent(z.double(), torch.arange(7), temperature, **options).total
    torch.testing.assert_close(loss.double(), wide, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_an_anchor_without_negatives_beside_others_adds_nothing() -> None:
    z, ids = embeddings(views=2, batch=2), torch.tensor([3, 3])
    for options in OPTIONS:
        loss = nt_xent(z, ids, 0.1, **options).total
        assert loss == 0
        assert not torch.autograd.grad(loss, z)[0].any()


def test_one_negative_is_enough() -> None:
    z = embeddings(batch=2)
    torch.testing.assert_close(nt_xent(z, torch.arange(2), 0.5).total, oracle(z, torch.arange(2), 0.5))


def test_one_view_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 views or more of each image, not 1; set views\.num_views=2"):
        nt_xent(embeddings(views=1), torch.arange(7), 0.1)


@pytest.mark.parametrize("temperature", [0.0, -0.1])
def test_a_temperature_of_zero_or_less_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        InBatch(temperature=temperature)


def test_a_tiny_temperature_is_allowed_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"temperature 0\.005 is below 0\.01"):
        InBatch(temperature=0.005)


def test_it_equals_the_usual_cross_entropy_in_float32() -> None:
    z, ids = embeddings(batch=300, dim=64).detach().float().requires_grad_(), torch.arange(300)
    flat = F.normalize(z.flatten(0, 1), dim=1)
    logits = (flat @ flat.T / 0.1).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, (torch.arange(600) + 300) % 600)
    found = nt_xent(z, ids, 0.1).total
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-4, atol=1e-8)


def test_it_equals_lightly() -> None:
    loss = rival("lightly.loss").NTXentLoss(temperature=0.2)
    z = embeddings(batch=50, dim=16).detach().float().requires_grad_()
    found, expected = nt_xent(z, torch.arange(50), 0.2).total, loss(z[0], z[1])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-4, atol=1e-8)


def test_decoupled_equals_lightly() -> None:
    loss = rival("lightly.loss").DCLLoss(temperature=0.2)
    z = embeddings(batch=50, dim=16).detach().float()
    found = nt_xent(z, torch.arange(50), 0.2, decoupled=True).total
    torch.testing.assert_close(found, loss(z[0], z[1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("views", [2, 3])
def test_it_equals_pytorch_metric_learning(views: int) -> None:
    loss = rival("pytorch_metric_learning.losses").NTXentLoss(temperature=0.2)
    z = embeddings(views, batch=20, dim=16).detach().float()
    expected = loss(z.flatten(0, 1), torch.arange(20).repeat(views))
    torch.testing.assert_close(nt_xent(z, torch.arange(20), 0.2).total, expected, rtol=1e-6, atol=1e-6)


def bilinear_oracle(
    views: Tensor, ids: Tensor, matrix: Tensor, temperature: float, decoupled: bool = False, hardness: float = 0.0
) -> Tensor:
    rows = [(v, b, views[v, b]) for v in range(len(views)) for b in range(len(ids))]
    losses = []
    for v, b, context in rows:
        for w, c, positive in rows:
            if c != b or w == v:
                continue
            numerator = torch.exp(positive @ matrix @ context / len(matrix) / temperature)
            negatives = torch.stack(
                [torch.exp(z @ matrix @ context / len(matrix) / temperature) for _, k, z in rows if ids[k] != ids[b]]
            )
            importance = negatives**hardness
            denominator = (importance * negatives).sum() / importance.mean()
            losses.append(-torch.log(numerator / (denominator + (0 if decoupled else numerator))))
    return torch.stack(losses).mean()


def some_matrix() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(5, 5, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("options", [{}, {"decoupled": True}, {"hardness": 1.5}, {"hardness": 0.5, "decoupled": True}])
@pytest.mark.parametrize("ids", [range(7), [4, 4, 9, 4, 1, 0, 9]], ids=["distinct", "repeated"])
def test_the_bilinear_loss_and_its_gradients_equal_the_double_loop(
    views: int, options: dict[str, Any], ids: list[int]
) -> None:
    z, numbers, matrix = embeddings(views), torch.tensor(list(ids)), some_matrix()
    found = nt_xent(z, numbers, 0.3, matrix=matrix, **options).total
    expected = bilinear_oracle(z, numbers, matrix, 0.3, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, [z, matrix]), torch.autograd.grad(expected, [z, matrix]), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("options", [{}, {"decoupled": True}, {"hardness": 1.5}])
def test_with_the_identity_and_embeddings_of_unit_variance_the_bilinear_loss_is_nt_xent(
    options: dict[str, Any],
) -> None:
    z, ids = embeddings(), torch.arange(7)
    objective = InBatch(score="bilinear", temperature=0.2, **options).build(
        dim=5, population=Population(torch.arange(7)), seed=0
    )
    found = objective.double()(F.normalize(z, dim=2) * math.sqrt(5), ids, None, 0)
    expected = nt_xent(z, ids, 0.2, **options)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.terms, expected.terms, rtol=1e-12, atol=1e-12)


def test_only_the_bilinear_score_has_a_matrix_alike_on_all_processes() -> None:
    bilinear = InBatch(score="bilinear").build(dim=5, population=Population(torch.arange(7)), seed=0)
    assert isinstance(bilinear, InBatchObjective)
    assert {name: tuple(value.shape) for name, value in bilinear.named_parameters()} == {"matrix": (5, 5)}
    assert bilinear.shards() == {}
    assert not list(InBatch().build(dim=5, population=Population(torch.arange(7)), seed=0).parameters())


def test_a_bilinear_score_with_a_corrected_sum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"positive_probability 0\.1 and score=bilinear exclude.*set score=cosine"):
        InBatch(score="bilinear", positive_probability=0.1)


def test_a_bilinear_loss_of_one_view_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not 1; set views\.num_views=2"):
        nt_xent(embeddings(views=1), torch.arange(7), 0.1, matrix=some_matrix())
