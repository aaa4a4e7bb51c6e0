"""The engine on a pretend GPU: where TF32 is allowed and what it costs, sums of groups, one algorithm on any ranks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pretend_cuda
from manyviews.engine import log_sum_exp, normalize
from manyviews.engine.rows import distinct, sum_of_groups
from pretend_cuda import Log

MATMUL = torch.backends.cuda.matmul


def unit_rows(count: int, dim: int = 16, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def truncated(numbers: Tensor) -> Tensor:
    """What tensor cores read of a float32: 10 bits behind the point, at worst without rounding."""
    return (numbers.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """A pretend GPU whose products are in TF32 where that is allowed."""

    def seen(numbers: Tensor) -> Tensor:
        return truncated(numbers) if MATMUL.fp32_precision == "tf32" else numbers

    kernels = {
        "mm": lambda a, b, **options: torch.mm(seen(a), seen(b), **options),
        "addmm_": lambda into, a, b, **options: into.addmm_(seen(a), seen(b), **options),
    }
    for name, kernel in kernels.items():
        monkeypatch.setitem(pretend_cuda.KERNELS, name, kernel)
    with pretend_cuda.pretend_cuda() as log:
        yield log


def both(keys: Tensor, temperature: float, *, tf32_gradient: bool, keys_learn: bool) -> list[list[Tensor]]:
    """Values and gradients on the GPU, and of the same numbers in float64."""
    ids, key_ids, weights = torch.arange(40), torch.arange(len(keys)), torch.rand(40, generator=torch.Generator())
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        queries = unit_rows(40).to(device, dtype).requires_grad_()
        own = (keys if device == "cuda" else keys.double()).to(device).requires_grad_(keys_learn)
        value = log_sum_exp(
            queries,
            own,
            temperature,
            query_ids=ids.to(device),
            key_ids=key_ids.to(device),
            unit=True,
            tf32_gradient=tf32_gradient,
        )
        learned = [queries, own] if keys_learn else [queries]
        gradients = torch.autograd.grad((value * weights.to(device, dtype)).sum(), learned)
        results.append([part.detach().cpu().double() for part in (value, *gradients)])
    return results


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_float32_scores_are_never_in_tf32(temperature: float) -> None:
    found, expected = both(unit_rows(300, seed=1), temperature, tf32_gradient=True, keys_learn=True)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_gradients_in_tf32_are_as_near_as_the_bound_says_and_exact_without(temperature: float) -> None:
    errors = []
    for tf32_gradient in (True, False):
        found, expected = both(unit_rows(300, seed=1), temperature, tf32_gradient=tf32_gradient, keys_learn=True)
        # The gradient in a query is a mean of unit rows over the temperature.
        errors.append((found[1] - expected[1]).norm(dim=1).max() * temperature)
        if tf32_gradient:
            # The gradient in a key is one of queries by their weights, of which there are as many as queries.
            assert (found[2] - expected[2]).norm(dim=1).max() < 2**-9 * expected[2].norm(dim=1).max()
    assert 1e-6 < errors[0] < 2**-9
    assert errors[1] < 1e-6


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_keys_of_16_bits_are_multiplied_in_tf32_within_the_bound(kind: torch.dtype) -> None:
    temperature = 0.07
    found, expected = both(unit_rows(300, seed=1).to(kind), temperature, tf32_gradient=True, keys_learn=False)
    assert 1e-6 < (found[0] - expected[0]).abs().max() < 2**-10 / temperature


def test_the_setting_is_put_back(gpu: Log) -> None:
    before = MATMUL.fp32_precision
    both(unit_rows(50, seed=1).bfloat16(), 0.1, tf32_gradient=True, keys_learn=True)
    assert MATMUL.fp32_precision == before
    assert not any("softmax" in line or "pairs" in line for line in gpu.waits)


@pytest.mark.parametrize("ids", [[3, 1, 3, 3, -7], [5], [2, 2], []], ids=str)
def test_groups_of_a_gpu_have_the_sums_of_a_cpu(ids: list[int]) -> None:
    numbers = torch.tensor(ids, dtype=torch.int64)
    rows = torch.randn(len(ids), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(len(ids), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        with pretend_cuda.pretend_cuda() as log:
            given, z = numbers.to(device), rows.to(device).requires_grad_()
            log.clear()
            values, groups = distinct(given)
            sums = sum_of_groups(z, groups, len(values))[groups]
            again = torch.searchsorted(values, given)
            assert not log.waits
            gradient = torch.autograd.grad((sums * weights.to(device)).sum(), z)[0]
            found.append([part.cpu() for part in (values[groups], sums.detach(), again == groups, gradient)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert found[0][0].tolist() == ids
    assert found[0][2].all()


def test_a_large_buffer_is_not_made_for_few_rows(gpu: Log) -> None:
    made = []
    real = torch.Tensor.new_empty

    def noted(tensor: Tensor, *size: Any, **options: Any) -> Tensor:
        result: Tensor = real(tensor, *size, **options)
        made.append(result.numel())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", noted)
        log_sum_exp(unit_rows(10).to("cuda"), unit_rows(20, seed=1).to("cuda"), 0.1)
    assert max(made) == 200
