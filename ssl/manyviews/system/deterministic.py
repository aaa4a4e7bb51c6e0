"""Deterministic algorithms on a GPU, where torch otherwise takes faster ones that add in any order."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""The values of it by which cuBLAS adds in a fixed order (cuBLAS documentation, section 2.1.4)."""


@contextmanager
def deterministic(enabled: bool, key: str) -> Iterator[None]:
    """Makes the same input give the same bits on a GPU, while open; a CPU does so anyway.

    `key` is the setting that asks for it, for the messages.

    Raises:
        ValueError: if CUDA was started without what this needs, or in the body for an operator that has no
            deterministic algorithm, which it names.
    """
    if not enabled or not torch.cuda.is_available():
        yield
        return
    if os.environ.get(WORKSPACE) not in WORKSPACES:
        if torch.cuda.is_initialized():
            raise ValueError(
                f"{key}=true needs {WORKSPACE}={WORKSPACES[0]} in the environment before CUDA is started, and this "
                "process has started it; set it and start again"
            )
        os.environ[WORKSPACE] = WORKSPACES[0]
    cudnn = torch.backends.cudnn
    filling: Any = torch.utils.deterministic
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Memory is not read before it is written; to fill it would take a launch for each new tensor.
    cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = True, False, False
    try:
        yield
    except RuntimeError as problem:
        operator = re.match(r"(\S+) does not have a deterministic implementation", str(problem))
        if operator is None:
            raise
        raise ValueError(
            f"{key}=true: {operator[1]} has no deterministic algorithm on a GPU; leave {key} out, or choose an encoder "
            "or an objective that does without it"
        ) from problem
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = flags
