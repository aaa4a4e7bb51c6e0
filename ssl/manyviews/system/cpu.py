"""What the CPU offers: its sets of instructions, and how many cores this process may use."""

import os

import torch


def has_instructions(*names: str) -> bool:
    """Whether the CPU has one of some sets of instructions, by the names of `torch.cpu.get_capabilities`."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return any(bool(capabilities().get(name)) for name in names)
    # Older versions of torch have a function for each; what they cannot tell of is not used.
    functions = [f"_is_{end}_supported" for name in names for end in (name, name.removeprefix("avx512_"))]
    return any(bool(getattr(torch.cpu, function, bool)()) for function in functions)


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
