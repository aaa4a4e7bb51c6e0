"""Counter-based random numbers (SplitMix64) and seeds: stateless, for exact resumes."""

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


def uniform(indices: Int64[Tensor, "*shape"], *key: int) -> Float[Tensor, "*shape"]:
    """Uniform float32 numbers in [0, 1), each a function of its index and the key alone."""
    return _fraction(_mix(_starts(indices, key) + _signed(INCREMENT)))


def uniform_sequences(
    indices: Int64[Tensor, " indices"], keys: Sequence[Sequence[int]], members: Int64[Tensor, " members"]
) -> Float[Tensor, "members keys indices"]:
    """Uniform numbers in [0, 1): members (from 0) of the sequence of each key and index.

    They are equal on all devices, and no global generator is used.
    """
    starts = torch.stack([_starts(indices, key) for key in keys])
    steps = (members + 1) * _signed(INCREMENT)
    return _fraction(_mix(starts + steps[:, None, None]))


def hashed(*numbers: int) -> int:
    """A 64-bit hash of integers."""
    key = 0
    for number in numbers:
        key = (key + number + INCREMENT) & WORD
        for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
            key = ((key ^ (key >> shift)) * multiplier) & WORD
    return key


def seed_of(text: str, size: int = 8) -> int:
    """A seed of `size` bytes from the hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "big")


def torch_generator(*key: int) -> torch.Generator:
    """A CPU generator of torch, seeded by a key."""
    # Four bytes: torch's CPU generator uses the lower 32 bits of a seed.
    return torch.Generator().manual_seed(seed_of(repr(key), 4))


def send(drawn: Tensor, device: torch.device) -> Tensor:
    """Sends what was drawn on the CPU to the device, without waiting for a GPU."""
    # From other than pinned memory the driver may wait for what the GPU has to do before.
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)


def numpy_generator(stream: str, *key: int) -> np.random.Generator:
    """A generator of NumPy, seeded by the name of its stream and a key."""
    return np.random.default_rng([int.from_bytes(stream.encode(), "big"), *key])


def _starts(indices: Tensor, key: Sequence[int]) -> Tensor:
    return _mix(indices + _signed(hashed(*key)))


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's output function, elementwise."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        state = (state ^ _shift_right(state, shift)) * _signed(multiplier)
    return state


def _fraction(bits: Tensor) -> Tensor:
    """The upper 24 bits as a float32 in [0, 1), exactly."""
    return _shift_right(bits, 64 - 24).to(torch.float32) * 2.0**-24


def _signed(word: int) -> int:
    """Reinterprets 64 bits as torch's int64."""
    return word - (1 << 64) if word >> 63 else word


def _shift_right(state: Tensor, shift: int) -> Tensor:
    # torch shifts int64 arithmetically: the copies of the sign bit are masked.
    return (state >> shift) & ((1 << (64 - shift)) - 1)
