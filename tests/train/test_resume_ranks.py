"""A resume on several ranks, whose sums depend on the order of DDP's buckets, is bitwise."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manyviews import cli
from manyviews.system import distributed
from processes import launched
from small_run import photographs
from stopped_runs import content, differing, stop_after

QUICK = ["batch_size=16", "threads=1", "workers=0", "precision=fp32"]
PRETRAIN = ["simclr", "views.size=28", "data.size=28", *(f"train.{arg}" for arg in ("epochs=2", "monitor=0", *QUICK))]
FINETUNE = ["epochs=2", "min_steps=6", "mode=full", *QUICK]


def whole_and_stopped(root: str) -> None:
    """Pretrains and fine-tunes, once without a stop and once stopped after three steps and resumed."""
    data = f"data={root}/photos"
    for command, args in ((cli.pretrain, [*PRETRAIN, data]), (cli.finetune, [f"{root}/pretrain", data, *FINETUNE])):
        name = "pretrain" if command is cli.pretrain else "finetune"
        command([*args, f"output={root}/{name}"])
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 3)
            with pytest.raises(SystemExit):
                command([*args, f"output={root}/{name}-stopped"])
        # Rank 0 holds the folder until its command has ended.
        distributed.barrier()
        command([*args, f"output={root}/{name}-stopped", "resume=true"])
        distributed.barrier()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_were_stopped_end_with_the_bits_of_those_that_were_not(count: int, tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    launched(whole_and_stopped, str(tmp_path), count=count)
    assert differing(content(tmp_path / "pretrain"), content(tmp_path / "pretrain-stopped")) == []
    classifiers = [
        load_file(next((tmp_path / name / "classifier").glob("*.safetensors")))
        for name in ("finetune", "finetune-stopped")
    ]
    assert [name for name, value in classifiers[0].items() if not torch.equal(value, classifiers[1][name])] == []
