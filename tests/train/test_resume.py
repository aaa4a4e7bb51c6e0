"""Two processes that were stopped or killed go on bit for bit; another number of them goes on with the same rows."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manyviews import cli
from manyviews.config import load
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import Checkpoint, writing
from manyviews.run.checkpoints.checkpoint import read_manifest
from manyviews.run.folder import read_metrics
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.system.launch import Stop
from manyviews.system.launch import start as start_run
from manyviews.train import pretrain as loop
from manyviews.train.pretrain import pretrain, train_step
from manyviews.train.recorder import Recorder, state_of
from manyviews.train.resume import check_metadata, check_processes, check_settings
from manyviews.train.setup import make_setup, restore
from processes import free_port, launched, start, world
from small_run import save_checkpoint
from stopped_runs import content, differing, newest, tensors

STEPS, STOPPED = 6, 4
SMALL = [
    "train.batch_size=16",
    "train.log_every=1",
    "train.precision=fp32",
    "train.preview=0",
    "train.monitor=0",
    "train.threads=1",
    "views.size=16",
    "encoder.projector.hidden=16",
    "encoder.projector.dim=8",
]
OBJECTIVES = {
    "bank": ["objective=bank"],
    # 50 keys: the pointer wraps within the run, on a slot in the middle of a process's own.
    "queue": ["objective=queue", "objective.size=50", "objective.momentum=0.9"],
    "nce": ["objective=bank", "objective.estimator=nce", "objective.negatives=50"],
    "parametric": ["objective=bank", "objective.estimator=parametric", "optim.name=sgd"],
    # Batches of four classes by four images; the boundary β is learned alike on both processes.
    "margin": ["objective=margin", "ids=labels", "views.num_views=1", "train.images_per_class=4"],
    # Five rows of class weights on each process, with AdamW's averages of their gradients.
    "margin_softmax": ["objective=margin_softmax", "ids=labels", "views.num_views=1"],
}
SHARDED = {
    "bank": {"objective.rows", "objective.written"},
    "queue": {"objective.queue.rows", "objective.queue.ids"},
    "nce": {"objective.rows", "objective.written"},
}
GROWING = ["objective=queue", "objective.size=20", "objective.per_process=true"]


def epochs(steps: int) -> str:
    """10,000 images in batches of 16: 625 steps are an epoch."""
    return f"train.epochs={steps / 625}"


def recipe(output: Path, *words: str) -> Recipe:
    return load(Recipe, None, [*SMALL, epochs(STEPS), *words, f"output={output}"])


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run)]


def pair(folder: Path) -> None:
    """Each objective straight through, and stopped and resumed, on two processes."""
    agreed = Stop.agreed

    def after(self: Stop) -> bool:
        self.asked = getattr(self, "asked", -1) + 1
        self.signal = 15 if self.asked == STOPPED else None
        return self.signal is not None

    for objective, words in (*OBJECTIVES.items(), ("growing", GROWING)):
        if objective != "growing":
            pretrain(recipe(folder / objective / "straight", *words))
        Stop.agreed = after
        try:
            pretrain(recipe(folder / objective / "stopped", *words))
        except SystemExit:
            own = content(folder / objective / "stopped")
            torch.save(own, folder / objective / f"own-{distributed.rank()}.pt")
        Stop.agreed = agreed
        distributed.barrier()
        if objective != "growing":
            copy = folder / objective / "resumed"
            if distributed.rank() == 0:
                subprocess.run(["cp", "-r", str(folder / objective / "stopped"), str(copy)], check=True)
            distributed.barrier()
            pretrain(recipe(copy, "resume=true", *words))
    distributed.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    launched(pair, folder)
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_that_were_stopped_go_on_bit_for_bit(folder: Path, name: str) -> None:
    straight, resumed = folder / name / "straight", folder / name / "resumed"
    assert differing(content(straight), content(resumed)) == []
    assert losses(straight) == losses(resumed)
    assert [step for step, _ in losses(straight)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_process_reads_what_two_held_joined_in_order(folder: Path, name: str) -> None:
    found = newest(folder / name / "stopped")
    assert found.step == STOPPED
    assert found.shards.keys() == SHARDED.get(name, found.shards.keys())
    assert bool(found.shards) == (name != "margin")
    whole, parts = tensors(found), [torch.load(folder / name / f"own-{rank}.pt") for rank in range(2)]
    joined = {key: torch.cat([part[key] for part in parts]) if key in found.shards else parts[0][key] for key in whole}
    assert differing(whole, joined) == []
    assert all(whole[key].shape[0] == length for key, length in found.shards.items())


def test_the_momentum_of_the_parametric_softmax_is_sharded(folder: Path) -> None:
    found = newest(folder / "parametric" / "stopped")
    assert [name for name in found.shards if name.startswith("optimiser.") and name.endswith(".momentum_buffer")]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_process_goes_on_with_what_two_began(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    subprocess.run(["cp", "-r", str(folder / name / "stopped"), str(tmp_path / "run")], check=True)
    with pytest.raises(ValueError, match=r"step 4 was written by 2 processes, and this is a start of 1.*elastic=true"):
        pretrain(recipe(tmp_path / "run", "resume=true", *OBJECTIVES[name]))
    pretrain(recipe(tmp_path / "run", "resume=true", "elastic=true", *OBJECTIVES[name]))
    assert "started on 2 processes, resumed on 1" in capsys.readouterr().out
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_a_queue_that_grows_with_the_processes_is_refused_on_another_number_of_them(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"40 rows in the checkpoint.*2 processes.*has 20.*per_process=true"):
        pretrain(recipe(folder / "growing" / "stopped", "resume=true", "elastic=true", *GROWING))


def commanded(rank: int, port: int, words: list[str]) -> None:
    os.environ |= world(rank, 2, port)
    sys.exit(cli.pretrain(words))


def launch(output: Path, *words: str) -> list[Any]:
    """Two processes that run the command."""
    given = [*SMALL, *words, f"output={output}"]
    processes: list[Any] = start(commanded, (free_port(), given), count=2, join=False).processes
    return processes


def ended(processes: list[Any]) -> list[int | None]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(
    ("name", "killed"),
    [
        pytest.param("nce", 1),
        pytest.param("bank", 0, marks=pytest.mark.slow),
        pytest.param("queue", 1, marks=pytest.mark.slow),
        pytest.param("parametric", 0, marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_which_one_was_killed_end_and_go_on_bit_for_bit(
    tmp_path: Path, name: str, killed: int
) -> None:
    steps = 40
    words = [*OBJECTIVES[name], epochs(steps)]
    assert ended(launch(tmp_path / "straight", *words)) == [0, 0]
    # A checkpoint at every step: the signal comes at any moment of a step or of a save.
    often = [*words, "train.save_minutes=1e-6"]
    processes, lines = launch(tmp_path / "killed", *often), tmp_path / "killed" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not lines.exists() or len(lines.read_text().splitlines()) < 5:
        assert time.monotonic() < until
        time.sleep(0.005)
    processes[killed].kill()
    codes = ended(processes)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] not in (0, None)
    assert 0 < newest(tmp_path / "killed").step < steps
    assert ended(launch(tmp_path / "killed", "resume=true", *often)) == [0, 0]
    assert differing(content(tmp_path / "straight"), content(tmp_path / "killed")) == []
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")
    left: list[Any] = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert all(entry.startswith("step-") and "." not in entry for entry in left)


ALONE = ["objective=queue", "objective.size=48", "objective.momentum=0.9"]
OFTEN = "train.save_minutes=1e-6"


def full(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


def there(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").iterdir())


def test_a_disk_that_is_full_for_a_while_is_told_of_once_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = pretrain(recipe(tmp_path / "straight", *ALONE))
    steps: list[int] = []

    def full_at_first(file: Path) -> None:
        steps.append(int(file.parent.name.split("-")[1].split(".")[0]) if "step-" in file.parent.name else 0)
        if max(steps) < 4:
            full()

    capsys.readouterr()
    monkeypatch.setattr(writing, "sync", full_at_first)
    disturbed = pretrain(recipe(tmp_path / "disturbed", *ALONE, OFTEN))
    assert differing(content(straight), content(disturbed)) == []
    assert losses(straight) == losses(disturbed)
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("could not be written: [Errno 28] No space left on device") == 1
    assert told.count("is written, after") == 1


def test_a_last_save_that_fails_ends_the_run_in_a_sentence_and_what_was_saved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = writing.sync
    monkeypatch.setattr(writing, "sync", lambda file: full() if "000006" in str(file) else original(file))
    words = [*ALONE, OFTEN, "train.keep=1"]
    with pytest.raises(OSError, match=r"step 6 could not be written: .*No space.*step-00000000\d stays.*resume=true"):
        pretrain(recipe(tmp_path / "run", *words))
    assert len(there(tmp_path / "run")) == 1
    monkeypatch.undo()
    resumed = pretrain(recipe(tmp_path / "run", *words, "resume=true"))
    assert losses(resumed) == losses(pretrain(recipe(tmp_path / "straight", *ALONE)))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.train_step

    def spoiled(components: loop.Components, images: Tensor, ids: Tensor, epoch: int, step: int) -> Any:
        taken = original(components, images, ids, epoch, step)
        if step == 4:
            components.encoder.backbone.get_submodule("stages.0.0.0").weight.data[0] = torch.nan
        return taken

    monkeypatch.setattr(loop, "train_step", spoiled)
    with pytest.raises(
        ValueError, match=r"after step [56] the weights are no longer finite \(encoder\.backbone\.stages"
    ):
        pretrain(recipe(tmp_path / "run", *ALONE, OFTEN))
    kept = there(tmp_path / "run")
    assert kept
    assert max(kept) < 5
    assert all(torch.isfinite(value).all() for key, value in content(tmp_path / "run").items() if "encoder" in key)


def test_the_step_that_measured_best_is_saved_with_its_score_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*ALONE, "train.keep=1"]
    scores = iter([0.2, 0.9, 0.5])
    monkeypatch.setattr(Recorder, "_accuracy", lambda *arguments: next(scores))
    measured = [word for word in SMALL if not word.startswith("train.monitor")]
    run = pretrain(load(Recipe, None, [*measured, epochs(6), *words, "train.monitor=3", f"output={tmp_path / 'run'}"]))
    assert there(run) == [4, 6]
    best = read_manifest(run / "checkpoints" / "step-000000004")
    assert best.metadata["score"] == 0.9
    assert read_manifest(run / "checkpoints" / "step-000000006").metadata["score"] is None


def test_a_checkpoint_of_other_settings_is_refused_whatever_the_configuration_says(tmp_path: Path) -> None:
    run = pretrain(recipe(tmp_path / "run", *ALONE))
    (run / "done").unlink()
    config = (run / "config.yaml").read_text()
    for text in (config, config.replace("seed: 0", "seed: 3")):
        (run / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"seed was 0 and is 3; start another"):
            pretrain(recipe(tmp_path / "run", *ALONE, "seed=3", "resume=true"))


def test_settings_are_named_one_by_one_and_what_moves_a_cursor_is_spelled_out() -> None:
    before = {"seed": 0, "optim": {"name": "sgd", "rate": None}, "train": {"keep": 2}}
    now = {"seed": 1, "optim": {"name": "a\x1b[2J", "rate": None}, "train": {"keep": 9}}
    with pytest.raises(ValueError, match=r"seed was 0 and is 1; optim\.name was sgd and is a\\u001b\[2J; start"):
        check_settings(before, now, {"train.keep"})


@pytest.mark.parametrize(
    ("metadata", "key"), [({}, "seconds"), ({"seconds": True}, "seconds"), ({"seconds": "9"}, "seconds")]
)
def test_a_checkpoint_whose_metadata_is_not_that_of_a_run_is_refused_in_words(
    metadata: dict[str, Any], key: str
) -> None:
    found = Checkpoint(3, {}, {"state": {}, "param_groups": []}, metadata)
    with pytest.raises(ValueError, match=f"step 3 has no valid {key}"):
        check_metadata(found, {"seconds": float})


def test_another_number_of_processes_is_refused_unless_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = Checkpoint(3, {}, {"state": {}, "param_groups": []}, {"processes": 4})
    check_processes(found, 4, elastic=False, console=Console())
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"step 3 was written by 4 processes, and this is a start of 2.*elastic=true"):
        check_processes(found, 2, elastic=False, console=Console())
    check_processes(found, 2, elastic=True, console=Console())
    assert "started on 4 processes, resumed on 2" in capsys.readouterr().out


def test_the_scale_of_half_precision_gradients_goes_on_where_it_was(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run", *ALONE)
    accelerator = start_run(16, "fp32", 1)
    ready = make_setup(made, accelerator, tmp_path / "run", Console(quiet=True), train_step)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    save_checkpoint(
        tmp_path / "run" / "checkpoints", state_of(ready.components, ready.split.train, 0, {"seconds": 0.0})
    )
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    restore(ready.components, newest(tmp_path / "run"))
    assert accelerator.scaler.get_scale() == 1024.0
