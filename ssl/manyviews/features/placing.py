"""Where features are measured: on this process's GPU, if they fit in its memory."""

import torch
from torch import Tensor

from manyviews.system import hardware

SHARE = 0.9
"""Share of a GPU's free memory that features, and what is computed from them, may take."""


def placed(features: Tensor, copies: int = 1, work: int = 0) -> Tensor:
    """Copies features to the GPU of this process if they fit there, else to the CPU; there they may be already.

    They fit if the free memory has room for `copies` of them and `work` more bytes.
    """
    gpu = gpu_of_this_process()
    if gpu is None:
        return features
    there = features.nbytes if features.device.type == "cuda" else 0
    return features.to(gpu if fits(copies * features.nbytes + work, gpu, there) else "cpu")


def fits(count: int, gpu: torch.device, there: int = 0) -> bool:
    """Whether a GPU has memory for so many bytes, of which some are `there` already."""
    return count <= SHARE * (hardware.free(gpu) + there)


def gpu_of_this_process() -> torch.device | None:
    """The CUDA device that tensors of this process go to; None without one."""
    # Other accelerators lack float64, in which evaluators sum.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
