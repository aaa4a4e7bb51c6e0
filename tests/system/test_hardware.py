"""What the machine offers, and how a lack of memory is told."""

import pytest
import torch

from manyviews.system.hardware import cores, has_instructions, shortage
from pretend_cuda import pretend_cuda


def test_instructions_are_looked_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_tile": False}, raising=False)
    assert has_instructions("amx_tile", "avx512_bf16")
    assert not has_instructions("amx_tile", "avx512_vnni")


def test_older_versions_of_torch_have_a_function_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert has_instructions("avx512_bf16")
    assert has_instructions("avx512_vnni")
    assert not has_instructions("amx_tile")


def test_there_is_a_core() -> None:
    assert cores() >= 1


def test_memory_that_runs_out_is_told_with_its_peak_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told = r"^memory ran out: .* machine's .* in use at most \(9 GB more\); less$"
    with pytest.raises(ValueError, match=told), shortage("less"):
        raise MemoryError("9 GB more\nand a table")
    with pytest.raises(RuntimeError, match="a shape"), shortage("less"):
        raise RuntimeError("a shape")
    with pretend_cuda():
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 60_000_000_000)
        told = r"^memory ran out: 60\.00 GB of the GPU's 85\.90 GB were in use at most \(CUDA out of memory\); less$"
        with pytest.raises(ValueError, match=told), shortage("less"):
            raise torch.OutOfMemoryError("CUDA out of memory")
