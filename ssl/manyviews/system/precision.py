"""Precision of matrix products on a GPU."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def tf32(wanted: bool = True) -> AbstractContextManager[None]:
    """Allows TF32 in float32 matrix products on GPUs while the context is open, if `wanted`.

    Tensor cores multiply TF32 some eight times as fast as float32, and add up in float32. The factors keep 10 of the 23
    bits behind the point: each is off by less than 2⁻¹⁰ of itself, and a product of two rows by less than 2⁻⁹ of the
    product of their lengths. Numbers of 16 bits with 10 bits behind the point or fewer, float16 and bfloat16, are TF32
    already. Products on a CPU, and convolutions, do not change. The setting is the process's, and is put back at the
    end, also after an error; a GPU without TF32 multiplies float32.

    Examples:
        >>> with tf32():
        ...     torch.backends.cuda.matmul.fp32_precision
        'tf32'
    """
    return _set("tf32") if wanted else nullcontext()


def exact() -> AbstractContextManager[None]:
    """Allows no TF32 in float32 matrix products while the context is open, whatever the process allows."""
    return _set("ieee")


@contextmanager
def _set(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
