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
    own = features.nbytes if features.device.type == "cuda" else 0
    fits = copies * features.nbytes + work <= SHARE * (hardware.free(gpu) + own)
    return features.to(gpu if fits else "cpu")


def gpu_of_this_process() -> torch.device | None:
    """The CUDA device that tensors of this process go to; None without one."""
    # Other accelerators lack float64, in which evaluators sum.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
