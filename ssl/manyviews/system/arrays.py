"""Reads tensors and arrays from untrusted files, without pickle."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from manyviews.system.files import MEBIBYTE, open_regular, shown
from manyviews.system.path_bytes import utf8_path

LARGEST_HEADER = 8 * MEBIBYTE
"""Bytes of a safetensors header, for a hundred thousand tensors."""
NPY = b"\x93NUMPY"


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Maps the tensors of a safetensors file; raises ValueError or OSError."""
    with open_regular(file) as content:
        header = int.from_bytes(content.read(8), "little")
    if header > LARGEST_HEADER:
        raise ValueError(f"{shown(file)} is damaged: its header should have {header:,} bytes")
    try:
        with utf8_path(file) as path:
            return dict(load_file(path))
    except (SafetensorError, ValueError, TypeError, RuntimeError) as problem:
        raise ValueError(f"{shown(file)} is damaged: {shown(problem)}") from problem


def mapped_array(file: Path, mode: Literal["r", "c"] = "r") -> np.memmap[Any, np.dtype[Any]]:
    """Maps a .npy file of real numbers; mode "c" is copy-on-write.

    Raises:
        ValueError: if it is damaged, or has no real numbers.
        OSError: if it cannot be read.
    """
    with open_regular(file) as content:
        start = content.read(len(NPY))
    if start != NPY:
        raise ValueError(f"{shown(file)} is no .npy file; write it with numpy.save")
    try:
        array = np.lib.format.open_memmap(file, mode)
    except OSError:
        raise
    except Exception as problem:  # a wrong header makes NumPy raise nearly anything
        raise ValueError(f"{shown(file)} is damaged, or no array of numbers: {shown(problem)}") from problem
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{shown(file)} holds {array.dtype}, and no real numbers; write it with numpy.save")
    return array
