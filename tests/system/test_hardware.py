"""What the CPU offers, with and without torch's public list of it."""

import pytest
import torch

from manyviews.system.hardware import cores, has_instructions


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
