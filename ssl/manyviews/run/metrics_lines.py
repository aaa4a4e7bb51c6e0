"""The lines of metrics.jsonl, read as what a cut, a crash of the machine or another program may have left."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from manyviews.system.files import LONGEST_LINE, open_regular

MOST_NAMED = 5
"""Lines of a file that a warning names."""


def kept_lines(metrics: Path, step: int, rubbish: list[int]) -> Iterator[bytes]:
    """The lines of metrics up to a step; the numbers of lines that hold no metrics are added to `rubbish`.

    A last line without an end is what a cut leaves, and is dropped without a word.
    """
    number = 0
    with open_regular(metrics) as file:
        while line := file.readline(LONGEST_LINE):
            number += 1
            whole = line.endswith(b"\n")
            while not whole and (rest := file.readline(LONGEST_LINE)):
                line, whole = b"", rest.endswith(b"\n")  # longer than any that is written
            found = _step_of(line)
            if found is None and whole:
                rubbish.append(number)
            elif found is not None and found <= step:
                yield line if whole else line + b"\n"


def _step_of(line: bytes) -> float | None:
    """The step of a line of metrics; None where it is none."""
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(found) if type(found) in (int, float) and abs(found) < math.inf else None


def in_words(lines: list[int]) -> str:
    """Numbers of lines as a person reads them."""
    shown_ones, others = ", ".join(f"{line:,}" for line in lines[:MOST_NAMED]), len(lines) - MOST_NAMED
    return f"line{'s' * (len(lines) > 1)} {shown_ones}{f' and {others:,} more' if others > 0 else ''}"
