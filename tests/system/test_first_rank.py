"""What rank 0 does for all ranks, who wait however long it takes."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from manyviews.system import distributed, first_rank
from manyviews.system.first_rank import from_first
from processes import launched

PATIENCE, LONG = 3.0, 7.0
"""Seconds until a collective times out, and of the work."""


def test_one_process_does_it_itself() -> None:
    assert from_first(lambda: [1, "two"]) == [1, "two"]


def work(folder: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    first_rank.BEAT = PATIENCE / 6
    rank, calls = distributed.rank(), list[str]()

    def long() -> dict[str, int]:
        calls.append("long")
        time.sleep(LONG)
        return {"made by": os.getpid()}

    def refused() -> int:
        calls.append("refused")
        raise ValueError("there are no images")

    said = ""
    value = from_first(long)
    try:
        from_first(refused)
    except (ValueError, OSError) as problem:
        said = f"{type(problem).__name__}: {problem}"
    after = from_first(lambda: 5)
    outcome = {"value": value, "pid": os.getpid(), "calls": calls, "said": said, "after": after}
    Path(folder, f"{rank}.json").write_text(json.dumps(outcome))


def test_the_others_wait_longer_than_a_collective_may_take_and_get_the_value_or_the_error(tmp_path: Path) -> None:
    launched(work, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["value"] == second["value"] == {"made by": first["pid"]}
    assert first["calls"] == ["long", "refused"]
    assert second["calls"] == []
    assert first["said"] == "ValueError: there are no images"
    assert second["said"] == "OSError: process 0: there are no images"
    assert first["after"] == second["after"] == 5
