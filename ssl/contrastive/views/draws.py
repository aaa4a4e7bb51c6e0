"""Random numbers that are a pure function of what they are for.

A view must be the same in any batch, on any rank, with any number of workers, after any resume. So nothing is drawn
from a generator with a state: every number is computed from the key (seed, epoch, image id, view, parameter).
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 16.
INCREMENT = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
WORD = (1 << 64) - 1


def uniform(
    ids: Int64[Tensor, " batch"], *, seed: int, epoch: int, num_views: int, parameters: Int64[Tensor, " parameters"]
) -> Float[Tensor, "parameters views batch"]:
    """Numbers in [0, 1), one per numbered parameter, view and image; equal keys give equal numbers on every device.

    Each (seed, epoch, view, id) is hashed into the start of a SplitMix64 sequence, and its p-th member is the draw for
    parameter p. 24 bits, so that float32 holds the number exactly and 1 is never reached. The global generators of
    torch are neither read nor moved.
    """
    starts = torch.stack([_mix(ids + _signed(_key(seed, epoch, view))) for view in range(num_views)])
    steps = (parameters + 1) * _signed(INCREMENT)
    bits = _shift_right(_mix(starts + steps[:, None, None]), 64 - 24)
    return bits.to(torch.float32) * 2.0**-24


def _key(*words: int) -> int:
    key = 0
    for word in words:
        key = (key + word + INCREMENT) & WORD
        for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
            key = ((key ^ (key >> shift)) * multiplier) & WORD
    return key


def _mix(state: Tensor) -> Tensor:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        state = (state ^ _shift_right(state, shift)) * _signed(multiplier)
    return state


def _shift_right(state: Tensor, shift: int) -> Tensor:
    # torch has no unsigned 64-bit arithmetic: its shift copies the sign bit, so the copies are masked away.
    return (state >> shift) & ((1 << (64 - shift)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
