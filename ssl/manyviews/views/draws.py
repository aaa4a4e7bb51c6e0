"""Random numbers that are a pure function of what they are for.

A view must be the same in any batch, on any rank, with any number of workers, after any resume. So nothing is drawn
from a generator with a state: every number is computed from the key (seed, epoch, image id, view, parameter).
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from manyviews.system.keyed_random import INCREMENT, fraction, hashed, mix, signed


def uniform(
    ids: Int64[Tensor, " batch"], *, seed: int, epoch: int, num_views: int, parameters: Int64[Tensor, " parameters"]
) -> Float[Tensor, "parameters views batch"]:
    """Numbers in [0, 1), one per numbered parameter, view and image; equal keys give equal numbers on every device.

    Each (seed, epoch, view, id) is hashed into the start of a SplitMix64 sequence, and its p-th member is the draw for
    parameter p. The global generators of torch are neither read nor moved.
    """
    starts = torch.stack([mix(ids + signed(hashed(seed, epoch, view))) for view in range(num_views)])
    steps = (parameters + 1) * signed(INCREMENT)
    return fraction(mix(starts + steps[:, None, None]))
