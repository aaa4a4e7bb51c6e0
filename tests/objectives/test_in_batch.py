"""NT-Xent against the paper's sums in float64, against other libraries, and at its limits."""

import math
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive.objectives import InBatch
from contrastive.objectives.in_batch import nt_xent


def embeddings(views: int = 2, batch: int = 7, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(views)
    return torch.randn(views, batch, dim, dtype=torch.float64, generator=generator).requires_grad_()


def oracle(views: Tensor, ids: Tensor, temperature: float, decoupled: bool) -> Tensor:
    rows = [(v, b, views[v, b] / views[v, b].norm()) for v in range(len(views)) for b in range(len(ids))]
    losses = []
    for v, b, anchor in rows:
        for w, c, positive in rows:
            if c != b or w == v:
                continue
            numerator = torch.exp(anchor @ positive / temperature)
            denominator = sum(torch.exp(anchor @ z / temperature) for _, k, z in rows if ids[k] != ids[b])
            losses.append(-torch.log(numerator / (denominator + (0 if decoupled else numerator))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("ids", [range(7), [4, 4, 9, 4, 1, 0, 9]], ids=["distinct", "repeated"])
def test_loss_and_gradient_equal_the_double_loop(
    views: int, decoupled: bool, temperature: float, ids: list[int]
) -> None:
    z, numbers = embeddings(views), torch.tensor(list(ids))
    found, expected = (
        nt_xent(z, numbers, temperature, decoupled=decoupled).total,
        oracle(z, numbers, temperature, decoupled),
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-9, atol=1e-12)


def test_the_module_passes_its_settings_on() -> None:
    z, ids = embeddings(), torch.arange(7)
    for settings in (InBatch(), InBatch(temperature=0.3, decoupled=True)):
        found = settings.build(dim=5, num_images=7, seed=0)(z, ids, None, 0).total
        assert torch.equal(found, nt_xent(z, ids, settings.temperature, decoupled=settings.decoupled).total)


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


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_identical_views_at_a_low_temperature_stay_finite(decoupled: bool, temperature: float) -> None:
    view = embeddings().detach()[0].float()
    z = torch.stack([view, view]).requires_grad_()
    loss = nt_xent(z, torch.arange(7), temperature, decoupled=decoupled).total
    wide = nt_xent(z.double(), torch.arange(7), temperature, decoupled=decoupled).total
    torch.testing.assert_close(loss.double(), wide, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("decoupled", [False, True])
def test_zero_rows_and_a_batch_without_negatives_stay_finite(decoupled: bool) -> None:
    z = torch.zeros(2, 3, 4, requires_grad=True)
    for ids in (torch.tensor([0, 1, 2]), torch.tensor([5, 5, 5])):
        loss = nt_xent(z, ids, 0.1, decoupled=decoupled).total
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_one_negative_is_enough() -> None:
    z = embeddings(batch=2)
    torch.testing.assert_close(nt_xent(z, torch.arange(2), 0.5).total, oracle(z, torch.arange(2), 0.5, False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_narrow_embeddings_are_computed_in_float32(dtype: torch.dtype) -> None:
    z, ids = embeddings().detach().to(dtype), torch.arange(7)
    with torch.autocast("cpu", dtype=dtype):
        loss = nt_xent(z, ids, 0.07).total
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(z.float(), ids, 0.07).total, rtol=1e-6, atol=1e-6)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2)
    z = embeddings(batch=50, dim=16).detach().float().requires_grad_()
    found, expected = nt_xent(z, torch.arange(50), 0.2).total, loss(z[0], z[1])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-4, atol=1e-8)


def test_decoupled_equals_lightly() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = pytest.importorskip("lightly.loss").DCLLoss(temperature=0.2)
    z = embeddings(batch=50, dim=16).detach().float()
    found = nt_xent(z, torch.arange(50), 0.2, decoupled=True).total
    torch.testing.assert_close(found, loss(z[0], z[1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("views", [2, 3])
def test_it_equals_pytorch_metric_learning(views: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = pytest.importorskip("pytorch_metric_learning.losses").NTXentLoss(temperature=0.2)
    z = embeddings(views, batch=20, dim=16).detach().float()
    expected = loss(z.flatten(0, 1), torch.arange(20).repeat(views))
    torch.testing.assert_close(nt_xent(z, torch.arange(20), 0.2).total, expected, rtol=1e-6, atol=1e-6)
