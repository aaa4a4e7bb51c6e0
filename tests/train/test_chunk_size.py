"""`train.chunk=auto`: the largest chunk that fits, on pretend GPUs whose memory holds so many images at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_run import lines, run
from torch import Tensor

from manyviews import recipe
from manyviews.config import load
from manyviews.encoder.encoder import Encoder
from manyviews.system import distributed
from manyviews.train.chunk_size import fewest_parts
from manyviews.train.pretrain import pretrain
from pretend_cuda import pretend_cuda
from processes import launched
from stopped_runs import content, differing, stop_after


@contextmanager
def room_for(images: int) -> Iterator[list[int]]:
    """The encoder runs out of memory with more images; yields how many it was given each time."""
    given: list[int] = []
    forward = Encoder.forward

    def limited(self: Encoder, views: Tensor) -> Any:
        given.append(views.shape[1])
        if views.shape[1] > images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, views)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "forward", limited)
        yield given


@pytest.mark.parametrize(("local", "smallest"), [(1, 1), (7, 2), (32, 2), (100, 1), (256, 4)])
def test_the_fewest_parts_are_found_by_few_tries(local: int, smallest: int) -> None:
    for room in range(smallest, local + 2):
        tried: list[int] = []

        def fits(parts: int, room: int = room, tried: list[int] = tried) -> bool:
            tried.append(parts)
            return -(-local // parts) <= room

        if -(-local // max(local // smallest, 1)) > room:
            with pytest.raises(ValueError, match="not even"):
                fewest_parts(local, smallest, fits)
            continue
        found = fewest_parts(local, smallest, fits)
        assert fits(found)
        assert found == 1 or not fits(found - 1)
        assert len(set(tried)) == len(tried[:-2]) or found == 1
        assert len(tried) <= 4 + 2 * local.bit_length()


@pytest.mark.slow
def test_a_run_that_finds_its_chunk_is_bitwise_the_run_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    momentum = ["objective=queue", "objective.size=64", "optim.name=adamw", "train.monitor=0"]
    with pretend_cuda():
        named = pretrain(run(tmp_path / "named", *momentum, "train.chunk=8", steps=4))
        capsys.readouterr()
        with room_for(10), monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(SystemExit):
                pretrain(run(tmp_path / "found", *momentum, "train.chunk=auto", steps=4))
        assert "chunk      8: the most images that fit (train.chunk=auto)" in capsys.readouterr().out
        assert load(recipe.Recipe, tmp_path / "found" / "config.yaml").train.chunk == 8
        # What was found is not sought again.
        found = pretrain(run(tmp_path / "found", *momentum, "train.chunk=auto", "resume=true", steps=4))
        # A finished run says so.
        assert pretrain(run(tmp_path / "found", *momentum, "train.chunk=auto", "resume=true", steps=4)) == found
    assert lines(found) == lines(named)
    assert differing(content(named), content(found)) == []


@pytest.mark.slow
def test_a_batch_that_fits_is_not_divided_and_what_never_fits_is_refused(tmp_path: Path) -> None:
    with pretend_cuda(), room_for(32) as given:
        pretrain(run(tmp_path / "whole", "train.chunk=auto", "train.monitor=0", steps=2))
        assert load(recipe.Recipe, tmp_path / "whole" / "config.yaml").train.chunk is None
        assert given == [32, 32, 32]
    with (
        pretend_cuda(),
        room_for(1),
        pytest.raises(ValueError, match=r"not even 2 images at a time fit .* views\.size"),
    ):
        pretrain(run(tmp_path / "none", "train.chunk=auto", steps=2))
    assert not (tmp_path / "none").exists()


def test_on_a_cpu_the_chunk_is_named_by_the_user(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train\.chunk=auto tries .* GPU; a CPU would swap: name a number of images"):
        pretrain(run(tmp_path / "run", "train.chunk=auto"))


def found_together(folder: Path) -> None:
    room = {0: 16, 1: 5}[int(os.environ["RANK"])]
    with pretend_cuda(devices=2), room_for(room):
        pretrain(run(folder, "train.chunk=auto", "train.monitor=0", steps=2))
        # What was tried alone is over.
        assert distributed.world_size() == 2


def test_all_ranks_take_the_smallest_chunk(tmp_path: Path) -> None:
    launched(found_together, tmp_path / "run", count=2)
    # 16 images on each: in 4 parts, of 4, where 5 fit.
    assert load(recipe.Recipe, tmp_path / "run" / "config.yaml").train.chunk == 4
