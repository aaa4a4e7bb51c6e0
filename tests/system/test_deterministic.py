"""Deterministic algorithms: set and set back, and the operator that has none is named."""

import pytest
import torch

from manyviews.system.deterministic import WORKSPACE, deterministic
from pretend_cuda import pretend_cuda


def flags() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    algorithms = torch.are_deterministic_algorithms_enabled()
    return algorithms, cudnn.deterministic, cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory


def test_algorithms_are_deterministic_while_open_and_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = flags()
    with pretend_cuda(), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: False)
        with deterministic(True, "train.deterministic"):
            assert flags() == (True, True, False, False)
        assert flags() == before
        with pytest.raises(ZeroDivisionError), deterministic(True, "train.deterministic"):
            raise ZeroDivisionError
        assert flags() == before
        with deterministic(False, "train.deterministic"):
            assert flags() == before
    # A CPU adds in a fixed order as it is.
    with deterministic(True, "train.deterministic"):
        assert flags() == before


def test_an_operator_without_a_deterministic_algorithm_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    with (
        pretend_cuda(),
        pytest.raises(ValueError, match=r"^train\.deterministic=true: put_ has no .*; leave train\.deterministic out"),
        deterministic(True, "train.deterministic"),
    ):
        # One of the few that torch refuses on a CPU too.
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
    with pretend_cuda(), pytest.raises(RuntimeError, match="size"), deterministic(True, "train.deterministic"):
        torch.ones(2) + torch.ones(3)


def test_what_cublas_needs_cannot_be_set_after_cuda_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    with (
        pretend_cuda(),
        pytest.raises(ValueError, match=r"^train\.deterministic=true needs CUBLAS_WORKSPACE_CONFIG=:4096:8 .* start"),
        deterministic(True, "train.deterministic"),
    ):
        pass
