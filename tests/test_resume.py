"""Two processes that were stopped or killed go on bit for bit; another number of them goes on with the same rows."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from contrastive import distributed
from contrastive.checkpoints import Checkpoint, newest_checkpoint
from contrastive.config import load
from contrastive.launch import Stop
from contrastive.pretrain import pretrain
from contrastive.recipe import Recipe
from contrastive.run import read_metrics

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


def tensors(found: Checkpoint | None) -> dict[str, Tensor]:
    assert found is not None
    named = {f"{part}.{key}": value for part, state in found.parts.items() for key, value in state.items()}
    for index, state in found.optimiser["state"].items():
        named |= {f"optimiser.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return named


def content(run: Path) -> dict[str, Tensor]:
    return tensors(newest_checkpoint(run / "checkpoints")[0])


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """The names under which the bits are not the same."""
    assert one.keys() == two.keys()
    bits = [{key: value.contiguous().flatten().view(torch.uint8) for key, value in side.items()} for side in (one, two)]
    return [key for key in one if not torch.equal(bits[0][key], bits[1][key])]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def world(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher tells each process."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def pair(rank: int, port: int, name: str) -> None:
    """Each objective straight through, and stopped and resumed, on two processes."""
    os.environ |= world(rank, 2, port)
    folder, agreed = Path(name), Stop.agreed
    # The processes stay together from one run to the next.
    Accelerator.end_training = lambda self: None

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
            own = tensors(newest_checkpoint(folder / objective / "stopped" / "checkpoints")[0])
            torch.save(own, folder / objective / f"own-{rank}.pt")
        Stop.agreed = agreed
        distributed.barrier()
        if objective != "growing":
            copy = folder / objective / "resumed"
            if rank == 0:
                subprocess.run(["cp", "-r", str(folder / objective / "stopped"), str(copy)], check=True)
            distributed.barrier()
            pretrain(recipe(copy, "resume=true", *words))
    distributed.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    torch.multiprocessing.spawn(pair, args=(free_port(), str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_that_were_stopped_go_on_bit_for_bit(folder: Path, name: str) -> None:
    straight, resumed = folder / name / "straight", folder / name / "resumed"
    assert differing(content(straight), content(resumed)) == []
    assert losses(straight) == losses(resumed)
    assert [step for step, _ in losses(straight)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_process_reads_what_two_held_joined_in_order(folder: Path, name: str) -> None:
    found, _ = newest_checkpoint(folder / name / "stopped" / "checkpoints")
    assert found is not None
    assert found.step == STOPPED
    assert found.shards.keys() == SHARDED.get(name, found.shards.keys())
    assert bool(found.shards) == (name != "margin")
    whole, parts = tensors(found), [torch.load(folder / name / f"own-{rank}.pt") for rank in range(2)]
    joined = {key: torch.cat([part[key] for part in parts]) if key in found.shards else parts[0][key] for key in whole}
    assert differing(whole, joined) == []
    assert all(whole[key].shape[0] == length for key, length in found.shards.items())


def test_the_momentum_of_the_parametric_softmax_is_sharded(folder: Path) -> None:
    found, _ = newest_checkpoint(folder / "parametric" / "stopped" / "checkpoints")
    assert found is not None
    assert [name for name in found.shards if name.startswith("optimiser.") and name.endswith(".momentum_buffer")]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_process_goes_on_with_what_two_began(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    subprocess.run(["cp", "-r", str(folder / name / "stopped"), str(tmp_path / "run")], check=True)
    pretrain(recipe(tmp_path / "run", "resume=true", *OBJECTIVES[name]))
    assert "begun on 2 processes, goes on with 1" in capsys.readouterr().out
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_a_queue_that_grows_with_the_processes_is_refused_on_another_number_of_them(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"40 rows in the checkpoint.*2 processes.*has 20.*per_process=true"):
        pretrain(recipe(folder / "growing" / "stopped", "resume=true", *GROWING))


def launch(output: Path, *words: str) -> list[subprocess.Popen[str]]:
    script, port = str(Path(__file__).parents[1] / "scripts" / "pretrain.py"), free_port()
    return [
        subprocess.Popen(
            [sys.executable, script, *SMALL, *words, f"output={output}"],
            env=os.environ | world(rank, 2, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    told = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


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
    for code, text in ended(launch(tmp_path / "straight", *words)):
        assert code == 0, text
    # A checkpoint at every step: the signal comes at any moment of a step or of a save.
    often = [*words, "train.save_minutes=1e-6"]
    processes, lines = launch(tmp_path / "killed", *often), tmp_path / "killed" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not lines.exists() or len(lines.read_text().splitlines()) < 5:
        assert time.monotonic() < until
        time.sleep(0.005)
    processes[killed].send_signal(signal.SIGKILL)
    codes = [code for code, _ in ended(processes)]
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] not in (0, None)
    found, skipped = newest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert skipped == []
    assert found is not None
    assert 0 < found.step < steps
    for code, text in ended(launch(tmp_path / "killed", "resume=true", *often)):
        assert code == 0, text
    assert differing(content(tmp_path / "straight"), content(tmp_path / "killed")) == []
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")
    left: list[Any] = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert all(entry.startswith("step-") and "." not in entry for entry in left)
