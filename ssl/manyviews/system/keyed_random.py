"""Random numbers that are a pure function of what they are for: no generator, no state, the same on every device."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 16.
INCREMENT = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
WORD = (1 << 64) - 1


def uniform(places: Int64[Tensor, "*shape"], *key: int) -> Float[Tensor, "*shape"]:
    """Numbers in [0, 1), float32, one for each place: each is a function of its place and the key alone."""
    return fraction(mix(mix(places + signed(hashed(*key))) + signed(INCREMENT)))


def hashed(*words: int) -> int:
    """A 64-bit hash of some whole numbers."""
    key = 0
    for word in words:
        key = (key + word + INCREMENT) & WORD
        for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
            key = ((key ^ (key >> shift)) * multiplier) & WORD
    return key


def mix(state: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """SplitMix64's output function, elementwise."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        state = (state ^ _shift_right(state, shift)) * signed(multiplier)
    return state


def fraction(bits: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The upper 24 bits as a number in [0, 1): float32 holds it exactly, and 1 is never reached."""
    return _shift_right(bits, 64 - 24).to(torch.float32) * 2.0**-24


def signed(word: int) -> int:
    """The 64 bits as the whole number that torch's int64 has for them."""
    return word - (1 << 64) if word >> 63 else word


def _shift_right(state: Tensor, shift: int) -> Tensor:
    # torch has no unsigned 64-bit arithmetic: its shift copies the sign bit, so the copies are masked away.
    return (state >> shift) & ((1 << (64 - shift)) - 1)
