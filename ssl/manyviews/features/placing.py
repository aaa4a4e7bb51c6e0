"""Where features are measured: on this process's GPU, if they fit in its memory."""

import torch
from torch import Tensor

from manyviews.system import distributed, hardware

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


def placed_on_all_ranks(local: Tensor, count: int, device: torch.device) -> Tensor:
    """Moves own rows to the device if `count` rows, of all ranks, fit on each; collective."""
    if device.type != "cuda":
        return local.to(device)
    # Those of the ranks, padded to one length, then those of all.
    needed = 3 * count * local.shape[1] * local.element_size()
    return local.to("cpu" if distributed.any_over_ranks(not fits(needed, device)) else device)


def gpu_of_this_process() -> torch.device | None:
    """The CUDA device that tensors of this process go to; None without one."""
    # Other accelerators lack float64, in which evaluators sum.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
