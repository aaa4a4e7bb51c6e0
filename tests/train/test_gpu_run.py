"""Whole runs on pretend GPUs, of one process and of several: metrics, host waits, collectives, resume."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_waits import log_and_results

from manyviews import recipe
from manyviews.config import load
from manyviews.run.folder import read_metrics
from manyviews.system.background import finished
from manyviews.train.finetune.loop import finetune
from manyviews.train.finetune.settings import FinetuneSettings
from manyviews.train.pretrain import pretrain, train_step
from pretend_cuda import Log, pretend_cuda
from processes import launched
from small_run import photographs, small_run
from stopped_runs import content, differing, newest, stop_after

ROOMS = ("train/", "run/", "system/", "encoder/", "optim.py")
OTHERS = ("blocking copy to GPU of", "index_put by a mask")
"""What DDP's buckets do on a pretend GPU, which is no CUDA device to them, and the backward of other rooms."""


def run(folder: Path, *words: str, steps: int = 6) -> recipe.Recipe:
    # 10,000 images in batches of 32: 312 steps are an epoch. SGD: Adam's first steps enlarge rounding errors.
    small = ["train.batch_size=32", f"train.epochs={steps / 312}", "train.log_every=1", "train.monitor=1"]
    small += ["train.precision=fp32", "train.preview=0", "train.threads=1", "train.workers=0", "optim.name=sgd"]
    given = {word.split("=")[0] for word in words}
    kept = [word for word in small if word.split("=")[0] not in given]
    return load(recipe.Recipe, recipe.find("quickstart"), [*kept, *words, f"output={folder}"])


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without what follows the clock."""
    timed = ("seconds", "images_per_second")
    return [{name: value for name, value in line.items() if name not in timed} for line in read_metrics(folder)]


def own_waits(log: Log) -> int:
    """Waits in the rooms of training."""
    found = {line: count for line, count in log.waits.items() if line.startswith(ROOMS)}
    return sum(count for line, count in found.items() if not any(other in line for other in OTHERS))


def test_a_run_on_a_gpu_has_the_lines_of_the_cpu_in_their_order_and_no_step_waits(tmp_path: Path) -> None:
    expected = lines(pretrain(run(tmp_path / "cpu")))
    with pretend_cuda() as log:
        found, waits, looks = lines(pretrain(run(tmp_path / "gpu"))), own_waits(log), log.looks.total()
        log.clear()
        pretrain(run(tmp_path / "longer", steps=10))
        assert own_waits(log) == waits
        # The host asks for the step before, while the GPU has the next one to do.
        assert log.looks.total() == looks + 4 >= 9
    assert [(line["step"], *line) for line in found] == [(line["step"], *line) for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=2e-2), line["step"]


@pytest.mark.parametrize(
    "words", [(), ("train.precision=fp16",), ("optim.name=lars",), ("optim.clip=1",), ("train.chunk=8",)]
)
def test_training_adds_no_wait_to_a_step(words: tuple[str, ...]) -> None:
    log, _ = log_and_results("list_net", *words)
    assert (own_waits(log), log.looks.total()) == (0, 1)


def test_a_run_that_was_stopped_on_a_gpu_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretend_cuda():
        pretrain(run(tmp_path / "straight", "train.log_every=2"))
        with monkeypatch.context() as patch:
            stop_after(patch, 3)
            with pytest.raises(SystemExit):
                pretrain(run(tmp_path / "stopped", "train.log_every=2"))
        # The line of step 2 is there, though its figures were read after a later step.
        assert [line["step"] for line in lines(tmp_path / "stopped")] == [1, 2]
        pretrain(run(tmp_path / "stopped", "train.log_every=2", "resume=true"))
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    assert differing(content(tmp_path / "straight"), content(tmp_path / "stopped")) == []


def test_the_last_line_is_written_when_training_fails_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(components: Any, images: Any, ids: Any, epoch: int, step: int) -> Any:
        if step == 3:
            raise ZeroDivisionError
        return train_step(components, images, ids, epoch, step)

    monkeypatch.setattr("manyviews.train.pretrain.train_step", failing)
    # A thread that is done at once.
    monkeypatch.setattr("manyviews.train.recorder.in_a_thread", finished)
    with pretend_cuda(), pytest.raises(ZeroDivisionError):
        pretrain(run(tmp_path / "run", "train.monitor=0"))
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def on_gpus(folder: Path, *words: str) -> None:
    """A run of one of several processes, each with a pretend GPU; writes what it has waited for and sent."""
    with pretend_cuda(devices=4) as log:
        pretrain(run(folder, *words, steps=4))
        told = {"waits": own_waits(log), "collectives": dict(log.collectives)}
    with (folder.parent / f"{folder.name}.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\n")


def stopped_on_gpus(folder: Path, *words: str) -> None:
    """As `on_gpus`, but stopped after two steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            on_gpus(folder, *words)


@pytest.mark.slow
def test_a_run_on_several_gpus_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    # With a bank, whose rows are sharded.
    launched(on_gpus, tmp_path / "straight", "objective=bank", count=2)
    launched(stopped_on_gpus, tmp_path / "stopped", "objective=bank", count=2)
    launched(on_gpus, tmp_path / "stopped", "objective=bank", "resume=true", count=2)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    assert differing(content(tmp_path / "straight"), content(tmp_path / "stopped")) == []


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_gpus_compute_what_one_does(tmp_path: Path, count: int) -> None:
    with pretend_cuda():
        expected = lines(pretrain(run(tmp_path / "one", steps=4)))
    launched(on_gpus, tmp_path / "many", count=count)
    # Batch norms see the batches of all.
    for line, other in zip(lines(tmp_path / "many"), expected, strict=True):
        assert line == pytest.approx(other, rel=2e-2), line["step"]
    told = [json.loads(line) for line in (tmp_path / "many.jsonl").read_text().splitlines()]
    assert len(told) == count
    # Rank 0, which writes checkpoints and the backbone, waits for those too.
    assert min(rank["waits"] for rank in told) <= 20
    assert all(name.startswith(("nccl", "gloo")) for rank in told for name in rank["collectives"])


def test_fine_tuning_in_fp16_goes_on_with_its_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tmp_path / "run")
    data = [f"data={photographs(tmp_path / 'photographs')}", "data.channels=1", "data.size=28", "precision=fp16"]
    short = ["epochs=1", "min_steps=8", "batch_size=12", "threads=1", "workers=0", "log_every=2", "checks=2"]

    def tune(folder: Path, *words: str) -> Path:
        return finetune(
            str(tmp_path / "run"), load(FinetuneSettings, None, [*data, *short, *words, f"output={folder}"])
        )

    with pretend_cuda():
        tune(tmp_path / "straight")
        with monkeypatch.context() as patch:
            stop_after(patch, 5)
            with pytest.raises(SystemExit):
                tune(tmp_path / "stopped")
        kept = newest(tmp_path / "stopped").metadata["scaler"]
        assert kept["_growth_tracker"] + kept["scale"] != 2.0**16
        tune(tmp_path / "stopped", "resume=true")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    assert differing(content(tmp_path / "straight"), content(tmp_path / "stopped")) == []
    scalers = [newest(tmp_path / name).metadata["scaler"] for name in ("straight", "stopped")]
    assert scalers[0] == scalers[1]
