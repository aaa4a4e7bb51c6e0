"""All commands on one, two and four pretend GPUs, with the results of the CPU."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from manyviews import cli
from manyviews.features import store
from manyviews.system import distributed
from pretend_cuda import Log, pretend_cuda
from processes import launched
from small_run import photographs
from stopped_runs import content, differing, stop_after

T = TypeVar("T")
QUICK = ["train.epochs=2", "train.batch_size=16", "train.threads=1", "train.workers=0", "train.precision=fp32"]
PRETRAIN = ["simclr", *QUICK, "views.size=28", "data.size=28", "train.log_every=2"]
EVALUATE = ["tasks=knn,linear,fractions,retrieval,clustering,verification,geometry", "baselines=false", "report=false"]
SHORT = ["epochs=1", "min_steps=1", "warmup_steps=0"]


@contextmanager
def gpus() -> Iterator[Log]:
    """The pretend GPUs of all ranks, of which this process uses its own."""
    with pretend_cuda(int(os.environ.get("WORLD_SIZE", "1"))) as log:
        yield log


def late(read: Callable[..., T]) -> Callable[..., T]:
    """The function, which takes its time on all ranks but 0: they may be behind."""

    def reading(*args: object) -> T:
        time.sleep(0.5 * (distributed.rank() > 0))
        return read(*args)

    return reading


def all_commands(root: str) -> None:
    """Runs every command on this rank's GPU, in the folder `root`."""
    data = f"data={root}/photos"
    with gpus():
        assert cli.pretrain([*PRETRAIN, data, f"output={root}/whole"]) == 0
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 3)
            with pytest.raises(SystemExit):
                cli.pretrain([*PRETRAIN, data, f"output={root}/stopped"])
        # Rank 0 holds the folder until its command has ended.
        distributed.barrier()
        assert cli.pretrain([*PRETRAIN, data, f"output={root}/stopped", "resume=true"]) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "remarks", late(store.remarks))
            assert cli.evaluate([f"{root}/whole", data, f"output={root}/on_gpu", *EVALUATE]) == 0
        assert cli.extract([f"{root}/whole", data, f"output={root}/features"]) == 0
        assert cli.finetune([f"{root}/whole", data, f"output={root}/finetuned", *SHORT]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_command_runs_on_gpus_with_the_results_of_the_cpu(count: int, tmp_path: Path) -> None:
    photographs(tmp_path / "photos", 60)
    if count == 1:
        all_commands(str(tmp_path))
    else:
        launched(all_commands, str(tmp_path), count=count)
    # A run that was stopped and resumed has the bits of one that was not.
    assert differing(content(tmp_path / "whole"), content(tmp_path / "stopped")) == []
    data = f"data={tmp_path}/photos"
    assert cli.extract([f"{tmp_path}/whole", data, f"output={tmp_path}/expected"]) == 0
    features, expected = (np.load(tmp_path / folder / "backbone.npy") for folder in ("features", "expected"))
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
    assert cli.evaluate([f"{tmp_path}/whole", data, f"output={tmp_path}/on_cpu", *EVALUATE]) == 0
    scores, on_cpu = measured(tmp_path / "on_gpu"), measured(tmp_path / "on_cpu")
    assert len(scores) >= 7
    assert scores == pytest.approx(on_cpu, abs=1e-3)


def measured(folder: Path) -> dict[str, float]:
    """The values of an evaluation, by task, features and metric."""
    measurements = json.loads((folder / "evaluation.json").read_text())["measurements"]
    return {f"{one['task']} {one['features']} {one['metric']}": one["value"] for one in measurements}
