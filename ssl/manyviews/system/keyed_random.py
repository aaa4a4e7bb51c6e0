"""Random numbers that are a pure function of what they are for: the same after a resume and on any number of ranks."""

import hashlib
from collections.abc import Sequence

import numpy as np
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
    return _fraction(_mix(_starts(places, key) + _signed(INCREMENT)))


def uniform_sequences(
    places: Int64[Tensor, " places"], keys: Sequence[Sequence[int]], members: Int64[Tensor, " members"]
) -> Float[Tensor, "members keys places"]:
    """Numbers in [0, 1): of the sequence that each key and place begin, the members of these numbers from 0 on.

    Equal keys give equal numbers on every device, and neither torch's nor NumPy's global generators are read or moved.
    """
    starts = torch.stack([_starts(places, key) for key in keys])
    steps = (members + 1) * _signed(INCREMENT)
    return _fraction(_mix(starts + steps[:, None, None]))


def hashed(*words: int) -> int:
    """A 64-bit hash of some whole numbers."""
    key = 0
    for word in words:
        key = (key + word + INCREMENT) & WORD
        for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
            key = ((key ^ (key >> shift)) * multiplier) & WORD
    return key


def seed_of(text: str, size: int = 8) -> int:
    """A seed of so many bytes by a hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "big")


def torch_generator(*key: int) -> torch.Generator:
    """A generator on the CPU, seeded by a key."""
    # Four bytes: of a seed's 64 bits torch's generator on the CPU reads the lower 32 only.
    return torch.Generator().manual_seed(seed_of(repr(key), 4))


def numpy_generator(stream: str, *key: int) -> np.random.Generator:
    """NumPy's generator seeded by a key; its stream keeps it apart from others with equal keys."""
    return np.random.default_rng([int.from_bytes(stream.encode(), "big"), *key])


def _starts(places: Tensor, key: Sequence[int]) -> Tensor:
    return _mix(places + _signed(hashed(*key)))


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's output function, elementwise."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        state = (state ^ _shift_right(state, shift)) * _signed(multiplier)
    return state


def _fraction(bits: Tensor) -> Tensor:
    """The upper 24 bits as a number in [0, 1): float32 holds it exactly, and 1 is never reached."""
    return _shift_right(bits, 64 - 24).to(torch.float32) * 2.0**-24


def _signed(word: int) -> int:
    """The 64 bits as the whole number that torch's int64 has for them."""
    return word - (1 << 64) if word >> 63 else word


def _shift_right(state: Tensor, shift: int) -> Tensor:
    # torch has no unsigned 64-bit arithmetic: its shift copies the sign bit, so the copies are masked away.
    return (state >> shift) & ((1 << (64 - shift)) - 1)
